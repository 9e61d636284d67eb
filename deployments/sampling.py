"""`Sampling`: how a request's next token is picked from the logits, the same whatever runs beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

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
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Picked:
    """A token, its log-probability under the model's own distribution, and those of the likeliest, likeliest first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Sampler:
    """Picks one request's tokens, with a generator of its own."""

    sampling: Sampling
    _generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.sampling.seed)

    def pick(self, logits: torch.Tensor) -> Picked:
        """Return the next token. [V], on the CPU."""
        logits = logits.float()
        token = self._pick(logits)
        if self.sampling.logprobs is None:
            return Picked(token)
        logprobs = logits.log_softmax(-1)
        values, tokens = logprobs.topk(min(self.sampling.logprobs, len(logprobs)))
        return Picked(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))

    def _pick(self, logits: torch.Tensor) -> int:
        how = self.sampling
        if how.temperature == 0:
            return int(logits.argmax())
        everything = logits
        if how.temperature != 1:
            # From the likeliest, so that a temperature of next to nothing takes that one and no infinity.
            logits = (logits - logits.max()) / max(how.temperature, _COLDEST)
        tokens = None
        if 0 < how.top_k < len(logits):
            logits, tokens = logits.topk(how.top_k)
        if how.top_p < 1:
            probabilities, places = _nucleus(logits, how.top_p)
            tokens = places if tokens is None else tokens[places]
        else:
            probabilities = logits.softmax(-1)
        # One number decides, however the probabilities were made: where it falls among them.
        total = probabilities.cumsum(-1, dtype=torch.float64)
        if not total[-1].isfinite():  # of an infinite logit, or one that is no number
            return int(everything.argmax())
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * total[-1]
        place = min(int(torch.searchsorted(total, drawn, right=True)), len(total) - 1)
        return place if tokens is None else int(tokens[place])


def _nucleus(logits: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probabilities of the likeliest tokens, as few as reach `top_p`, and where they are. [V] -> [N] each.

    Few are enough as a rule, and finding those is cheap: sorting all of 128,256 took 8 ms, the first 256 of them 0.3.
    """
    every, count = logits.logsumexp(-1), _LIKELIEST
    while True:
        count = min(count, len(logits))
        values, places = logits.topk(count)
        probabilities = (values - every).exp()
        before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
        inside = before < top_p
        if count == len(logits) or not inside[-1]:
            inside[0] = True  # whatever the rest is, NaN included
            return probabilities[inside], places[inside]
        count *= 16
