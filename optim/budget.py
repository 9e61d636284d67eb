"""Seconds that a compiler or a race may take, of which those do not count that it waited for a core."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

#: The most that a budget lasts longer than its seconds: also where nothing is got done, somebody waits for the start.
MOST_STRETCH = 10.0
_LEAST_WAIT_S = 0.05


class Budget:
    """So many seconds from now on, stretched by how much longer a process takes because others have the cores.

    A replica that starts beside a model under load gives way to it: in 60 s on the clock it may get no more done than
    in six on a machine of its own, and what had no time would be served eager (issue 5). `pid` is another process,
    else it is this one. Where the system does not tell what threads waited for, seconds are those on the clock.
    """

    def __init__(self, seconds: float, pid: int | None = None) -> None:
        self.seconds = seconds
        self._threads = Path("/proc/self/task" if pid is None else f"/proc/{pid}/task")
        self._before = self._read()
        self._started = time.monotonic()
        self._stretch = 1.0

    @property
    def stretch(self) -> float:
        """How much longer things have taken so far than they would have without others, 1 to `MOST_STRETCH`."""
        ran = waited = 0
        for thread, (its_run, its_wait) in self._read().items():
            run_before, wait_before = self._before.get(thread, (0, 0))
            ran += its_run - run_before
            waited += its_wait - wait_before
        if ran > 0:  # else the process has ended
            self._stretch = min(1 + waited / ran, MOST_STRETCH)
        return self._stretch

    @property
    def spent_s(self) -> float:
        """What is spent of it, which may be more than all."""
        return (time.monotonic() - self._started) / self.stretch

    @property
    def left_s(self) -> float:
        """What is left of it, below 0 where it is spent; at least as long it lasts."""
        return self.seconds - self.spent_s

    def wait(self, wait: Callable[[float], bool]) -> bool:
        """Call `wait` with seconds that it may take, until it returns true or the budget is spent; return whether."""
        while (left := self.left_s) > 0:
            if wait(max(left, _LEAST_WAIT_S)):
                return True
        return False

    def _read(self) -> dict[str, tuple[int, int]]:
        """Return for each thread how long it ran and how long it waited for a core, ns (Linux, sched-stats)."""
        found = {}
        with suppress(OSError):  # the process has ended, or this is no Linux
            for path in self._threads.iterdir():
                with suppress(OSError):  # the thread has ended
                    ran, waited, _ = map(int, (path / "schedstat").read_text().split())
                    found[path.name] = ran, waited
        return found
