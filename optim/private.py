"""Folders that are safe to load code from: this user's, with nobody else able to put files there."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


class NotPrivate(Exception):
    """Somebody else could have put files there; the message is the reason."""


def require_private(path: Path) -> None:
    """Raise NotPrivate where somebody else could have put files into a folder, OSError where there is none.

    The folders above it are not looked at: Kubernetes' emptyDir, where caches of containers are, can be written by all
    and has no sticky bit, and nobody else is there (issue 5).
    """
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotPrivate(f"{path} is not a folder")
    if found.st_uid != os.getuid():
        raise NotPrivate(f"{path} belongs to user {found.st_uid}, not to {os.getuid()}")
    if found.st_mode & 0o022:
        raise NotPrivate(f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):o}); remove it")


def why_unusable(folder: Path) -> str | None:
    """Make a folder for code, that this user alone can write to; return why it cannot be used as one, if so."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_private(folder)
        if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):  # as `docker run --tmpfs` mounts it
            return f"{folder} is mounted noexec, so that no library can be loaded from it"
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"
    except NotPrivate as error:
        return str(error)
