"""`Sampling`: how requests' next tokens are picked from the logits, each the same whatever runs beside it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from deployments.transfers import ToHost, to_device

#: Temperatures below it count as it; it must not be 0 in float32.
_COLDEST = 1e-30
#: How many tokens are looked at first for those that reach `top_p`.
_LIKELIEST = 256


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked; `temperature` 0 takes the likeliest.

    `top_k` (0: all) and `top_p` leave the likeliest tokens, as Hugging Face's generation does it: temperature first,
    then `top_k`, then the fewest tokens whose probabilities reach `top_p`. `seed` makes a request's tokens the same
    each time; `logprobs` is how many of the likeliest tokens are told, with log-probabilities (None: nothing is).
    Before all that `logit_bias` is added to the logits of its tokens, and from those of tokens that the request has
    generated `frequency_penalty` is subtracted for each time, and `presence_penalty` once (as OpenAI has it).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Picked:
    """A token, its log-probability under the model's own distribution, and those of the likeliest, likeliest first.

    `is_end` is one that ends the answer and is no part of it.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    is_end: bool = False


@dataclass
class Sampler:
    """How one request's tokens are picked, with a generator of its own."""

    sampling: Sampling
    shifts: dict[int, float] = field(default_factory=dict)
    """What is added to the logits of tokens."""
    _taken: set[int] = field(default_factory=set)
    _where: tuple[torch.Tensor, torch.Tensor] | None = None
    _drawn: float | None = None

    def __post_init__(self) -> None:
        self.shifts.update(self.sampling.logit_bias)
        # torch's generator takes 32 bits of a seed, and Python's no sign.
        seed = self.sampling.seed
        self._numbers = random.Random(None if seed is None else seed % 2**64)

    @property
    def looks_back(self) -> bool:
        """Whether a token has to be known (`take`) before the next one can be picked."""
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)

    def draw(self) -> float:
        """Return the number from 0 to 1 that decides on the request's next token: the same until `go_on`."""
        if self._drawn is None:
            self._drawn = self._numbers.random()
        return self._drawn

    def go_on(self) -> None:
        """Have another number decide: the next token was picked."""
        self._drawn = None

    def take(self, token: int) -> None:
        """Learn which token was picked."""
        if self.looks_back:
            how = self.sampling
            penalty = how.frequency_penalty + (0 if token in self._taken else how.presence_penalty)
            self.shifts[token] = self.shifts.get(token, 0) - penalty
            self._taken.add(token)
            self._where = None

    def shift(self, logits: torch.Tensor) -> None:
        """Add to a row of logits what the request adds, in place. [V]."""
        if self._where is None:
            tokens = to_device(list(self.shifts), torch.int64, logits.device)
            self._where = tokens, to_device(list(self.shifts.values()), logits.dtype, logits.device)
        tokens, values = self._where
        logits[tokens] += values


class Picks:
    """Tokens that were picked where the logits are, on their way to the CPU."""

    def __init__(
        self,
        samplers: Sequence[Sampler],
        tokens: torch.Tensor,
        are_sound: torch.Tensor,
        telling: Mapping[int, int],
        told: Sequence[torch.Tensor],
    ) -> None:
        #: Where the logits are; some token also where those are not sound. [R]
        self.tokens = tokens
        self._samplers, self._telling = samplers, telling
        self._arriving = ToHost([tokens, are_sound, *told])

    def read(self) -> list[Picked | None]:
        """Return what was picked, once; waits for it, and has the samplers learn it.

        None is picked of logits that are no numbers, or infinite.
        """
        tokens, are_sound, *told = (copy.tolist() for copy in self._arriving.wait())
        for sampler, token in zip(self._samplers, tokens, strict=True):
            sampler.take(token)
        found = [Picked(token) for token in tokens]
        for (row, count), own, likeliest, values in zip(self._telling.items(), *(told or ([], [], [])), strict=True):
            found[row] = Picked(tokens[row], own, tuple(zip(likeliest[:count], values[:count], strict=True)))
        return [picked if is_sound else None for picked, is_sound in zip(found, are_sound, strict=True)]


