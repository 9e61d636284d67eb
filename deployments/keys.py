"""API keys: who is let in over HTTP. Handles inside the cluster need none."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from deployments.args import AuthArgs
from deployments.errors import Forbidden, Unauthorized
from optim.errors import ConfigError

logger = logging.getLogger(__name__)
_SHORTEST = 16


def is_loopback(host: str) -> bool:
    """Return whether only processes of the same machine reach what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or nothing: it may be any interface
        return False


class Keys:
    """The keys that a model accepts, kept as digests; `refresh` may run on any thread beside `accepts`.

    Without keys everybody is let in, which is refused where `host` is not loopback and the configuration does not
    say `required: false`: ConfigError, as for a key that is too short, or a file that cannot be read.
    """

    def __init__(self, auth: AuthArgs, host: str, environment: Mapping[str, str]) -> None:
        self._open_health = auth.open_health
        self._file = Path(auth.keys_file) if auth.keys_file and auth.required is not False else None
        given = [] if auth.required is False else re.split(r"[\s,]+", environment.get(auth.keys_env, ""))
        self._given = _digest([key for key in given if key], f"the environment's {auth.keys_env}")
        self._seen = self._stat()
        self._digests = self._given + self._read()
        #: Ray Serve's gRPC servers listen on all interfaces, whatever `http_options.host` says.
        self._local_only = not self._digests and auth.required is None
        required = not is_loopback(host) if auth.required is None else auth.required
        if required and not self._digests:
            why = "args.auth.required is true" if auth.required else f"http_options.host {host!r} is not loopback"
            listen = "listen on 127.0.0.1, "
            if not host and not auth.required:
                why, listen = "where Ray Serve listens is not known", ""
            raise ConfigError(
                "args.auth",
                "no API key",
                f"{why}: put keys into the environment's {auth.keys_env} or into auth.keys_file, {listen}"
                "or let everybody in with `auth: {required: false}`",
            )

    @property
    def needed(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._digests)

    def check(self, headers: Mapping[str, str], *, health: bool, how: str = "`Authorization: Bearer KEY`") -> None:
        """Raise Unauthorized where a request has no right key, unless it asks for `health` and that is open."""
        if not (self.accepts(headers) or (health and self._open_health)):
            raise Unauthorized(f"a key is needed: send {how} or `x-api-key: KEY`")

    def accepts(self, headers: Mapping[str, str]) -> bool:
        """Return whether `Authorization: Bearer KEY` or `x-api-key: KEY` is right, in a time that does not tell."""
        if not self._digests:
            return True
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        found = False
        for key in given:
            digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
            for known in self._digests:
                found |= hmac.compare_digest(digest, known)
        return found

    def check_peer(self, peer: str) -> None:
        """Raise Forbidden where a gRPC caller (as gRPC names it: `ipv4:127.0.0.1:4711`) may not even ask for a key."""
        if not self._local_only:
            return
        kind, _, address = unquote(peer).partition(":")
        host = address.rpartition(":")[0].strip("[]").removeprefix("::ffff:")
        if kind != "unix" and not (kind in ("ipv4", "ipv6") and is_loopback(host)):
            raise Forbidden("without API keys only callers on the same machine are answered (README, auth)")

    def refresh(self) -> None:
        """Read the file again where it has changed; a file that cannot be read, or is empty, changes nothing."""
        seen = self._stat()
        if seen == self._seen:
            return
        try:
            read = self._read()
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)
            return
        if not read and not self._given:
            logger.error("the API keys stay as they were: %s has none", self._file)
            return
        self._seen = seen  # not before: a file that could not be read is looked at again
        self._digests = self._given + read
        logger.info("%d API keys are in force", len(self._digests))

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self._file.stat() if self._file else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None

    def _read(self) -> list[bytes]:
        if self._file is None:
            return []
        try:
            lines = [line.strip() for line in self._file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("args.auth.keys_file", str(self._file), f"it cannot be read: {error}") from None
        return _digest([line for line in lines if line and not line.startswith("#")], str(self._file))


def _digest(keys: list[str], where: str) -> list[bytes]:
    """Return the keys' digests; an error never shows a key."""
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                "args.auth", f"key {number} in {where}", "use keys of printable ASCII: headers carry no more"
            )
        if len(key) < _SHORTEST:
            raise ConfigError(
                "args.auth", f"key {number} in {where}", f"use keys of {_SHORTEST} characters or more, not {len(key)}"
            )
    return [hashlib.sha256(key.encode(errors="surrogateescape")).digest() for key in keys]
