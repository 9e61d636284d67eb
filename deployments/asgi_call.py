"""The hop from a gateway to a model: what one hands over by a handle, the other's own application answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from deployments.deadline import time_left
from deployments.errors import DeadlineExceeded, ModelNotFound, NotReady
from deployments.middleware import OWN_TIMEOUT, TIMEOUT
from deployments.replies import path_of

logger = logging.getLogger(__name__)
Headers = list[tuple[bytes, bytes]]
#: Headers that belong to one connection, that say what the body was before it was read, or how long there was then.
_NOT_HANDED_ON = (
    *(b"host", b"connection", b"transfer-encoding", b"content-length", b"content-encoding"),
    *(TIMEOUT.encode(), OWN_TIMEOUT.encode()),
)


async def hand_over(
    handle: DeploymentHandle[Any], request: Request, body: bytes, started: float, timeout_s: float | None
) -> Response:
    """Ask a model's replica, and return its reply; NotReady where that is lost on the way.

    DeadlineExceeded where it does not come within the time that the caller grants, of which some has passed since
    `started`, or else within `timeout_s`. A caller that goes away takes the request back.
    """
    left = time_left(request, started)
    seconds = timeout_s if left is None else left
    if seconds is not None and seconds <= 0:
        raise DeadlineExceeded("the deadline has passed")
    headers: Headers = [(key, value) for key, value in request.headers.raw if key.lower() not in _NOT_HANDED_ON]
    headers.append((b"content-length", str(len(body)).encode()))
    if left is not None:  # `timeout_s` stays here: it would replace the model's own, which may be shorter
        headers.append((OWN_TIMEOUT.encode(), str(left).encode()))
    try:
        async with asyncio.timeout(seconds):
            status, found, content = await _ask(handle, request.method, path_of(request), headers, body)
    except TimeoutError:
        raise DeadlineExceeded(f"no answer in time: the deadline was {seconds:.3g} s away") from None
    reply = Response(content, status)
    reply.raw_headers = found
    return reply


async def _ask(
    handle: DeploymentHandle[Any], method: str, path: str, headers: Headers, body: bytes
) -> tuple[int, Headers, bytes]:
    call = handle.answer.remote(method, path, headers, body)
    try:
        return await call  # type: ignore[no-any-return]
    except asyncio.CancelledError:
        # Ray Serve takes back by itself only what no replica has yet. It raises where the call has just failed.
        with contextlib.suppress(Exception):
            call.cancel()  # type: ignore[no-untyped-call]
        raise
    except (RayActorError, DeploymentUnavailableError, BackPressureError) as error:
        logger.warning("a replica of %s was lost: %s", handle.deployment_id, error)
        raise NotReady("the replica that had the request was lost; try again") from error
    except RayServeException as error:  # it has no such method
        raise ModelNotFound(f"Model not found: {handle.deployment_id.name} is none of ours") from error


async def call_app(app: ASGIApp, method: str, path: str, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    """Return status, headers and body of the application's reply; `path` is below its root, and decoded."""
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": quote(path).encode(),
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
