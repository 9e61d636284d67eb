"""Folders for what a process needs for a while: gone when it is done, or at the next start where it was killed.

What compiles is killed now and then (for memory, or as its version is rolled back), and what lies in such a folder may
be all of a model's weights: each that stayed would take its part of the disk for good.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from optim.locks import Busy, take
from optim.private import NotPrivate, require_private

logger = logging.getLogger(__name__)

#: What a folder's name begins with until its owner has locked it.
_UNLOCKED = "new-"


class Scratch:
    """A folder that only this user can use (mode 0700), under the folder for temporary files.

    It is removed at the end of a `with` block, by `remove`, when this object goes, or as the process ends by itself.
    The system drops the lock of an owner that was killed; whoever makes a folder next removes what has none.
    """

    def __init__(self, what_for: str) -> None:
        self.path, lock = _make(what_for)
        self._remove = weakref.finalize(self, _remove, self.path, lock)

    def remove(self) -> None:
        """Remove it now, if it is still there."""
        self._remove()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def _make(what_for: str) -> tuple[Path, int | None]:
    # Of this kernel alone: on a network file system the locks of other nodes are not seen.
    home = Path(tempfile.gettempdir()) / f"pt2-scratch-{os.getuid()}-{_kernel()}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        require_private(home)
        for left in _ownerless(home):
            logger.info("removing what a process that was killed has left: %s", left)
            shutil.rmtree(left, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=f"{_UNLOCKED}{what_for}-", dir=home))
        with ExitStack() as undo:
            undo.callback(made.rmdir)
            lock = _lock(made)
            undo.callback(os.close, lock)
            path = made.rename(home / made.name.removeprefix(_UNLOCKED))
            undo.pop_all()
        return path, lock
    except (OSError, Busy, NotPrivate) as error:  # somebody else's folder, or a file system without locks
        logger.warning("a temporary folder stays if this process is killed: %s", error)
        return Path(tempfile.mkdtemp(prefix=f"pt2-{what_for}-")), None


def _kernel() -> str:
    """Return what tells this boot of this machine from all others, and which its containers share."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    except OSError:  # no Linux
        return platform.node()


def _ownerless(home: Path) -> Iterator[Path]:
    for path in home.iterdir():
        if not path.name.startswith(_UNLOCKED):
            with suppress(OSError, Busy):  # it is locked, or has just gone
                os.close(_lock(path))
                yield path


def _lock(folder: Path) -> int:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        take(lock, fcntl.LOCK_EX)
    except (OSError, Busy):
        os.close(lock)
        raise
    return lock


def _remove(path: Path, lock: int | None) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        os.close(lock)
