"""`Generation` and `Slots`: requests that generate join and leave between the steps of a decoder (no threads)."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from deployments.errors import ModelFailed
from deployments.prefixes import FreeSlots, Held
from deployments.sampling import Picked, Picks, Sampler, Scores, pick
from deployments.transfers import to_device
from optim import is_device_error
from optim.errors import describe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """A prompt's tokens with their log-probabilities; of the first there is none."""

    prompt: Sequence[Picked]


What = Picked | Scored | str | Exception
"""What comes of a request: how its prompt scores, where that was asked for; a token; and at the end why: `stop` (one of
`ends`), `length` (as many as were asked for, or as fit), or an exception."""


#: Nor is anything else a number that comes of what the cache has of such a request.
_UNSOUND = "the model's logits on this request are infinite, or no numbers"


class Run(Protocol):
    """A compiled (or eager) `Prefill` or `DecodeOne`."""

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return logits. [B, V]."""


@dataclass(eq=False)
class Generation:
    """One request: its prompt, how its tokens are picked, and who is to be told of them.

    Who sets `gone` frees its slot at the next step, after which nothing more comes of it. `tell` is not called here,
    but by whom the events of a step go to.
    """

    prompt: Sequence[int]
    sampler: Sampler
    most: int | None = None
    """The most tokens of the answer; None is all that fits."""
    ends: frozenset[int] = frozenset()
    """Tokens that end the answer, and are not part of it."""
    scores: int | None = None
    """How many of the likeliest tokens are told for each place of the prompt, and with it of its end token; None is
    nothing of either."""
    tell: Callable[[What], None] = lambda what: None
    gone: bool = False
    slot: int = -1
    """Its part of the cache."""
    done: int = 0
    """Tokens of it that are in the cache."""
    reused: int = 0
    """Tokens of the prompt that another request had left there."""
    cuts: list[int] = field(default_factory=list)
    """After how many tokens of the prompt a piece ends that nothing padded."""
    picked: int = 0
    """Tokens that were picked for it, also those that are not known yet."""
    scored: list[Scores] = field(default_factory=list)
    """What is under way of that."""
    tokens: list[int] = field(default_factory=list)
    """What it generated, as far as it is known; the last that was picked is not in the cache yet."""

    @property
    def is_prefilled(self) -> bool:
        """Whether all of its prompt is in the cache."""
        return self.done >= len(self.prompt)

    def held(self) -> Held:
        """Return the tokens that are in the cache, as far as they are known."""
        # Its first token came of sound logits, which see all of the prompt; later tokens are run one by one.
        return Held([*self.prompt, *self.tokens][: self.done], None if self.tokens else self.cuts)

    def is_full(self, tokens: int, length: int) -> bool:
        """Whether so many tokens are all of its answer, where prompt and answer may have `length` together."""
        return tokens == self.most or len(self.prompt) + tokens >= length


@dataclass(frozen=True)
class Step:
    """What came of a step: the rows it decoded, the tokens it prefilled, and the events of requests it can tell of.

    Where slots run ahead, the events are mostly of the step before.
    """

    events: Sequence[tuple[Generation, What]]
    rows: int = 0
    prefilled: int = 0
    reused: int = 0
    """Tokens of a prompt that did not have to be prefilled."""


class Slots:
    """Generates for as many requests at a time as the cache has slots; all methods but `add` belong to one thread.

    A step is one token of every request that generates, or one piece of a new request's prompt, the oldest one's: as
    much as the largest of `prefills` takes while nobody generates. Else pieces have the size that `piece` says, and
    every other step is a token, so that streams go on.

    With `runs_ahead` a step tells what the one before it picked, while the device does what it has queued: the tokens
    themselves never have to come to the CPU in between. A request that ends with one of its `ends` has had one row too
    many by then, which nobody sees.

    With `copy` a request that begins as another one did, in pieces of the least prefill, does not run that again (where
    no token of the other one's answer is known, up to the end of a piece that it ran); but for one that asks how its
    prompt scores. `clear` empties a slot from a token on.
    """

    def __init__(
        self,
        prefills: Mapping[int, Run],
        decode: Run,
        spans: Sequence[int],
        slots: int,
        piece: int,
        device: torch.device | str = "cpu",
        *,
        runs_ahead: bool = False,
        clear: Callable[[int, int], None] = lambda slot, start: None,
        copy: Callable[[int, int, int], None] | None = None,
        score: Callable[..., Iterable[Scores]] | None = None,
    ) -> None:
        self._prefills = dict(sorted(prefills.items()))
        self._decode = decode
        self._spans = sorted(spans)
        self._piece = piece
        self._device = torch.device(device)
        self._runs_ahead = runs_ahead
        self._places = torch.arange(self._spans[-1] + max(self._prefills), device=self._device)
        self._latest = torch.zeros(slots, dtype=torch.int64, device=self._device)  # the last token of each slot
        self._unread: deque[tuple[Sequence[Generation], Picks]] = deque()
        self._free = FreeSlots(slots, min(self._prefills))
        self._clear, self._copy, self._score = clear, copy, score
        self._unclear: set[int] = set()  # slots that may have what is no number
        self._lost: list[list[Scores]] = []
        self._arrived: deque[Generation] = deque()  # what other threads put in, one call at a time
        self._new: deque[Generation] = deque()
        self._filling: Generation | None = None
        self._running: list[Generation] = []
        self._events: list[tuple[Generation, What]] = []
        self._owes_token = False  # to those who generate, since a prompt had its turn

    def __len__(self) -> int:
        return len(self._arrived) + len(self._new) + (self._filling is not None) + len(self._running)

    @property
    def length(self) -> int:
        """The most tokens of a request, prompt and answer together."""
        return self._spans[-1]

    def add(self, generation: Generation) -> None:
        """Take in a request; from any thread."""
        self._arrived.append(generation)

    def step(self) -> Step:
        """Do one step; what a request raises ends that request alone, unless the device failed."""
        self._sweep()
        reused = 0
        if self._filling is None and self._free and self._new:
            self._filling = self._new.popleft()
            reused = self._place(self._filling)
        rows = [one for one in self._running if not one.is_full(one.picked, self.length)]  # the others' last is unread
        if self._filling is not None and not (self._owes_token and rows):
            # By itself, so that a first token is not held back by everybody's next one.
            prefilled, self._owes_token = self._prefill(self._filling, alone=not rows), True
            self._read(ahead=1 if rows or self._filling is None else 0)  # of a piece nothing is picked but of the last
            return Step(self._take_events(), prefilled=prefilled, reused=reused)
        self._owes_token = False
        if rows:
            self._decode_one(rows)
        self._read(ahead=1 if rows else 0)
        return Step(self._take_events(), len(rows), reused=reused)

    def fail(self, error: Exception) -> Step:
        """End every request with an error."""
        self._take_in()
        everyone = [*self._running, *([self._filling] if self._filling else []), *self._new]
        self._new.clear()
        # What is unread stays: to free memory that a broken GPU was to copy to would end the process.
        self._lost += [generation.scored for generation in everyone]
        for generation in everyone:
            self._end(generation, error)
        return Step(self._take_events())

    def _take_events(self) -> Sequence[tuple[Generation, What]]:
        events, self._events = self._events, []
        return events

    def _sweep(self) -> None:
        """Take in what has arrived, and give back what those who went away hold."""
        self._take_in()
        self._new = deque(generation for generation in self._new if not generation.gone)
        for generation in [*self._running, *([self._filling] if self._filling else [])]:
            if generation.gone:
                self._leave(generation)

    def _take_in(self) -> None:
        while self._arrived:
            self._new.append(self._arrived.popleft())

    def _place(self, generation: Generation) -> int:
        """Give a request a slot, with the tokens of its prompt that the cache has already; return how many."""
        others = None
        if self._copy is not None and generation.scores is None:
            least = min(self._prefills)
            begins = list(generation.prompt[:least])
            if any(not one.tokens and list(one.prompt[:least]) == begins for one in self._running):
                self._read()  # its first token, after which any part of its prompt may be reused: `n` answers come so
            others = {one.slot: one.held() for one in self._running}
        place = self._free.take(list(generation.prompt), others)
        generation.slot, generation.done, generation.reused = place.slot, place.count, place.count
        generation.cuts = list(place.cuts)
        if place.slot in self._unclear:
            self._clear(place.slot, place.count if place.source == place.slot else 0)
            self._unclear.discard(place.slot)
        if self._copy is not None and place.source != place.slot:
            self._copy(place.source, place.slot, place.count)
        return place.count

    def _prefill(self, generation: Generation, *, alone: bool) -> int:
        """Run a piece of a prompt, a small one where others generate; return its tokens."""
        start, left = generation.done, len(generation.prompt) - generation.done
        sizes = [size for size in self._prefills if alone or size <= self._piece]
        size = next((size for size in sizes if size >= left), sizes[-1])
        if 2 * left <= size:  # most of it would be padding
            size = max((smaller for smaller in sizes if smaller <= left), default=size)
        count = min(left, size)
        # What pads the piece is written behind the prompt, where it is overwritten before anybody looks at it.
        (tokens,) = self._send([*generation.prompt[start : start + count], *([0] * (size - count))])
        slots, last = self._send([generation.slot], [count - 1])
        positions = self._places[start : start + size].unsqueeze(0)
        inputs, mask = tokens.unsqueeze(0), self._mask(positions, start + size)
        try:
            if generation.scores is not None and self._score is not None:
                # Eager, and before the compiled one, whose keys and values are those that stay: so no bucket is added,
                # and the answer is the same as without.
                given = generation.prompt[start + 1 : start + count + 1]
                generation.scored += self._score((inputs, positions, slots, mask), given, generation.scores)
            logits = self._prefills[size](inputs, positions, slots, last, mask)
        except Exception as error:
            self._settle_failure(generation, error)
            return 0
        generation.done += count
        if count == size:
            generation.cuts.append(generation.done)
        if generation.is_prefilled:
            self._filling = None
            self._running.append(generation)
            if generation.most != 0:
                self._pick([generation], slots, logits)
            elif self._tell_scores(generation):
                self._end(generation, "length")
        return count

    def _decode_one(self, rows: Sequence[Generation]) -> None:
        """Run one token of each row; where that fails each alone, once, so that only what fails then ends."""
        done = [generation.done for generation in rows]
        positions, slots = self._send(done, [generation.slot for generation in rows])
        try:
            logits = self._decode(self._latest[slots], positions, slots, self._mask(positions, max(done) + 1))
        except Exception as error:
            if len(rows) == 1 or is_device_error(error):
                self._settle_failure(rows[0], error)
                return
            for generation in rows:
                if generation.slot >= 0:  # what is read of another one's failure may have ended it
                    self._decode_one([generation])
            return
        for generation in rows:
            generation.done += 1
        self._pick(rows, slots, logits)

    def _send(self, *rows: Sequence[int]) -> torch.Tensor:
        """Return rows of numbers on the device, by one copy that nobody waits for. [len(rows), N]."""
        size = len(rows[0])
        # An even number of int64 keeps each row where code for aligned inputs may read it.
        return to_device([[*row, *([0] * (size % 2))] for row in rows], torch.int64, self._device)[:, :size]

    def _settle_failure(self, generation: Generation, error: Exception) -> None:
        """End a request with an error of the model's own; raise one of the device's, which concerns all."""
        if is_device_error(error):
            raise error
        self._read()  # what came before it
        if generation.slot < 0:
            return  # it has ended with that
        kind, message = describe(error)
        logger.warning("the model failed on a request: %s: %s", kind, message)
        self._end(generation, ModelFailed(f"the model failed on this request: {kind}: {message}"))

    def _mask(self, positions: torch.Tensor, needed: int) -> torch.Tensor:
        """Return which places each token sees: its own and those before, in the least span that holds them."""
        span = next(span for span in self._spans if span >= min(needed, self.length))
        return self._places[:span] <= positions.unsqueeze(-1)

    def _pick(self, rows: Sequence[Generation], slots: torch.Tensor, logits: torch.Tensor) -> None:
        """Pick the next token of each row, and keep it where the next step finds it. [B], [B, V]."""
        try:
            found = pick([generation.sampler for generation in rows], logits)
        except Exception as error:
            if len(rows) == 1 or is_device_error(error):
                self._settle_failure(rows[0], error)
                return
            for row, generation in enumerate(rows):  # it must not end the others
                self._pick([generation], slots[row : row + 1], logits[row : row + 1])
            return
        self._latest[slots] = found.tokens
        for generation in rows:
            generation.picked += 1
        self._unread.append((rows, found))

    def _read(self, *, ahead: int = 0) -> None:
        """Learn which tokens were picked; the last `ahead` times may wait, unless somebody looks back at them."""
        if not self._runs_ahead or any(generation.sampler.looks_back for generation in self._running):
            ahead = 0
        while self._unread:
            rows, picks = self._unread[0]
            if any(generation.slot >= 0 for generation in rows):  # the others have ended meanwhile
                if len(self._unread) <= ahead:
                    return
                for generation, picked in zip(rows, picks.read(), strict=True):
                    if generation.slot >= 0:
                        self._take(generation, picked)
            self._unread.popleft()

    def _take(self, generation: Generation, picked: Picked | None) -> None:
        """Go on with a request's next token."""
        if picked is None:
            self._end(generation, ModelFailed(_UNSOUND))
            return
        if not generation.tokens and not self._tell_scores(generation):
            return
        generation.tokens.append(picked.token)
        if picked.token in generation.ends:
            if generation.scores is not None:  # who reads scores takes the last one for that of what was generated
                self._events.append((generation, replace(picked, is_end=True)))
            self._end(generation, "stop")
            return
        self._events.append((generation, picked))
        if generation.is_full(len(generation.tokens), self.length):
            self._end(generation, "length")

    def _tell_scores(self, generation: Generation) -> bool:
        """Tell how its prompt scores, if that was asked for; return whether it goes on."""
        if generation.scores is None:
            return True
        found = [picked for scores in generation.scored for picked in scores.read()]
        generation.scored.clear()
        sound = [picked for picked in found if picked is not None]
        if len(sound) < len(found):
            self._end(generation, ModelFailed(_UNSOUND))
            return False
        self._events.append((generation, Scored([Picked(generation.prompt[0]), *sound])))
        return True

    def _end(self, generation: Generation, why: str | Exception) -> None:
        self._leave(generation, has_failed=isinstance(why, Exception))
        self._events.append((generation, why))

    def _leave(self, generation: Generation, *, has_failed: bool = False) -> None:
        if generation is self._filling:
            self._filling = None
        if generation in self._running:
            self._running.remove(generation)
        if generation.slot >= 0:
            # The last logits show what all that they come of is, where they were looked at.
            was_read = 0 < generation.picked == len(generation.tokens)
            if has_failed or not was_read:
                self._unclear.add(generation.slot)
            self._free.give_back(generation.slot, Held() if has_failed else generation.held())
            generation.slot = -1
