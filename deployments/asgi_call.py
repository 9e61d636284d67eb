"""Asking an ASGI application from Python: what a gateway hands over, a replica's own application answers."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp

Headers = list[tuple[bytes, bytes]]


async def call_app(app: ASGIApp, method: str, path: str, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    """Return status, headers and body of the application's reply; `path` is percent-encoded, below its root."""
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode("latin-1", "replace"),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    status, found, chunks = 500, Headers(), list[bytes]()

    async def receive() -> MutableMapping[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # nobody hangs up: a caller that goes away cancels the call itself
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status, found
        if message["type"] == "http.response.start":
            status, found = message["status"], list(message.get("headers", []))
        else:
            chunks.append(bytes(message.get("body", b"")))

    await app(scope, receive, send)
    return status, found, b"".join(chunks)
