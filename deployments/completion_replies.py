"""OpenAI's API for text: what its clients read, whole and as the events of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Any

from deployments.completions import TextRequest
from deployments.generation_service import Answers, GenerationService, Piece
from deployments.sampling import Picked
from deployments.text_stream import TextStream

Json = dict[str, Any]
Span = tuple[int, int]
#: What writing a token's log-probabilities is like, in bytes of JSON: five of the likeliest take 50 us.
_WORK = 3000
#: What stands for a probability of 0, whose logarithm JSON cannot carry; OpenAI's own.
_IMPOSSIBLE = -9999.0


class Reply(ABC):
    """Writes the answers to one request."""

    kind = ""
    #: `object` of a whole reply, and of an event.
    objects = ("", "")

    def __init__(self, service: GenerationService, wanted: TextRequest) -> None:
        self.wanted = wanted
        self._service = service
        self._texts: dict[int, str] = {}
        self._tells_tokens = wanted.sampling.logprobs is not None
        self._tokenizer = service.generator.tokenizer
        self._head = {"id": f"{self.kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        # What stands before a token whose text is asked for; some tokenizers (of proteins) have no "a".
        self._anchor = self._tokenizer.encode("a", add_special_tokens=False).ids[-1:] if self._tells_tokens else []
        self._anchor_length = len(self._tokenizer.decode(self._anchor, skip_special_tokens=False))

    async def events(self, answers: Answers, deadline: float | None) -> AsyncIterator[Json]:
        """Yield the events of a stream; its last one has the usage, where that was asked for."""
        usage: Json = {"usage": None} if self.wanted.with_usage else {}
        for choice in self._opening():
            yield self._write(1, [choice], **usage)
        async with aclosing(answers.pieces(deadline)) as pieces:
            async for piece in pieces:
                logprobs = await self._write_logprobs([piece]) if piece.picked or piece.prompt else None
                if piece.text or piece.finish or logprobs:
                    yield self._write(1, [self._change(piece, logprobs)], **usage)
        if self.wanted.with_usage:
            yield self._write(1, [], usage=_usage(answers))

    async def whole(self, answers: Answers, deadline: float | None) -> Json:
        """Return the reply when all answers are there."""
        by_index: dict[int, list[Piece]] = {}
        async with aclosing(answers.pieces(deadline)) as pieces:
            async for piece in pieces:
                by_index.setdefault(piece.index, []).append(piece)
        choices = []
        for index, found in sorted(by_index.items()):
            logprobs = await self._write_logprobs(found)
            choice = self._choice(index, "".join(piece.text for piece in found))
            choices.append({"index": index, **choice, "logprobs": logprobs, "finish_reason": found[-1].finish})
        return self._write(0, choices, usage=_usage(answers))

    def _write(self, which: int, choices: Sequence[Json], **more: Any) -> Json:
        return {**self._head, "object": self.objects[which], "choices": choices, **more}

    def _opening(self) -> Sequence[Json]:
        """Return the choices of the events that come before any text."""
        return ()

    @abstractmethod
    def _change(self, piece: Piece, logprobs: Json | None) -> Json:
        """Return a choice of an event."""

    @abstractmethod
    def _choice(self, index: int, text: str) -> Json:
        """Return what a choice of a whole reply has of its own."""

    @abstractmethod
    def _logprobs(self, told: Sequence[tuple[Picked, Span]]) -> Json:
        """Return the log-probabilities of some tokens, each with the characters there were before it and after."""

    async def _write_logprobs(self, pieces: Sequence[Piece]) -> Json | None:
        if not self._tells_tokens:
            return None
        tokens = sum(len(piece.prompt) or 1 for piece in pieces)

        def write() -> Json:
            return self._logprobs([one for piece in pieces for one in self._told(piece)])

        return await self._service.aside(_WORK * tokens, write)

    def _told(self, piece: Piece) -> Sequence[tuple[Picked, Span]]:
        return [(piece.picked, piece.span)] if piece.picked else []

    def _text_of(self, token: int) -> str:
        if token not in self._texts:
            # Behind another one: many decoders strip the space at the beginning of a text.
            text = self._tokenizer.decode([*self._anchor, token], skip_special_tokens=False)
            self._texts[token] = text[self._anchor_length :]
        return self._texts[token]


class CompletionReply(Reply):
    """Replies of /v1/completions."""

    kind = "cmpl"
    objects = ("text_completion", "text_completion")

    @cached_property  # not before the prompts were looked at
    def _echoes(self) -> Sequence[str]:
        """What each answer begins with."""
        wanted = self.wanted
        if not wanted.echo:
            return [""] * len(wanted.prompts) * wanted.choices
        return [text for prompt in wanted.prompts for text in [self._text(prompt)] * wanted.choices]

    def _text(self, prompt: str | Sequence[int]) -> str:
        return prompt if isinstance(prompt, str) else str(self._tokenizer.decode(prompt, skip_special_tokens=True))

    def _opening(self) -> Sequence[Json]:
        if not self.wanted.echo or self._tells_tokens:  # else it comes with how it scores
            return ()
        return [self._change(Piece(index, text), None) for index, text in enumerate(self._echoes)]

    def _change(self, piece: Piece, logprobs: Json | None) -> Json:
        text = self._echoes[piece.index] if piece.prompt else piece.text
        return {"index": piece.index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish}

    def _choice(self, index: int, text: str) -> Json:
        return {"text": self._echoes[index] + text}

    def _told(self, piece: Piece) -> Sequence[tuple[Picked, Span]]:
        if piece.prompt:
            return list(zip(piece.prompt, self._spans(piece.index, piece.prompt), strict=True))
        ahead = len(self._echoes[piece.index])
        return [(picked, (ahead + before, ahead + after)) for picked, (before, after) in super()._told(piece)]

    def _spans(self, index: int, tokens: Sequence[Picked]) -> Iterator[Span]:
        """Yield how many characters of the prompt there are before each of its tokens, and with it."""
        prompt, before = self.wanted.prompts[index // self.wanted.choices], 0
        if isinstance(prompt, str):
            for _, end in self._tokenizer.encode(prompt).offsets:  # 0 of what the tokenizer puts around it
                after = max(before, end)
                yield before, after
                before = after
            return
        stream = TextStream(self._tokenizer)
        for one in tokens:
            before = stream.length
            stream.add(one.token)
            yield before, stream.length

    def _logprobs(self, told: Sequence[tuple[Picked, Span]]) -> Json:
        texts = [self._text_of(one.token) for one, _ in told]
        return {
            "tokens": texts,
            # Of a prompt's first token there is nothing to say.
            "token_logprobs": [None if one.logprob is None else _write_logprob(one.logprob) for one, _ in told],
            "top_logprobs": [None if one.logprob is None else self._write_top(one) for one, _ in told],
            # Bytes that turn out to be no character come into the text with the token behind them.
            "text_offset": [max(span[0], span[1] - len(text)) for text, (_, span) in zip(texts, told, strict=True)],
        }

    def _write_top(self, picked: Picked) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in picked.top:  # parts of characters all read alike: the likeliest stays
            found.setdefault(self._text_of(token), _write_logprob(logprob))
        # The token itself always, so that there may be one more than were asked for, as OpenAI has it.
        found.setdefault(self._text_of(picked.token), _write_logprob(picked.logprob))
        return found


class ChatReply(Reply):
    """Replies of /v1/chat/completions."""

    kind = "chatcmpl"
    objects = ("chat.completion", "chat.completion.chunk")

    def _opening(self) -> Sequence[Json]:
        delta = {"role": "assistant", "content": ""}
        choices = range(self.wanted.choices)
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for index in choices]

    def _change(self, piece: Piece, logprobs: Json | None) -> Json:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}

    def _choice(self, index: int, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, told: Sequence[tuple[Picked, Span]]) -> Json:
        content = []
        for one, _ in told:
            top = [self._describe(token, logprob) for token, logprob in one.top]
            content.append({**self._describe(one.token, one.logprob), "top_logprobs": top})
        return {"content": content}

    def _describe(self, token: int, logprob: float | None) -> Json:
        text = self._text_of(token)
        # A token may be part of a character, whose bytes the tokenizer does not tell.
        return {
            "token": text,
            "logprob": _write_logprob(logprob),
            "bytes": None if "\ufffd" in text else list(text.encode()),
        }


def _write_logprob(logprob: float | None) -> float:
    return max(_IMPOSSIBLE, _IMPOSSIBLE if logprob is None else logprob)  # in this order NaN becomes it too


def _usage(answers: Answers) -> Json:
    prompt, tokens = answers.prompt_tokens, answers.tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": answers.reused_tokens},
    }