class Scores:
    """How likely given tokens were, and which were the likeliest in their place, on the way to the CPU. [N], [N, V]."""

    def __init__(self, tokens: Sequence[int], logits: torch.Tensor, most: int) -> None:
        self._tokens = tokens
        given, logits = to_device(tokens, torch.int64, logits.device), logits.float()
        self._arriving = ToHost([_are_sound(logits), *_tell(given, logits, most)])

    def read(self) -> list[Picked | None]:
        """Return the tokens with what was found, or None for logits as `Picks.read` does; waits for it."""
        are_sound, own, likeliest, values = (copy.tolist() for copy in self._arriving.wait())
        return [
            Picked(token, logprob, tuple(zip(places, top, strict=True))) if is_sound else None
            for token, is_sound, logprob, places, top in zip(
                self._tokens, are_sound, own, likeliest, values, strict=True
            )
        ]


def pick(samplers: Sequence[Sampler], logits: torch.Tensor) -> Picks:
    """Pick the next token of each row where the logits are; nothing waits for a GPU here. [R, V]."""
    own, rows = logits.float(), range(len(samplers))
    shifting = [row for row in rows if samplers[row].shifts]
    logits = own.clone() if shifting else own
    for row in shifting:
        samplers[row].shift(logits[row])
    greedy = [row for row in rows if samplers[row].sampling.temperature == 0]
    drawing = [row for row in rows if row not in greedy]
    # On a CPU each by itself, while it is in the cache (8 rows of 128,256 took 9 ms together, 3 one by one).
    groups = [drawing] if logits.is_cuda else [[row] for row in drawing]
    parts = [(greedy, _rows(logits, greedy).argmax(-1))] if greedy else []
    for group in filter(None, groups):
        how, numbers = [samplers[row].sampling for row in group], [samplers[row].draw() for row in group]
        parts.append((group, _choose(how, _rows(logits, group), numbers)))
    tokens = _in_order(parts)
    telling = {row: samplers[row].sampling.logprobs or 0 for row in rows if samplers[row].sampling.logprobs is not None}
    told: Sequence[torch.Tensor] = ()
    if telling:
        told = _tell(_rows(tokens, list(telling)), _rows(own, list(telling)), max(telling.values()))
    for sampler in samplers:
        sampler.go_on()
    return Picks(samplers, tokens, _are_sound(own), telling, told)


def rehearse(logits: torch.Tensor) -> None:
    """Pick from rows in every way, so that a GPU has loaded the code and the memory is there. [R, V].

    What is compiled runs before a replica is ready, and this would not: the first request that samples would wait for
    it and, where memory is short, end the replica.
    """
    shifted = Sampling(top_p=0.9, logprobs=20, logit_bias=((0, 0.0),))
    for ways in ([Sampling(temperature=0)], [shifted], [Sampling(), shifted, Sampling(temperature=0)]):
        pick([Sampler(ways[row % len(ways)]) for row in range(len(logits))], logits).read()


def _are_sound(logits: torch.Tensor) -> torch.Tensor:
    """Say of each row whether it is one of numbers: NaN or infinity would be its largest. [R, V] -> [R]."""
    return logits.amax(-1).isfinite()


def _rows(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return some rows of a tensor, without a copy where it is all of them or one."""
    if len(rows) == len(tensor):
        return tensor
    return tensor[rows[0] : rows[0] + 1] if len(rows) == 1 else tensor[to_device(rows, torch.int64, tensor.device)]


def _in_order(parts: Sequence[tuple[Sequence[int], torch.Tensor]]) -> torch.Tensor:
    """Return what parts have for each row, by row: the parts' rows are all there are. [N] each -> [R]."""
    if len(parts) == 1:
        return parts[0][1]
    found = torch.cat([values for _, values in parts])
    order = [row for rows, _ in parts for row in rows]
    places = sorted(range(len(order)), key=order.__getitem__)
    return found[to_device(places, torch.int64, found.device)]


def _tell(tokens: torch.Tensor, logits: torch.Tensor, most: int) -> list[torch.Tensor]:
    """Return the log-probability of each row's token, and so many of the likeliest tokens and theirs. [R], [R, V]."""
    every = logits.log_softmax(-1)
    values, likeliest = every.topk(min(most, every.shape[-1]))
    return [every.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), likeliest, values]


