"""A budget does not count what a process waits for a core."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from optim.budget import MOST_STRETCH, Budget

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


def busy(nicer: int, seconds: float) -> subprocess.Popen[str]:
    core = str(min(os.sched_getaffinity(0)))
    args = [sys.executable, "-c", BUSY, core, str(nicer), str(seconds)]
    process = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").is_file() or Path("/proc/self/schedstat").read_text().startswith("0 0 0"),
    reason="this system does not tell how long a thread waited for a core",
)
def test_who_waits_for_a_core_has_longer() -> None:
    with busy(0, 1e9) as greedy, busy(5, 1.0) as gentle:
        try:
            assert gentle.stdout is not None
            found = Budget(60, gentle.pid)
            gentle.stdout.readline()
            # Niceness 5 is a weight of 335 beside 1024 (sched(7)): a quarter of the core, four times as long.
            assert found.stretch > 2
        finally:
            greedy.kill()
            gentle.kill()


def write(folder: Path, thread: str, ran: int, waited: int) -> None:
    (folder / thread).mkdir(exist_ok=True)
    (folder / thread / "schedstat").write_text(f"{ran} {waited} 7\n")


def test_all_threads_count_and_only_since_its_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("optim.budget.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("optim.budget.Path", lambda text: tmp_path)
    write(tmp_path, "1", 1000, 9000)
    found = Budget(10)
    assert (found.stretch, found.left_s) == (1.0, 10.0), "what was before it does not count"
    clock[0] += 8
    assert found.left_s == 2.0, "nobody waited: seconds on the clock"
    write(tmp_path, "1", 2000, 10_000)
    write(tmp_path, "2", 1000, 3000)  # a new one
    assert found.stretch == 3.0, "2000 ns run, 4000 waited"
    assert found.left_s == pytest.approx(10 - 8 / 3)
    write(tmp_path, "2", 1001, 10**9)
    assert found.stretch == MOST_STRETCH
    for thread in ("1", "2"):
        (tmp_path / thread / "schedstat").unlink()
    assert found.stretch == MOST_STRETCH, "it has ended: as it was last"


def test_without_such_figures_it_goes_by_the_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("optim.budget.Path", lambda text: tmp_path / "nothing")
    assert Budget(10).stretch == 1.0


def test_it_waits_until_it_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("optim.budget.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("optim.budget.Path", lambda text: tmp_path)

    def nothing(seconds: float) -> bool:
        clock[0] += seconds
        write(tmp_path, "1", int(clock[0] * 1e9), int(clock[0] * 3e9))  # a quarter of a core
        return False

    assert not Budget(10).wait(nothing)
    assert clock[0] == pytest.approx(40, abs=1)
    before = clock[0]
    assert Budget(10).wait(lambda seconds: True)
    assert clock[0] == before
