"""`TextStream`: the text of tokens as they come, up to the first of some stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextStream:
    """Turns tokens into text piece by piece; the pieces put together are the text of all tokens.

    Text that may be the beginning of a stop string, and bytes that are not a character yet, are held back. With the
    first stop string the stream ends: `is_stopped`, and nothing of it, or behind it, is given out.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream: DecodeStream | None = DecodeStream(skip_special_tokens=True)
        self._stops = tuple(stops)
        self._held = ""
        self._tokens: list[int] = []
        self._given = 0
        self.is_stopped = False

    @property
    def length(self) -> int:
        """The characters so far: those given out, and those that are held back because of a stop string."""
        return self._given + len(self._held)

    def add(self, token: int) -> str:
        """Return the text that is certain with one token more; empty where there is none."""
        if self.is_stopped:
            return ""
        self._tokens.append(token)
        self._held += self._read(token)
        return self._give(self._first_stop())

    def _read(self, token: int) -> str:
        if self._stream is not None:
            try:
                return self._stream.step(self._tokenizer, token) or ""
            except Exception as error:
                # What it raises for bytes that are no character and then become part of one (tokenizers 0.23, Llama 2);
                # from here on the text is made anew for every token.
                if type(error) is not Exception:
                    raise
                self._stream = None
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return "" if whole.endswith("\ufffd") else whole[self.length :]

    def end(self) -> str:
        """Return what was held back, when no token follows."""
        if self.is_stopped:
            return ""
        # What the stream still waits for are bytes without an end; the tokenizer says how they read.
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        self._held = whole[self._given :]
        found = self._first_stop()
        if found is not None:
            return self._give(found)
        text, self._held = self._held, ""
        return text

    def _first_stop(self) -> int | None:
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        return min(places, default=None)

    def _give(self, stop: int | None) -> str:
        if stop is not None:
            self.is_stopped = True
            text, self._held = self._held[:stop], ""
        else:
            kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
            text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self._given += len(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