def _choose(how: Sequence[Sampling], logits: torch.Tensor, drawn: Sequence[float]) -> torch.Tensor:
    """Return the token of each row that its number falls on, however many are left. [R, V] -> [R]."""
    scaled, device = logits, logits.device
    if scaled.is_cuda or any(one.temperature != 1 for one in how):  # on a GPU a neighbour's must not matter
        # From the likeliest, so that a temperature of next to nothing takes that one and no infinity.
        heat = to_device([max(one.temperature, _COLDEST) for one in how], logits.dtype, device).unsqueeze(-1)
        scaled = (logits - logits.amax(-1, keepdim=True)) / heat
    numbers = to_device(drawn, torch.float64, device).unsqueeze(-1)
    limited = [row for row, one in enumerate(how) if 0 < one.top_k < logits.shape[-1] or one.top_p < 1]
    free = [row for row in range(len(how)) if row not in limited]
    parts = []
    if free:
        parts.append((free, _fall(_rows(scaled, free).softmax(-1), _rows(numbers, free))))
    if limited:
        places, probabilities = _limit([how[row] for row in limited], _rows(scaled, limited))
        at = _fall(probabilities, _rows(numbers, limited))
        chosen = torch.where(at < 0, at, places.gather(-1, at.clamp(min=0).unsqueeze(-1)).squeeze(-1))
        parts.append((limited, chosen))
    found = _in_order(parts)
    if found.is_cuda or bool((found < 0).any()):  # to look would be to wait for a GPU
        # Of an infinite logit, or one that is no number, nothing can be drawn.
        return torch.where(found < 0, logits.argmax(-1), found)
    return found


def _fall(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return where numbers from 0 to 1 fall among probabilities, -1 where those are none. [R, N], [R, 1] -> [R].

    One number decides, however the probabilities were made.
    """
    total = probabilities.cumsum(-1, dtype=torch.float64)
    whole = total[:, -1:].contiguous()
    places = torch.searchsorted(total, numbers * whole, right=True)
    last = torch.searchsorted(total, whole)  # behind it are those that are not left: their probability is 0
    return torch.where(whole.isfinite(), torch.minimum(places, last), -1).squeeze(-1)


def _limit(how: Sequence[Sampling], scaled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest tokens of each row, and the probabilities of those that `top_k` and `top_p` leave, else 0.

    [R, V] -> [R, N] each. On a CPU few are enough as a rule, and finding those is cheap: sorting all of 128,256 took
    8 ms, the first 256 of them 0.3. A GPU sorts all in less time (H100: 0.09 ms, 0.16 for 8 rows, 256 in 0.14), and to
    look whether few are enough would be to wait for it.
    """
    size, device = scaled.shape[-1], scaled.device
    most = [one.top_k if 0 < one.top_k < size else size for one in how]
    wanted = to_device(most, torch.int64, device).unsqueeze(-1)
    reach = to_device([one.top_p if one.top_p < 1 else math.inf for one in how], torch.float64, device)
    of_all = scaled.logsumexp(-1, keepdim=True) if size in most else torch.zeros((), device=device)
    count = size if scaled.is_cuda else max(_LIKELIEST if k == size else k for k in most)
    while True:
        count = min(count, size)
        values, places = scaled.topk(count) if count < size else scaled.sort(descending=True)
        values = values.masked_fill(torch.arange(count, device=device) >= wanted, -torch.inf)
        every = torch.where(wanted < size, values.logsumexp(-1, keepdim=True), of_all)
        probabilities = (values - every).exp()
        before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
        inside = (before < reach.unsqueeze(-1)) & (values > -torch.inf)
        if count == size or not bool((inside[:, -1] & (wanted.squeeze(-1) > count)).any()):
            inside[:, 0] = True  # whatever the rest is, NaN included
            return places, probabilities.masked_fill(~inside, 0)
        count *= 16
