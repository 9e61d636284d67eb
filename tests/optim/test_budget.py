"""A budget does not count what a process waits for a core."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from optim.budget import MOST_MORE_S, MOST_STRETCH, Budget
from optim.child import Child
from optim.deadline import OutOfTime, run_within

pytestmark = pytest.mark.any_torch

BUSY = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
os.nice(int(sys.argv[2]))
print("ready", flush=True)
seconds = float(sys.argv[3])
while time.process_time() < seconds:
    pass
print("done", flush=True)
sys.stdin.read()
"""


@contextmanager
def busy(nicer: int, seconds: float) -> Iterator[subprocess.Popen[str]]:
    core = str(min(os.sched_getaffinity(0)))
    args = [sys.executable, "-c", BUSY, core, str(nicer), str(seconds)]
    process = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").is_file() or Path("/proc/self/schedstat").read_text().startswith("0 0 0"),
    reason="this system does not tell how long a thread waited for a core",
)
def test_who_waits_for_a_core_has_longer() -> None:
    with busy(0, 1e9), busy(5, 1.0) as gentle:
        found = Budget(60, gentle.pid)
        assert gentle.stdout is not None
        gentle.stdout.readline()
        # Niceness 5 is a weight of 335 beside 1024 (sched(7)): a quarter of the core, four times as long.
        assert found.stretch > 1.5


class Machine:
    """A clock, and threads of which is known how long they ran and waited, by seconds."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.now = folder, 0.0
        patch.setattr("optim.budget.Path", lambda text: folder)
        patch.setattr("optim.budget.time.monotonic", lambda: self.now)

    def write(self, thread: str, ran: float, waited: float) -> None:
        (self.folder / thread).mkdir(exist_ok=True)
        (self.folder / thread / "schedstat").write_text(f"{int(ran * 1e9)} {int(waited * 1e9)} 7\n")

    def end(self, thread: str) -> None:
        (self.folder / thread / "schedstat").unlink()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_all_threads_count_and_only_since_its_begin(machine: Machine) -> None:
    machine.write("1", 1, 9)
    found = Budget(10, 1)
    assert (found.stretch, found.left_s) == (1.0, 10.0), "what was before it does not count"
    machine.now += 8
    assert found.left_s == 2.0, "nobody waited: seconds on the clock"
    machine.write("1", 2, 10)
    machine.write("2", 1, 3)  # a new one
    assert found.stretch == 3.0, "2 s run, 4 waited"
    assert found.left_s == pytest.approx(10 - 8 / 3)
    machine.end("2")
    assert found.stretch == 3.0, "what was seen of it stays"
    machine.write("1", 0.5, 0)
    assert found.stretch == 3.0, "its number went to another thread"
    machine.write("1", 0.5, 10**6)
    assert found.stretch == MOST_STRETCH
    machine.end("1")
    assert found.stretch == MOST_STRETCH, "the process has ended: as it was"


def test_without_such_figures_it_goes_by_the_clock(machine: Machine) -> None:
    found = Budget(10, 1)
    machine.now += 4
    assert (found.stretch, found.left_s) == (1.0, 6.0)


@pytest.mark.parametrize(("seconds", "passed"), [(10, 40), (1000, 1000 + MOST_MORE_S)])
def test_it_waits_until_it_is_spent(machine: Machine, seconds: float, passed: float) -> None:
    def nothing(wait_s: float) -> bool:
        machine.now += wait_s
        machine.write("1", machine.now / 4, machine.now * 3 / 4)  # a quarter of a core
        return False

    assert not Budget(seconds, 1).wait(nothing)
    assert machine.now == pytest.approx(passed, abs=1)


def test_it_looks_once_more_when_it_is_spent(machine: Machine) -> None:
    found = Budget(1, 1)
    machine.now += 2
    assert found.wait(lambda wait_s: wait_s == 0)


@pytest.mark.parametrize("inline", [False, True])
def test_a_call_has_what_is_left_of_a_budget(inline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def doze() -> None:
        while True:
            time.sleep(0.01)

    def nap() -> int:
        time.sleep(2)
        return 7

    monkeypatch.setattr(Budget, "stretch", 10.0)
    assert run_within(1, "test", nap, inline=inline) == 7, "a second lasts ten"
    spent = Budget(0)
    with pytest.raises(OutOfTime, match="had no time left"):
        run_within(spent, "test", doze, inline=inline)


def test_a_child_has_longer_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pt2test_child.py").write_text("""
import os, sys, time
pipe = int(sys.argv[2])
time.sleep(2)
os.write(pipe, b"ready\\n")
time.sleep(2)
os.write(pipe, b"done\\n")
time.sleep(3600)
""")
    monkeypatch.syspath_prepend(tmp_path)

    def told(seconds: float | None, start_s: float) -> tuple[list[bytes], str]:
        child = Child("pt2test_child", tmp_path)
        try:
            return list(child.lines(seconds, start_s)), child.end
        finally:
            child.stop()

    assert told(0.1, 0.1) == ([], "was not ready within 0 s")
    monkeypatch.setattr(Budget, "stretch", 10.0)
    assert told(0.6, 1) == ([b"done"], "did not end within the 1 s it had and was stopped")
