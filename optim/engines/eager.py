"""The eager engines: the module itself, the reference for numbers and for speed, and a copy in channels_last."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from optim.buckets import Bucket
from optim.engines.base import Engine, Runner, Unavailable

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


class EagerEngine(Engine):
    """Runs the module as it is."""

    name = "eager"
    keeps_state = True

    def compile(self, bucket: Bucket) -> Runner:
        """Return the module."""
        return self.job.module


class ChannelsLastEngine(Engine):
    """Runs a copy of the module eager, its weights and images in channels_last."""

    name = "channels_last"
    settles_at_once = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._copy: nn.Module | None = None

    def preflight(self) -> None:
        """Look for 2-d convolutions, which alone gain by it, and for settings that eager code does not have."""
        if not has_convolutions(self.job.module):
            raise Unavailable("the module has no 2-d convolutions")
        if self.job.autocast:
            raise Unavailable("autocast is for compiled code; eager stays float32")

    def build(self) -> None:
        """Copy the module: the reference stays what it was."""
        self._copy = copy.deepcopy(self.job.module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compile(self, bucket: Bucket) -> Runner:
        """Return the copy, fed images in channels_last."""
        module = self._copy
        assert module is not None, "build() comes first"
        return lambda *inputs: module(*to_channels_last(inputs))

    def close(self) -> None:
        """Drop the copy."""
        self._copy = None


def has_convolutions(module: nn.Module) -> bool:
    """Say whether channels_last may help."""
    return any(isinstance(m, CONVOLUTIONS) for m in module.modules())


def to_channels_last(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Bring images into channels_last: TorchServe converted weights only, and every call paid a reorder."""
    return tuple(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs)
