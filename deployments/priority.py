"""What starts lets what serves go first.

`make serve` starts all of Ray nicer than what serves (where the system lets processes come back from there), so that
also what Ray does before our code runs (an interpreter, its imports), and beside it, takes little from requests: a
replica comes forward when it is ready (before, where nothing else serves its model: `outage`), and with it Ray Serve's
processes that requests pass through or replicas need.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from deployments.processes import children, title

logger = logging.getLogger(__name__)
#: How much nicer than usual a start is: a core that both want is then shared 9 to 1 (Linux's weights, sched(7)).
NICER = 10
#: The environment variable that says how nice what serves is, where everything else of Ray is nicer.
SERVING = "PT2_SERVE_NICENESS"
#: Titles of what requests pass through (also while Ray Serve builds a new version: then in Python) and of what looks
#: after replicas.
_ON_THE_WAY = re.compile(r"ray::(ServeController|ProxyActor|HAProxyManager)\b")


@contextmanager
def last_in_line() -> Iterator[bool]:
    """Let other processes go first for the length of a block; yield whether that is so.

    It is not where the system would not let this process come back to its priority: Linux asks for CAP_SYS_NICE or
    RLIMIT_NICE. Only Linux has a priority for each thread; those started meanwhile inherit it.
    """
    usual = _usual()
    if not may_come_back(usual):
        yield False
        return
    _set_all(usual + NICER)
    try:
        yield True
    finally:
        _set_all(usual)


def come_forward() -> None:
    """Give this process the priority of what serves, if it started nicer and the system lets it."""
    usual = _usual()
    if os.getpriority(os.PRIO_PROCESS, 0) > usual and may_come_back(usual):
        _set_all(usual)


@contextmanager
def thread_last_in_line() -> Iterator[bool]:
    """Let other threads go first for the length of a block, also those of this process; yield whether that is so.

    What this thread starts meanwhile inherits that, and is brought back to the process's priority at the end.
    """
    usual, own = os.getpriority(os.PRIO_PROCESS, os.getpid()), threading.get_native_id()
    if not may_come_back(usual):
        yield False
        return
    before = _threads()
    os.setpriority(os.PRIO_PROCESS, own, usual + NICER)
    try:
        yield True
    finally:
        os.setpriority(os.PRIO_PROCESS, own, usual)
        _set_all(usual, but=before)


def bring_forward_what_serves() -> None:
    """Give Ray Serve's processes on this node, if they started nicer, the priority of what serves.

    They are found as children of the raylet whose child this process is; HAProxy is a child of one of them.
    """
    usual = os.environ.get(SERVING)
    if usual is None or not may_come_back(int(usual)):
        return
    found = [process for process in children(os.getppid()) if _ON_THE_WAY.match(title(process))]
    for process in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            found += children(process)
            if os.getpriority(os.PRIO_PROCESS, process) > int(usual):
                _set_all(int(usual), process)


def last_in_line_for_good() -> None:
    """Let other processes go first from now on, if they do not yet: for a process that ends with what it does."""
    if sys.platform == "linux" and SERVING not in os.environ:
        _set_all(min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICER))


def may_come_back(usual: int) -> bool:
    """Return whether a process may return to a niceness; tried with a thread that does nothing else."""
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


def _usual() -> int:
    return int(os.environ.get(SERVING, os.getpriority(os.PRIO_PROCESS, 0)))


def _threads(process: int | None = None) -> set[int]:
    try:
        return {int(task.name) for task in Path(f"/proc/{process or os.getpid()}/task").iterdir()}
    except FileNotFoundError:  # it has ended
        return set()


def _set_all(nice: int, process: int | None = None, but: Set[int] = frozenset()) -> None:
    """Set the priority of every other thread of a process (this one), also of those that start while it is done."""
    done = set(but)
    while new := _threads(process) - done:
        for thread in new:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, thread, nice)
        done |= new
