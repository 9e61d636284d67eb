"""A replica that starts lets those that serve go first."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)
#: How much nicer than usual a start is: a core that both want is then shared 9 to 1 (Linux's weights, sched(7)).
_NICER = 10


@contextmanager
def last_in_line() -> Iterator[bool]:
    """Let other processes go first for the length of a block; yield whether that is so.

    It is not where the system would not let this process come back to its priority: Linux asks for CAP_SYS_NICE or
    RLIMIT_NICE. Only Linux has a priority for each thread; those started meanwhile inherit it.
    """
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    if not _may_come_back(usual):
        yield False
        return
    _set_all(usual + _NICER)
    try:
        yield True
    finally:
        _set_all(usual)


@contextmanager
def thread_last_in_line() -> Iterator[bool]:
    """Let other threads go first for the length of a block, also those of this process; yield whether that is so.

    What this thread starts meanwhile inherits that, and is brought back to the process's priority at the end.
    """
    usual, own = os.getpriority(os.PRIO_PROCESS, os.getpid()), threading.get_native_id()
    if not _may_come_back(usual):
        yield False
        return
    before = _threads()
    os.setpriority(os.PRIO_PROCESS, own, usual + _NICER)
    try:
        yield True
    finally:
        os.setpriority(os.PRIO_PROCESS, own, usual)
        _set_all(usual, but=before)


def _may_come_back(usual: int) -> bool:
    """Try it with a thread that does nothing else."""
    if sys.platform != "linux":
        return False
    found = []

    def attempt() -> None:
        own = threading.get_native_id()
        try:
            os.setpriority(os.PRIO_PROCESS, own, usual + 1)
            os.setpriority(os.PRIO_PROCESS, own, usual)
        except PermissionError:
            return
        found.append(True)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return bool(found)


def _threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def _set_all(nice: int, but: Set[int] = frozenset()) -> None:
    """Set the priority of every other thread of this process, also of those that start while it is done."""
    done = set(but)
    while new := _threads() - done:
        for thread in new:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, thread, nice)
        done |= new
