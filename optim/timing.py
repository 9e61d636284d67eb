"""Timing callables against each other: in turn, so that drift of the machine hits all of them."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from optim.device import set_threads

#: A call shorter than this is disturbed by the threads of the engine before it, which spin on for milliseconds (tried,
#: two threads, MiniLM at 1 x 64: ONNX Runtime 10.4 ms by itself and 17.9 right after eager). Requests meet one
#: engine alone, so such calls come in blocks, whose first one is not counted.
_SETTLE_S = 0.05
_BLOCK = 4


def time_in_turn(
    runs: Sequence[Callable[..., Any]],
    inputs: Sequence[torch.Tensor],
    device: torch.device,
    *,
    min_rounds: int = 5,
    max_rounds: int = 20,
    budget_s: float = 0.8,
    pause_s: float = 0.002,
) -> list[float]:
    """Return the median ms of each callable over rounds in which each has its turn: a few calls, or one long one.

    Before a block of short calls `pause_s` is waited for the threads of the one before to come to rest.
    Rounds go on to `max_rounds`, or until `budget_s` is spent and `min_rounds` are done.
    """
    estimates = [_time(run, inputs, device) for run in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    started = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - started > budget_s:
            break
        for run, estimate, taken in zip(runs, estimates, seconds, strict=True):
            if estimate >= _SETTLE_S:
                taken.append(_time(run, inputs, device))
            else:
                time.sleep(pause_s)
                taken += [_time(run, inputs, device) for _ in range(_BLOCK)][1:]
    return [statistics.median(taken) * 1e3 for taken in seconds]


def time_streams(
    whole: Callable[..., Any],
    beside: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    count: int,
    threads: int,
    *,
    rounds: int = 5,
    budget_s: float = 0.25,
) -> tuple[float, float]:
    """Return the median ms of `whole` on all threads, and of `beside` while `count` threads call it, in turn.

    Each of them gives torch `threads`. CPU only. Two rounds at least; further ones, up to `rounds`, in `budget_s`.
    """
    device, before = torch.device("cpu"), torch.get_num_threads()
    start = threading.Barrier(count)

    def block() -> list[float]:
        start.wait()
        with torch.no_grad():
            return [_time(beside, inputs, device) for _ in range(_BLOCK)]

    alone: list[float] = []
    together: list[float] = []
    with ThreadPoolExecutor(count, initializer=set_threads, initargs=(threads,)) as pool:
        started = time.perf_counter()
        for done in range(rounds):
            if done >= 2 and time.perf_counter() - started > budget_s:
                break
            time.sleep(0.002)
            alone += [_time(whole, inputs, device) for _ in range(_BLOCK)][1:]
            blocks = [future.result() for future in [pool.submit(block) for _ in range(count)]]
            # The first call meets what the block before left spinning; the last may be alone.
            together += [seconds for taken in blocks for seconds in taken[1:-1]]
    set_threads(before)  # for threads to come, which begin with the number that was set last
    return statistics.median(alone) * 1e3, statistics.median(together) * 1e3


def _time(run: Callable[..., Any], inputs: Sequence[torch.Tensor], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    run(*inputs)
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
