"""Bodies of requests: read within limits of size and time, unpacked, laid out for tensors."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from typing import Protocol

from starlette.requests import ClientDisconnect, Request

from deployments.admission import Held
from deployments.errors import BadRequest, BodyTooLarge, BodyTooSlow, UnsupportedEncoding

_DISCARD_BYTES = 64 * 1024 * 1024
_DISCARD_S = 5.0
#: Where tensors begin: at what malloc gives, which is enough for every datatype.
_ALIGNMENT = 16
PACKED = ("gzip", "deflate")
#: Parts that a gzip body may have: each costs a copy of what follows it.
_MOST_MEMBERS = 100
#: zlib's way to read each coding; deflate is in zlib's own frame (RFC 9110, 8.4.1.2).
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


class BodyLimits(Protocol):
    """What a body may be: of a model, or of a gateway."""

    @property
    def body_bytes(self) -> int:
        """Most bytes, packed or unpacked."""

    @property
    def body_s(self) -> float:
        """Seconds until it has to be there."""


async def read_body(request: Request, limits: BodyLimits, held: Held, lead: int | None = None) -> bytes | memoryview:
    """Return the body, unpacked where it came packed; what follows its first `lead` bytes is aligned and writable.

    BodyTooLarge as soon as more than `limits.body_bytes` are announced, have come, or would be unpacked; BodyTooSlow
    where it has not come in `limits.body_s`, or has taken longest of too many. Its bytes are held as soon as they are
    known of: Overloaded where the replica has no room for them.
    """
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "", *_WINDOW_BITS):
        raise UnsupportedEncoding(f"content-encoding: {coding!r} is not one of gzip, deflate, identity")
    try:
        async with held.admission.receive(limits.body_s):
            chunks = await _collect(request, limits.body_bytes, held)
    except TimeoutError:
        raise BodyTooSlow(
            f"the body was not there in time: within {limits.body_s:g} s (limits.body_s), or sooner where many arrive"
        ) from None
    if coding in _WINDOW_BITS:
        with held.more(limits.body_bytes):  # as much as it may become, while it does
            chunks = [await asyncio.to_thread(unpack, b"".join(chunks), coding, limits.body_bytes)]
        held.grow_to(len(chunks[0]))
    return b"".join(chunks) if lead is None else _align(chunks, lead)


async def _collect(request: Request, limit: int, held: Held) -> list[bytes]:
    text = request.headers.get("content-length", "")
    size = int(text) if text.isdecimal() else 0
    if size <= limit:
        held.grow_to(size)
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                break
            held.grow_to(size)
            chunks.append(chunk)
        else:
            return chunks
    raise BodyTooLarge(f"the body is over the limit of {limit} bytes")


async def discard(request: Request) -> None:
    """Read on for a while without keeping anything, where the client wants the connection closed.

    uvicorn closes a connection that asked for it as soon as the reply is written; a client that is still sending
    then sees a reset and never reads the reply.
    """
    if request.headers.get("connection", "").lower() != "close":
        return
    left = _DISCARD_BYTES
    # Starlette raises RuntimeError where the body was read to its end.
    with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(_DISCARD_S):
            async for chunk in request.stream():
                left -= len(chunk)
                if left < 0:
                    break


def unpack(packed: bytes, coding: str, limit: int) -> bytes:
    """Return what a gzip or deflate body holds; BodyTooLarge before more than `limit` bytes are unpacked."""
    found = bytearray()
    for _ in range(_MOST_MEMBERS):
        unpacker = zlib.decompressobj(_WINDOW_BITS[coding])
        try:
            found += unpacker.decompress(packed, limit + 1 - len(found))
        except zlib.error as error:
            raise BadRequest(f"the body is not {coding}: {error}") from error
        if len(found) > limit:
            raise BodyTooLarge(f"the body is over the limit of {limit} bytes when it is unpacked")
        if not unpacker.eof:
            raise BadRequest(f"the body is not {coding}: it ends too early")
        packed = unpacker.unused_data
        if not packed or coding == "deflate":  # gzip may have several members
            break
    if packed:
        raise BadRequest(f"the body is not {coding}: {len(packed)} bytes follow its end")
    return bytes(found)


def pack(content: bytes, coding: str) -> bytes:
    """Return a reply's body packed by one of `PACKED`, at zlib's fastest level: figures hardly get smaller."""
    packer = zlib.compressobj(1, wbits=_WINDOW_BITS[coding])
    return packer.compress(content) + packer.flush()


def _align(chunks: list[bytes], lead: int) -> memoryview:
    """Return the chunks as one writable buffer, in which `lead` bytes end where an allocation would be aligned."""
    gap = -lead % _ALIGNMENT
    return memoryview(bytearray().join([bytes(gap), *chunks]))[gap:]
