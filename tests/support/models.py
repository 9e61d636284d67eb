"""Small modules for tests, and the examples that go with them."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import nn


class Mlp(nn.Module):
    """[B, 8] -> [B, 4]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)  # type: ignore[no-any-return]


class SmallCnn(nn.Module):
    """[B, 3, 16, 16] -> [B, 5]; pads before its convolution as EfficientNet does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pad = nn.ZeroPad2d(1)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.conv(self.pad(image))))
        return self.head(hidden.mean((2, 3)))  # type: ignore[no-any-return]


class SlowMlp(Mlp):
    """As Mlp; takes 20 ms in Python, which no export has: what was exported wins by far."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return super().forward(features)


class SlowCnn(SmallCnn):
    """As SmallCnn; takes 20 ms in Python."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return super().forward(image)


class MaskedMean(nn.Module):
    """Token ids [B, T] and mask [B, T] -> {"mean": [B, 6], "tokens": [B, T, 6]}; padding does not count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 6)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = mask.unsqueeze(-1).float()
        tokens = self.embed(ids) * weights
        return {"mean": tokens.sum(1) / weights.sum(1).clamp(min=1), "tokens": tokens}


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Nested(nn.Module):
    """[B, 8] -> a named tuple inside a tuple, beside a constant."""

    def forward(self, x: torch.Tensor) -> tuple[Pair, list[torch.Tensor], str]:
        return Pair(x * 2, x.sum(1)), [x + 1], "done"


class Branchy(nn.Module):
    """[B, 8] -> [B, 8]; which way it goes depends on the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x * 2
        return x - 1


class Counting(nn.Module):
    """[B, 8] -> [B, 8]; counts its calls in a buffer."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x + self.calls


class Noisy(nn.Module):
    """[B, 8] -> [B, 8]; never the same answer twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class Centering(nn.Module):
    """[B, 8] -> [B, 8]; every row depends on its neighbours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0, keepdim=True)


class Noop(nn.Module):
    """[B, 8] -> [B, 8]; nothing is faster than this."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Failing(nn.Module):
    """Raises on every input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("this model never works")


def features(batch_size: int, length: int | None = None) -> tuple[torch.Tensor, ...]:
    """An example for the modules that take [B, 8]."""
    generator = torch.Generator().manual_seed(batch_size)
    return (torch.randn((batch_size, 8), generator=generator),)


def images(batch_size: int, length: int | None = None) -> tuple[torch.Tensor, ...]:
    """An example for SmallCnn."""
    generator = torch.Generator().manual_seed(batch_size)
    return (torch.randn((batch_size, 3, 16, 16), generator=generator),)


def tokens(batch_size: int, length: int | None = None) -> tuple[torch.Tensor, ...]:
    """An example for MaskedMean: full rows."""
    assert length is not None
    generator = torch.Generator().manual_seed(batch_size * 1000 + length)
    ids = torch.randint(1, 50, (batch_size, length), generator=generator)
    return ids, torch.ones_like(ids)


def make_mlp(**kwargs: Any) -> nn.Module:
    """A factory for TensorModel."""
    return Mlp(**kwargs)
