"""Locks between processes that the system drops with their owner: files, locked by flock(2)."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_SAY_AFTER_S = 10.0


class Busy(Exception):
    """Another process has the lock, and waiting was not wanted."""


@dataclass(frozen=True)
class Waiting:
    """What is waited for, and for how many seconds at most."""

    what_for: str
    patience_s: float


@contextmanager
def open_lock(path: Path) -> Iterator[int]:
    """Open a file to be locked, which is made if need be; OSError where it can be neither made nor read."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        # A container's image that `make ahead` has filled: its files can be locked all the same.
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield lock
    finally:
        os.close(lock)


def take(lock: int, how: int, waiting: Waiting | None = None) -> None:
    """Lock an open file; TimeoutError (an OSError) once patience is out, Busy at once without `waiting`."""
    started = time.monotonic()
    said = started
    while True:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if waiting is None:
                raise Busy("another process has its lock") from None
            now = time.monotonic()
            if now - started > waiting.patience_s:
                raise TimeoutError(f"it has waited {now - started:.0f} s for {waiting.what_for}") from None
            if now - said > _SAY_AFTER_S:
                logger.info("waiting for %s (%.0f s so far)", waiting.what_for, now - started)
                said = now
            time.sleep(_POLL_S)
