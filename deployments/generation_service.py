"""`GenerationService`: what every protocol asks of a model that generates text, without a word of any of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Any

from deployments.admission import Admission, Held, size_of
from deployments.args import ModelArgs
from deployments.completions import TextRequest, read_payload
from deployments.errors import BadRequest, DeadlineExceeded, ModelFailed
from deployments.generate import TextGenerator
from deployments.generation import Generation, Scored, Step, What
from deployments.sampling import Picked, Sampler, Sampling
from deployments.served import Served
from deployments.text_stream import TextStream
from optim import CompiledModel

logger = logging.getLogger(__name__)
#: How much the seconds of the last answer count in the mean that Retry-After is made of.
_NEWEST = 0.2
#: How much more work a byte of a prompt is than one of JSON: 6 MB took a tokenizer 7 s.
_WORK = 64


@dataclass(frozen=True)
class Piece:
    """Some text of an answer as it becomes certain: of its `index`, with the token that brought it.

    The last one has `finish`: `stop` or `length`. `span` is how many characters there were before its token and after,
    some of them held back.
    """

    index: int
    text: str
    picked: Picked | None = None
    prompt: Sequence[Picked] = ()
    """How the tokens of the prompt score; before any text."""
    finish: str | None = None
    span: tuple[int, int] = (0, 0)


class Answers:
    """The answers to the prompts of one request, as they come; hold it as a block, whose end frees their slots."""

    def __init__(
        self,
        prompt_tokens: int,
        streams: Sequence[TextStream],
        choices: int,
        count: Callable[[str], None],
        tell_time: Callable[[float], None],
    ) -> None:
        self._started = time.monotonic()
        self._tell_time = tell_time
        self.prompt_tokens = prompt_tokens
        self.tokens = 0
        self._choices = choices
        self._streams = dict(enumerate(streams))
        self._count = count
        self._told: asyncio.Queue[tuple[int, What]] = asyncio.Queue()
        self._stack = ExitStack()
        self.generations: list[Generation] = []

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what is held; slots at the next step."""
        for generation in self.generations:
            generation.gone = True
        self._stack.close()

    @property
    def reused_tokens(self) -> int:
        """Tokens of the prompts that the cache had, each prompt counted once as in `prompt_tokens`."""
        return sum(generation.reused for generation in self.generations[:: self._choices])

    def hold(self, held: AbstractContextManager[Any]) -> None:
        """Enter a context that ends with these."""
        self._stack.enter_context(held)

    def tell(self, index: int, what: What) -> None:
        """Take in what came of a prompt's generation."""
        self._told.put_nowait((index, what))

    async def pieces(self, deadline: float | None = None) -> AsyncGenerator[Piece]:
        """Yield the pieces of all, until `deadline` on time.monotonic's clock; errors as they come, which end all."""
        left = dict(self._streams)
        try:
            while left:
                async with asyncio.timeout_at(deadline):
                    index, what = await self._told.get()
                if index not in left:  # what was under way when its stop string came
                    continue
                piece = self._read(index, left[index], what)
                if piece.finish is not None:
                    self._tell_time(time.monotonic() - self._started)
                    self.generations[index].gone = True
                    del left[index]
                yield piece
        except TimeoutError:
            self._count("deadline")
            raise DeadlineExceeded("no answer in time: the deadline has passed") from None
        except ModelFailed:
            self._count("failed")
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if left:
                self._count("gone")
            raise

    def _read(self, index: int, stream: TextStream, what: What) -> Piece:
        if isinstance(what, Exception):
            raise what
        if isinstance(what, Scored):
            return Piece(index, "", prompt=what.prompt)
        if isinstance(what, Picked) and what.is_end:
            return Piece(index, "", what, span=(stream.length, stream.length))
        if isinstance(what, str):
            return Piece(index, stream.end(), finish="stop" if stream.is_stopped else what)
        self.tokens += 1
        before = stream.length
        text = stream.add(what.token)
        finish = "stop" if stream.is_stopped else None
        return Piece(index, text, what, finish=finish, span=(before, stream.length))


