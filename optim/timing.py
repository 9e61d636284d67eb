"""Timing callables against each other: interleaved, so that drift of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def time_in_turn(
    runs: Sequence[Callable[..., Any]],
    inputs: Sequence[torch.Tensor],
    device: torch.device,
    *,
    min_rounds: int = 5,
    max_rounds: int = 50,
    budget_s: float = 0.5,
) -> list[float]:
    """Return the median ms of each callable over rounds in which each runs once.

    Rounds go on to `max_rounds`, or until `budget_s` is spent and `min_rounds` are done.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    started = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - started > budget_s:
            break
        for run, taken in zip(runs, seconds, strict=True):
            _wait(device)
            begin = time.perf_counter()
            run(*inputs)
            _wait(device)
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) * 1e3 for taken in seconds]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
