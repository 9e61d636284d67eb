"""Temporary folders: whose owner was killed, they go at the next start; whose owner lives, they stay."""

from __future__ import annotations

import errno
import fcntl
import gc
import logging
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from optim.scratch import Scratch

ROOT = Path(__file__).parents[2]
OWNER = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from optim.scratch import Scratch
scratch = Scratch("test")
(scratch.path / "weights").write_bytes(b"1")
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_ones_own_and_goes_with_its_block() -> None:
    with Scratch("test") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        (folder / "weights").write_bytes(b"1")
    assert not folder.exists()


def test_it_goes_when_nobody_holds_it() -> None:
    held = Scratch("test")
    path = held.path
    del held
    gc.collect()
    assert not path.exists()


def test_what_the_killed_left_goes_and_what_the_living_have_stays(place: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(place)]
    owners = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        paths = [Path(owner.stdout.readline().strip()) for owner in owners if owner.stdout]
        owners[0].kill()
        owners[0].wait()
        assert all((path / "weights").exists() for path in paths), "else this shows nothing"
        with Scratch("test") as ours, Scratch("test") as another:
            assert not paths[0].exists()
            assert (paths[1] / "weights").exists()
            assert ours.is_dir() and another.is_dir(), "a process does not take its own for somebody's"
    finally:
        for owner in owners:
            owner.communicate()  # which ends the other one
    assert not paths[1].exists()


def test_a_place_that_others_can_write_to_is_not_used(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Scratch("test") as folder:
        home = folder.parent
    home.chmod(0o777)
    with caplog.at_level(logging.WARNING), Scratch("test") as folder:
        assert folder.parent == place
    assert "can be written by others" in caplog.text
    assert not folder.exists()


def test_what_locks_it_first_stops_nobody(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As systemd-tmpfiles does while it looks for what is old."""
    real = tempfile.mkdtemp
    locks = []

    def make_and_lock(*args: str, **more: str) -> str:
        path = real(*args, **more)
        locks.append(os.open(path, os.O_RDONLY))
        fcntl.flock(locks[-1], fcntl.LOCK_EX)
        return path

    monkeypatch.setattr("tempfile.mkdtemp", make_and_lock)
    with Scratch("test") as folder:
        assert folder.parent == place
    for lock in locks:
        os.close(lock)


def test_without_locks_nothing_is_taken_for_ownerless(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Scratch("test") as theirs:

        def lock(descriptor: int, how: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", lock)
        with Scratch("test") as folder:
            assert theirs.is_dir()
            assert folder.parent == place
            assert list(theirs.parent.iterdir()) == [theirs]
    assert "No locks available" in caplog.text
