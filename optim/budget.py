"""Seconds that a compiler or a race may take, of which those do not count that it waited for a core."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

#: The most that a budget is stretched, and the most seconds that it lasts longer: also where nothing is got done,
#: somebody waits for the start.
MOST_STRETCH = 10.0
MOST_MORE_S = 600.0
#: How often threads are looked at while they are waited for: what one did since the last look is lost when it ends.
_LOOK_S = 1.0
_LEAST_WAIT_S = 0.05


class _Tally:
    """How long the threads of a process have run, and how long they have waited for a core, ns, as far as seen.

    Linux's schedstat tells it thread by thread, and no more once a thread has ended.
    """

    def __init__(self, pid: int | None) -> None:
        self._folder = Path("/proc/self/task" if pid is None else f"/proc/{pid}/task")
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[int, int]] = {}
        self._ran = self._waited = 0

    def look(self) -> tuple[int, int]:
        """Look at the threads that there are, and return the sums."""
        found = {}
        with self._lock:
            try:
                for path in self._folder.iterdir():
                    with suppress(OSError):  # the thread has ended
                        ran, waited, _ = map(int, (path / "schedstat").read_text().split())
                        found[path.name] = ran, waited
            except OSError:  # the process has ended, or this is no Linux
                return self._ran, self._waited
            for thread, (ran, waited) in found.items():
                ran_before, waited_before = self._seen.get(thread, (0, 0))
                # Less than before: another thread has got the number.
                self._ran += max(ran - ran_before, 0)
                self._waited += max(waited - waited_before, 0)
            self._seen = found
            return self._ran, self._waited


_own = _Tally(None)


class Budget:
    """So many seconds from now on, stretched by how much longer a process takes because its threads wait for cores.

    A replica that starts beside a model under load gives way to it: in 60 s on the clock it may get no more done than
    in six on a machine of its own, and what had no time would be served eager (issue 5). `pid` is another process,
    else it is this one. Where the system does not tell what threads waited for, seconds are those on the clock.
    """

    def __init__(self, seconds: float, pid: int | None = None) -> None:
        self.seconds = seconds
        self._tally = _own if pid is None else _Tally(pid)
        self._before = self._tally.look()
        self._started = time.monotonic()

    @classmethod
    def of(cls, limit: Budget | float) -> Budget:
        """Return a budget as it is, or one of so many seconds from now on."""
        return limit if isinstance(limit, Budget) else cls(limit)

    @property
    def stretch(self) -> float:
        """How much longer things have taken so far than they would have with cores of their own, at most ten times."""
        ran, waited = (now - before for now, before in zip(self._tally.look(), self._before, strict=True))
        return min(1 + waited / ran, MOST_STRETCH) if ran else 1.0

    @property
    def left_s(self) -> float:
        """What is left of it, 0 or less where it is spent."""
        passed = time.monotonic() - self._started
        return self.seconds - max(passed / self.stretch, passed - MOST_MORE_S)

    def wait(self, wait: Callable[[float], bool]) -> bool:
        """Call `wait` with seconds that it may take, until it returns true or the budget is spent; return whether."""
        while (left := self.left_s) > 0:
            if wait(min(max(left, _LEAST_WAIT_S), _LOOK_S)):
                return True
        return wait(0)
