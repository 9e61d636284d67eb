"""Servables for tests, named by import path as a user's own would be."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import nn

from deployments.servable import Servable
from optim.shapes import Inputs
from tests.support import backends, models

assert backends.BACKENDS  # importing it registers them, before the configuration is checked


class Tiny(Servable):
    """A row of eight numbers in, four and the replica's pid out."""

    def load(self) -> nn.Module:
        return models.Mlp().eval()

    def example(self, batch_size: int, length: int | None) -> Inputs:
        return models.features(batch_size)

    def preprocess(self, payload: Any) -> Inputs:
        if payload == "explode":
            raise RuntimeError("this servable has a bug")
        return (torch.tensor(payload, dtype=torch.float32),)

    def postprocess(self, output: torch.Tensor) -> dict[str, Any]:
        return {"values": output.tolist(), "pid": os.getpid()}


class Picky(nn.Module):
    """[B, 8] -> [B, 8]; raises where a row holds the number 13, and takes its time where asked to."""

    def __init__(self, delay_s: float = 0.0) -> None:
        super().__init__()
        self.delay_s = delay_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.delay_s)
        if bool((x == 13).any()):
            raise ValueError("thirteen is unlucky")
        return x * 2


class Fragile(nn.Module):
    """[B, 8] -> [B, 8]; where a row holds 666, the device is gone from then on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x == 666).any()):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return x * 2


class FragileServable(Servable):
    """Serves Fragile eager, and says from which process."""

    def load(self) -> nn.Module:
        return Fragile().eval()

    def example(self, batch_size: int, length: int | None) -> Inputs:
        return models.features(batch_size)

    def preprocess(self, payload: Any) -> Inputs:
        return (torch.tensor(payload, dtype=torch.float32),)

    def postprocess(self, output: torch.Tensor) -> dict[str, Any]:
        return {"values": output.tolist(), "pid": os.getpid()}


class Rolling(FragileServable):
    """Takes its time for each run; fails to load where it is told to."""

    def __init__(self, delay_s: float = 0.0, fails: bool = False) -> None:
        self._delay_s, self._fails = delay_s, fails

    def load(self) -> nn.Module:
        if self._fails:
            raise RuntimeError("these weights are broken")
        return Picky(self._delay_s).eval()


class PickyServable(Servable):
    """Serves Picky eager."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self._delay_s = delay_s

    def load(self) -> nn.Module:
        return Picky(self._delay_s).eval()

    def example(self, batch_size: int, length: int | None) -> Inputs:
        return models.features(batch_size)

    def preprocess(self, payload: Any) -> Inputs:
        return (torch.tensor(payload, dtype=torch.float32),)


class _Mix(nn.Module):
    """Doubles, negates or counts on, each input by its dtype. [B, 4], [B, 4], [B], [B] -> the same."""

    def forward(
        self, half: torch.Tensor, brain: torch.Tensor, flag: torch.Tensor, count: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return half * 2, brain * 2, ~flag, count + 1


class Mixed(Servable):
    """Four dtypes in, the same four out; over /predictions only the number counts."""

    output_names = ("half_out", "brain_out", "flag_out", "count_out")

    def load(self) -> nn.Module:
        return _Mix().eval()

    def example(self, batch_size: int, length: int | None) -> Inputs:
        values = torch.arange(batch_size * 4).reshape(batch_size, 4)
        return values.half(), values.bfloat16(), values[:, 0] > 4, values[:, 0].clone()

    def preprocess(self, payload: Any) -> Inputs:
        number = int(payload)
        return torch.full((4,), number).half(), torch.zeros(4).bfloat16(), torch.tensor(True), torch.tensor(number)
