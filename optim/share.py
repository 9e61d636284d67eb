"""What machines give each other of their compile caches: one entry as bytes, and where such bytes are kept."""

from __future__ import annotations

import hashlib
import hmac
import io
import logging
import os
import tarfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from optim.cache import FORMAT, Cache, Damaged
from optim.errors import describe
from optim.plan import BadPlan
from optim.report import CompileReport

logger = logging.getLogger(__name__)

#: The environment variable with the key that signs what goes to `pt2.cache.uri`.
KEY_VARIABLE = "PT2_CACHE_KEY"
_SHORTEST_KEY = 16
#: How long a replica that is not ready waits for a storage, which may hang, seconds: to connect; for a large entry to
#: come; the same where eager could answer meanwhile; and to see whether something is wrong with what it leaves there.
OPEN_S, _GET_S, _QUICK_S, _OFFER_S = 60.0, 600.0, 30.0, 10.0

#: What was offered since `finish_offers` was called last: to which share, and whether it has arrived.
_offers: list[tuple[str, Future[bool]]] = []

T = TypeVar("T")


class Share(Protocol):
    """Where entries of other machines are found; both methods may raise anything, and a cold start follows."""

    name: str
    """What it is called in reports."""

    def get(self, entry: str) -> bytes | None:
        """Return a packed entry, or None where nobody has left it."""

    def offer(self, entry: str, folder: Path, *, anew: bool = False) -> None:
        """Leave an entry, whose folder is given, for others; where one is there it stays, unless it is made `anew`."""


class ShareUnusable(Exception):
    """Nothing can be shared so; the message is the reason."""


class Exchange:
    """One entry of the cache, taken from the shares and given to them; what goes wrong is a note in the report."""

    def __init__(self, cache: Cache, entry: str, shares: Sequence[Share], report: CompileReport) -> None:
        self._cache, self._entry, self._shares, self._report = cache, entry, shares, report
        #: Those that were not asked yet, and those that had too little time to answer.
        self._unasked, self._late = list(shares), list[Share]()
        self._has_adopted = False
        #: Whether what is offered takes the place of what is there.
        self._is_anew = False

    def adopt(self, *, quickly: bool = False) -> Path | None:
        """Return the entry of the first share that has it, now in the cache too; call while it is held.

        Each is asked once, and has time for a large entry; not so `quickly`, where eager could answer meanwhile.
        """
        if not quickly:
            self._unasked, self._late = [*self._late, *self._unasked], []
        found_damaged = False
        while self._unasked:
            share = self._unasked.pop(0)
            try:
                packed = within(_QUICK_S if quickly else _GET_S, partial(share.get, self._entry))
                if packed is not None:
                    path = self._cache.adopt(self._entry, lambda folder, found=packed: unpack(found, folder))  # type: ignore[misc]
                    self._report.notes.append(f"the plan came from {share.name}")
                    self._is_anew = found_damaged or self._has_adopted  # of another share, which was too old
                    self._has_adopted = True
                    return path
            except (Damaged, tarfile.TarError, FileNotFoundError) as error:  # the last: there is no manifest
                found_damaged = self._is_anew = True
                self._tell(share, "nothing is taken from", error)
            except Exception as error:  # storages and networks of all kinds; a cold start is always there
                if quickly and isinstance(error, TimeoutError):
                    self._late.append(share)
                self._tell(share, "nothing is taken from", error)
        return None

    def replace(self, reason: BadPlan) -> None:
        """Let what is offered next take the place of what came from a share, which every machine would find else.

        Not where that was only slow here, or had no chance: this machine may be under load, and the plan good for all
        others. Instead of one that is only old the shares not asked yet may have a newer one.
        """
        if reason.stage != "old":
            self._unasked, self._late = [], []
        self._is_anew |= reason.stage == "old" or (self._has_adopted and reason.stage not in ("time", "stuck"))

    def offer(self, path: Path | None) -> None:
        """Offer the entry to all shares, if there is one; what takes long goes on beside this thread."""
        for share in self._shares if path is not None else ():
            assert path is not None
            try:
                left = _beside(partial(self._leave, share, path, anew=self._is_anew))
            except RuntimeError as error:  # there can be no more threads
                self._tell(share, "nothing is left in", error)
                continue
            _offers.append((share.name, left))
            wait([left], _OFFER_S)

    def _leave(self, share: Share, path: Path, *, anew: bool) -> bool:
        """Offer the entry to a share; return whether that went well."""
        try:
            share.offer(self._entry, path, anew=anew)
        except Exception as error:
            self._tell(share, "nothing is left in", error)
            return False
        return True

    def _tell(self, share: Share, what: str, error: Exception) -> None:
        self._report.warn("{} {}: {}: {}".format(what, share.name, *describe(error, 300)))