class GenerationService(Served):
    """Tokenises prompts, has them generated, and gives out text."""

    def __init__(
        self,
        args: ModelArgs,
        generator: TextGenerator,
        compiled: Mapping[str, CompiledModel],
        add: Callable[[Generation], None],
        host_pool: Executor,
        admission: Admission,
        failure: Callable[[], str | None] = lambda: None,
        count: Callable[[str], None] = lambda what: None,
        record_step: Callable[[Step, float], None] = lambda step, seconds: None,
        record_first_token: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        super().__init__(args, host_pool, admission, failure, count)
        self._record_step = record_step
        self._record_first_token = record_first_token
        self._loop: asyncio.AbstractEventLoop | None = None
        self.generator = generator
        self.slots = max(args.batching.batch_sizes)
        self._compiled = compiled
        self._add = add
        self._mean_s = 1.0

    def report(self) -> dict[str, Any]:
        """Return the compile reports of the answering replica's functions, by name, and their device."""
        reports = {name: model.report.to_dict() for name, model in self._compiled.items()}
        return {"device": next(iter(reports.values()))["device"], "functions": reports}

    @property
    def most_answers(self) -> int:
        """The most answers to one request, all its prompts together: the others' turn comes too."""
        return min(self.limits.items, self.admission.max_rows)

    def seconds_to_drain(self, rows: int) -> int:
        """Return whole seconds until so many requests will have been answered, by how long the last ones took."""
        return max(1, round(self._mean_s * rows / self.slots))

    def deliver(self, step: Step, seconds: float) -> None:
        """Take what came of a step to the event loop, in one call for all; called on the model thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell, step, seconds)

    def _tell(self, step: Step, seconds: float) -> None:
        for generation, what in step.events:
            generation.tell(what)
        self._record(self._record_step, step, seconds)

    def _record(self, record: Callable[..., None], *what: Any) -> None:
        try:
            record(*what)
        except Exception:  # a metric that cannot be written must not stop those who wait
            logger.exception("a step could not be counted")

    def deadline(self, timeout_s: float | None) -> float | None:
        """Return until when a request is wanted, on time.monotonic's clock; DeadlineExceeded where that is over."""
        seconds = self._seconds(timeout_s)
        if seconds is None:
            return None
        if seconds <= 0:
            self._count("deadline")
            raise DeadlineExceeded("the deadline has passed")
        return time.monotonic() + seconds

    async def start(self, wanted: TextRequest) -> Answers:
        """Have the prompts of a request generated for; close what is returned.

        BadRequest for prompts that do not fit, Overloaded and NotReady where they cannot be taken.
        """
        most, asked = self.most_answers, (len(wanted.prompts) or 1) * wanted.choices
        if asked > most:
            which = "limits.items" if most == self.limits.items else "batching.max_queue"
            field = "n" if wanted.choices > 1 else "prompt"
            raise BadRequest(f"{field}: {asked} answers to one request; at most {most} are allowed ({which})")
        self._loop = asyncio.get_running_loop()
        with ExitStack() as stack:
            # Before they are tokenised, which is work.
            stack.enter_context(self.admission.hold_rows(asked))
            prompts = await self.aside(_WORK * wanted.size, self._encode, wanted)
            streams = [TextStream(self.generator.tokenizer, wanted.stops) for _ in range(asked)]
            answers = Answers(sum(map(len, prompts)), streams, wanted.choices, self._count, self._take_time)
            answers.hold(stack.pop_all())
        try:
            for index in range(asked):
                which_prompt, choice = divmod(index, wanted.choices)
                sampler = Sampler(_of_choice(wanted.sampling, choice))
                self._start_one(answers, index, prompts[which_prompt], sampler, wanted)
        except BaseException:
            answers.close()
            raise
        return answers

    def _take_time(self, seconds: float) -> None:
        """Take in how long an answer took."""
        self._mean_s += _NEWEST * (seconds - self._mean_s)

    def _start_one(
        self, answers: Answers, index: int, prompt: Sequence[int], sampler: Sampler, wanted: TextRequest
    ) -> None:
        started = time.monotonic()
        is_first = True

        def tell(what: What) -> None:
            nonlocal is_first
            answers.tell(index, what)
            seconds = time.monotonic() - started
            if is_first and isinstance(what, Picked) and not what.is_end:
                is_first = False
                self._record(self._record_first_token, seconds)

        # A special token is no text, in which a stop string is looked for.
        ends = (frozenset() if wanted.ignore_eos else self.generator.ends) | self.generator.special(wanted.stops)
        scores = sampler.sampling.logprobs if wanted.echo else None
        generation = Generation(prompt, sampler, wanted.most, ends, scores, tell)
        answers.generations.append(generation)
        self._add(generation)

    def _encode(self, wanted: TextRequest) -> list[list[int]]:
        vocabulary = self.generator.config.vocabulary
        for token, _ in wanted.sampling.logit_bias:
            if token >= vocabulary:
                raise BadRequest(f"logit_bias: token {token} is not in the vocabulary (0 to {vocabulary - 1})")
        if wanted.messages:
            return [self.generator.encode_chat(wanted.messages)]
        names = ["prompt"] if len(wanted.prompts) == 1 else [f"prompt[{i}]" for i in range(len(wanted.prompts))]
        return [self.generator.encode(prompt, name) for name, prompt in zip(names, wanted.prompts, strict=True)]

    async def predict(self, payload: Any, timeout_s: float | None = None, held: Held | None = None) -> str:
        """Return the whole answer to a prompt: a text, or an object with the fields of a completion request."""
        with self._held(held) as holding:
            holding.grow_to(size_of(payload))
            wanted = read_payload(payload)
            deadline = self.deadline(timeout_s)
            with await self.start(wanted) as answers:
                async with aclosing(answers.pieces(deadline)) as pieces:
                    return "".join([piece.text async for piece in pieces])


def _of_choice(sampling: Sampling, choice: int) -> Sampling:
    """Return how one of several answers to a prompt is sampled: each with a seed of its own, where there is one."""
    if sampling.seed is None or not choice:
        return sampling
    return replace(sampling, seed=(sampling.seed + choice + 2**63) % 2**64 - 2**63)  # it has 64 bits
