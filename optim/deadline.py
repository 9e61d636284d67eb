"""Bounding what a compiler may take: a call that hangs is interrupted, or left behind, and never waited for."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from optim.budget import Budget

T = TypeVar("T")

#: How long an interrupted call may take to unwind before it is left behind, seconds.
GRACE_S = 2.0

_stuck: dict[threading.Thread, str] = {}


class OutOfTime(Exception):
    """A build or warm-up did not end in time; the message says whether its thread could be stopped."""


class _Interrupted(BaseException):
    """Raised inside the thread that overran; a BaseException, so that no compiler takes it for a failed attempt."""


def stuck_calls() -> tuple[str, ...]:
    """Return the calls left behind that hang still: they may hold Dynamo's lock, so nothing else can compile here."""
    return tuple(what for thread, what in _stuck.items() if thread.is_alive())


def run_within(limit: Budget | float, what: str, function: Callable[[], T], *, inline: bool = False) -> T:
    """Run a function on a helper thread and return its result; OutOfTime where it takes longer than a limit.

    The limit is in seconds from now on, or what is left of a budget. On a time-out its child processes (a hanging C++
    compiler) are ended and an exception is raised in the thread. A thread that sits in a C call stays; it is a daemon,
    is named in `stuck_calls`, and the caller goes on without it.
    `inline` runs it on the calling thread, as CUDA graphs need it (their state belongs to the thread); there
    only Python code and child processes can be interrupted.
    """
    budget = Budget.of(limit)
    seconds = budget.left_s
    if seconds <= 0:
        raise OutOfTime("had no time left")
    if inline:
        return _run_inline(budget, seconds, what, function)
    box: list[Any] = []
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

    def call() -> None:
        try:
            torch.set_num_threads(threads)  # a new thread starts with OpenMP's own number
            with torch.set_grad_enabled(grad):
                box.append((True, function()))
        except BaseException as error:  # handed over, whatever it is
            box.append((False, error))

    thread = threading.Thread(target=call, name=f"optim: {what}", daemon=True)
    thread.start()

    def has_ended(wait_s: float) -> bool:
        thread.join(wait_s)
        return not thread.is_alive()

    if not budget.wait(has_ended):
        _interrupt(thread, set())
        if not Budget(GRACE_S).wait(has_ended):
            _stuck[thread] = what
            raise OutOfTime(f"did not end within the {seconds:.0f} s it had and cannot be stopped: its thread stays")
        if not box or not box[0][0]:
            raise OutOfTime(f"did not end within the {seconds:.0f} s it had and was stopped")
    worked, result = box[0]
    if worked:
        return result  # type: ignore[no-any-return]
    raise result


def _run_inline(budget: Budget, seconds: float, what: str, function: Callable[[], T]) -> T:
    me, done = threading.current_thread(), threading.Event()
    before = _children(me)
    fired: list[bool] = []

    def watch() -> None:
        if not budget.wait(done.wait):
            fired.append(True)
            _interrupt(me, before)

    watcher = threading.Thread(target=watch, name=f"optim: watches {what}", daemon=True)
    watcher.start()
    try:
        try:
            result = function()
        finally:
            done.set()
            watcher.join()
            # Where the call ended as the watcher fired, the exception is still on its way: take it here.
            if fired:
                _absorb()
    except BaseException as error:
        if fired and not isinstance(error, KeyboardInterrupt | SystemExit):
            raise OutOfTime(f"did not end within the {seconds:.0f} s it had and was stopped") from error
        raise
    return result


def _absorb() -> None:
    end = time.monotonic() + 0.1
    try:
        while time.monotonic() < end:
            time.sleep(0.001)
    except _Interrupted:
        return


def _interrupt(thread: threading.Thread, before: set[int]) -> None:
    """End the child processes that the thread has started since, and raise in it as soon as it runs Python code."""
    for pid in _children(thread) - before:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended by itself
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Interrupted))


def _children(thread: threading.Thread) -> set[int]:
    """Return the child processes that a thread has started (Linux; elsewhere none are seen)."""
    try:
        return set(map(int, Path(f"/proc/self/task/{thread.native_id}/children").read_text().split()))
    except OSError:
        return set()
