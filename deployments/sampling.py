"""`Sampling`: how a request's next token is picked from the logits, the same whatever runs beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


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
        # From the likeliest, so that a temperature of next to nothing takes that one and no infinity.
        logits = (logits - logits.max()).double() / how.temperature
        # Sorted, so that what is left is what comes first; a whole vocabulary is sorted only where it has to be.
        kept = min(how.top_k, len(logits)) if how.top_k else len(logits)
        if kept == len(logits) and how.top_p >= 1:
            probabilities, tokens = logits.softmax(-1), None
        else:
            values, tokens = logits.topk(kept)
            probabilities = values.softmax(-1)
            if how.top_p < 1:
                kept_up_to = (probabilities.cumsum(-1) - probabilities) < how.top_p
                kept_up_to[0] = True  # whatever the rest is, NaN included
                probabilities = probabilities[kept_up_to]
        # One number decides, however the probabilities were made: where it falls among them.
        total = probabilities.double().cumsum(-1)
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * total[-1]
        place = min(int(torch.searchsorted(total, drawn, right=True)), len(total) - 1)
        return place if tokens is None else int(tokens[place])