def finish_offers(seconds: float = 900.0) -> bool:
    """Wait for what is on its way to the shares, as a process has to before it ends.

    Returns whether all that was offered since the last time has arrived; what has not is logged, and where it failed,
    it is in the report.
    """
    offers = _offers.copy()
    for name in {name for name, left in offers if not left.done()}:
        logger.info("waiting for what is on its way to %s", name)
    late = wait([left for _, left in offers], seconds).not_done
    for name in {name for name, left in offers if left in late}:
        logger.warning("what is on its way to %s has not arrived after %.0f s", name, seconds)
    del _offers[: len(offers)]
    return not late and all(left.result() for _, left in offers)


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call returns; TimeoutError where it takes longer. It then goes on, and nobody hears of it."""
    found = _beside(call)
    if not wait([found], seconds).done:
        raise TimeoutError(f"there is no answer after {seconds:.0f} s")
    return found.result()


def _beside(call: Callable[[], T]) -> Future[T]:
    """Have a thread make a call, which may never return; no process waits for it to end."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as error:  # for who asks for the result, whatever it is
            found.set_exception(error)

    threading.Thread(target=run, name="optim: share", daemon=True).start()
    return found


def pack(folder: Path) -> bytes:
    """Return the files of a folder as a tar archive."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                archive.add(path, str(path.relative_to(folder)))
    return packed.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Put what `pack` returned into a folder; tarfile.TarError or OSError where it is something else.

    Links, devices and paths out of the folder are refused (tarfile's filter "data").
    """
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:") as archive:
        archive.extractall(folder, filter="data")


class UriShare:
    """Files under a URI (file, s3, gs, ... through fsspec), each signed with a key that the operator gives.

    Entries are code: whoever can write there could run theirs here, if not for the signature (HMAC-SHA-256 over the
    entry's name and bytes). ShareUnusable without a key, or where fsspec does not know the URI.
    """

    def __init__(self, uri: str, key: str | None) -> None:
        if not key or len(key) < _SHORTEST_KEY:
            raise ShareUnusable(
                f"{KEY_VARIABLE} is {'not set' if not key else 'too short'}; what is read from there is code, so it "
                f"must be signed with a key of {_SHORTEST_KEY} characters or more"
            )
        try:
            import fsspec  # type: ignore[import-untyped]

            self._files, root = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:  # no fsspec; no such protocol, or its package is missing
            raise ShareUnusable(str(error)) from error
        except Exception as error:  # some connect at once: whatever their storage raises
            raise ShareUnusable("{}: {}".format(*describe(error, 300))) from error
        self.name = uri
        self._folder = f"{str(root).rstrip('/')}/v{FORMAT}"
        self._key = key.encode()
        self._not_ours: set[str] = set()

    def get(self, entry: str) -> bytes | None:
        """Return an entry; ShareUnusable where its signature is not ours."""
        try:
            signed: bytes = self._files.cat_file(self._path(entry))
        except FileNotFoundError:
            return None
        signature, packed = signed[:32], signed[32:]
        if not hmac.compare_digest(signature, self._sign(entry, packed)):
            self._not_ours.add(entry)
            raise ShareUnusable(f"{self._path(entry)} is not signed with the key in {KEY_VARIABLE}, or was changed")
        return packed

    def offer(self, entry: str, folder: Path, *, anew: bool = False) -> None:
        """Write an entry, at once where the storage can rename, unless a good one is there."""
        path = self._path(entry)
        if not anew and entry not in self._not_ours and self._files.exists(path):
            return
        packed = pack(folder)
        self._files.makedirs(self._folder, exist_ok=True)
        content = self._sign(entry, packed) + packed
        if _is_local(self._files):  # object stores show a file only when it is whole
            made = f"{path}.{hashlib.sha256(content).hexdigest()[:16]}"
            try:
                self._files.pipe_file(made, content)
                os.replace(made, path)
            except BaseException:  # a full disk, say, which what was written would keep full
                with suppress(OSError):
                    os.unlink(made)
                raise
        else:
            self._files.pipe_file(path, content)

    def _path(self, entry: str) -> str:
        return f"{self._folder}/{entry}.tar.signed"

    def _sign(self, entry: str, packed: bytes) -> bytes:
        signing = hmac.new(self._key, entry.encode() + b"\0", "sha256")
        signing.update(packed)  # not all at once: hmac.digest takes no more than 2 GB, and a copy of it
        return signing.digest()


def _is_local(files: Any) -> bool:
    protocol = files.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)
