"""The compile cache: folders of what compiling left, proven whole before they are trusted.

Every entry is a folder that appears at once (a rename) with a manifest of its files' hashes. A lock file a name keeps
those who need the same entry apart: one makes it, the others wait; the system drops a dead owner's lock.
Artifacts are code, so nothing is read from where others than this user can write.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from optim.locks import Busy, Waiting, open_lock, take
from optim.private import NotPrivate, require_private

logger = logging.getLogger(__name__)

_MANIFEST = "MANIFEST.json"
#: Part of every folder name: raise it where what is stored, or its meaning, changes.
FORMAT = 1
#: How many rejected entries are kept for somebody to look at.
_KEPT_REJECTED = 4
_TURN = "turn"
#: How long somebody else is waited for, who may be stuck: longer than a decoder of many buckets takes to compile. What
#: follows is at worst a second compilation, or figures taken beside another race.
_PATIENCE_S = 3600.0


class CacheUnusable(Exception):
    """The cache's folder cannot be used; the message is the reason."""


class Damaged(Exception):
    """An entry is not what was stored; the message is the reason."""


def default_folder() -> Path:
    """Return `pt2-serve` under $XDG_CACHE_HOME, else under ~/.cache; CacheUnusable where there is no home."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG base directory specification: such a path is to be ignored
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise CacheUnusable(f"{error} Set XDG_CACHE_HOME or pt2.cache.folder") from error
    return base / "pt2-serve"


class Cache:
    """Entries by name in a folder that belongs to this user and that others cannot write to; else CacheUnusable."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder / f"v{FORMAT}"
        self._max_bytes = max_bytes
        #: What was found damaged and what could not be done, for the report.
        self.notes: list[str] = []
        try:
            for part in (folder, self.folder, *(self.folder / name for name in ("entries", "locks", "rejected"))):
                part.mkdir(mode=0o700, parents=True, exist_ok=True)
                require_private(part)
            with self._open_lock(_TURN) as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # some network file systems have no locks
        except OSError as error:
            raise CacheUnusable(f"{error.filename or self.folder}: {error.strerror}") from error
        except NotPrivate as error:
            raise CacheUnusable(str(error)) from error

    @contextmanager
    def hold(self, name: str, *, wait: bool = True) -> Iterator[Path | None]:
        """Find an entry's folder, waiting for whoever makes it; with None the caller makes it, and others wait.

        An entry found is locked against eviction only, so that several may read it. Without `wait`, Busy is raised
        where somebody makes it. Where no lock can be had (a full disk, one that is read-only and lacks the entry, or an
        owner that is stuck), there is None for everybody.
        """
        others = "another process that compiles the same"
        with ExitStack() as stack:
            path = None
            with self._or_without("an entry of the compile cache cannot be locked"):
                lock = stack.enter_context(self._open_lock(name))
                path = self._find_or_own(name, lock, Waiting(others, _PATIENCE_S) if wait else None)
            yield path

    def _find_or_own(self, name: str, lock: int, waiting: Waiting | None) -> Path | None:
        take(lock, fcntl.LOCK_SH, waiting)
        path = self._find(name)
        if path is None:
            take(lock, fcntl.LOCK_UN, waiting)
            take(lock, fcntl.LOCK_EX, waiting)
            path = self._find(name)  # the one waited for may have made it
            if path is not None:
                take(lock, fcntl.LOCK_SH, waiting)
        return path

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn to measure: races beside each other on the same cores would choose by chance."""
        with ExitStack() as stack:
            with self._or_without("other models on this machine may race at the same time"):
                lock = stack.enter_context(self._open_lock(_TURN))
                others = "its turn to measure, after another model on this machine"
                take(lock, fcntl.LOCK_EX, Waiting(others, _PATIENCE_S))
            yield

    @contextmanager
    def _or_without(self, what: str) -> Iterator[None]:
        """Go on where a lock cannot be had, as of a network file system that is read-only, and say what follows."""
        try:
            yield
        except OSError as error:
            self.tell(f"{what}: {error}")

    def tell(self, note: str) -> None:
        """Note something for the report, once, and log it."""
        if note not in self.notes:
            self.notes.append(note)
            logger.warning(note)

    def store(self, name: str, fill: Callable[[Path], None]) -> Path:
        """Make an entry by filling a folder and return it; it replaces one that is there. Call while it is held."""
        return self._make(name, fill, _write_manifest)

    def adopt(self, name: str, fill: Callable[[Path], None]) -> Path:
        """Take over an entry that was made elsewhere, its manifest with it; Damaged where it is not whole."""
        return self._make(name, fill, _check_manifest)

    def _make(self, name: str, fill: Callable[[Path], None], finish: Callable[[Path], None]) -> Path:
        made = Path(tempfile.mkdtemp(prefix="making-", dir=self.folder))
        target = self.folder_of(name)
        try:
            fill(made)
            finish(made)
            if target.exists():
                self._set_aside(name)
            made.rename(target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        try:
            self.evict(keep=name)
        except OSError as error:  # what was stored is there all the same
            self.tell(f"the compile cache may outgrow its limit: {error}")
        return target

    def reject(self, name: str, reason: str) -> None:
        """Set an entry aside that does not hold what it promised, and say so."""
        try:
            self._set_aside(name)
            done = f"was set aside, under {self.folder / 'rejected'}"
        except OSError as error:  # then the next start finds it once more
            done = f"is not used, and cannot be set aside ({error.strerror})"
        self.tell(f"cache entry {name} {done}: {reason}")

    def is_writable(self) -> bool:
        """Say whether entries can be stored."""
        return os.access(self.folder, os.W_OK)

    def names(self) -> list[str]:
        """Return the names of all entries, whole or not; those used last come first."""
        return [path.name for path in sorted((self.folder / "entries").iterdir(), key=_used, reverse=True)]

    def folder_of(self, name: str) -> Path:
        """Return where an entry is, if it is there."""
        return self.folder / "entries" / name

    def evict(self, keep: str = "") -> list[str]:
        """Remove what was set aside, then the entries that were not used for longest, until the rest fits.

        Returns the names of the entries removed.
        """
        self._sweep()
        rejected, entries = (sorted((self.folder / name).iterdir(), key=_used) for name in ("rejected", "entries"))
        sizes = {path: _size(path) for path in [*rejected, *entries]}
        total, gone = sum(sizes.values()), []
        for path in sizes:
            if total <= self._max_bytes:
                break
            if path in rejected:
                shutil.rmtree(path, ignore_errors=True)
                total -= sizes[path]
            elif path.name != keep and self._remove_unless_used(path):
                total -= sizes[path]
                gone.append(path.name)
        if gone:
            logger.info("removed from the compile cache to make room: %s", ", ".join(gone))
        return gone

    def _find(self, name: str) -> Path | None:
        path = self.folder_of(name)
        try:
            require_private(path)
            _check_manifest(path)
            with suppress(OSError):  # a read-only image, from which nothing is evicted either
                os.utime(path)
        except FileNotFoundError:
            if path.exists():
                self.reject(name, "it has no manifest, or a file is gone")
            return None
        except (NotPrivate, Damaged, OSError) as error:
            self.reject(name, str(error))
            return None
        return path

    def _set_aside(self, name: str) -> None:
        rejected = self.folder / "rejected"
        with tempfile.TemporaryDirectory(prefix="aside-", dir=self.folder) as place:
            moved = Path(place) / name
            try:
                self.folder_of(name).rename(moved)
                moved.rename(rejected / f"{name}-{time.time_ns()}")
            except FileNotFoundError:
                return  # another process did it
        for old in sorted(rejected.iterdir(), key=_used)[:-_KEPT_REJECTED]:
            shutil.rmtree(old, ignore_errors=True)

    def _open_lock(self, name: str) -> AbstractContextManager[int]:
        return open_lock(self.folder / "locks" / f"{name}.lock")

    def _remove_unless_used(self, path: Path) -> bool:
        with self._open_lock(path.name) as lock:
            try:
                take(lock, fcntl.LOCK_EX)
            except Busy:
                return False
            shutil.rmtree(path, ignore_errors=True)
        return True

    def _sweep(self) -> None:
        """Remove what processes that died left half made: by its age, since other nodes may use the same folder."""
        for left in [*self.folder.glob("making-*"), *self.folder.glob("aside-*")]:
            if time.time() - _used(left) > 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {str(path.relative_to(folder)): _hash(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / _MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def _check_manifest(folder: Path) -> None:
    """Raise Damaged where the files are not the ones that were stored."""
    try:
        files = dict(json.loads((folder / _MANIFEST).read_bytes())["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"its manifest cannot be read ({type(error).__name__})") from error
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
    if found - {_MANIFEST} != set(files):
        names = sorted((found - {_MANIFEST}) ^ set(files))
        raise Damaged(f"files were added or are gone: {', '.join(names[:3])}")
    for name, expected in files.items():
        path = folder / name
        if path.is_symlink() or _hash(path) != expected:
            raise Damaged(f"{name} is not what was stored")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
