"""The hop from a gateway to a model: what one hands over by a handle, the other's own application answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, MutableMapping
from contextlib import ExitStack, aclosing, contextmanager, suppress
from typing import Any
from urllib.parse import quote

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from deployments.deadline import time_left
from deployments.errors import DeadlineExceeded, ModelNotFound, NotReady
from deployments.event_stream import EventStream
from deployments.middleware import OWN_TIMEOUT, TIMEOUT
from deployments.replies import path_of

logger = logging.getLogger(__name__)
Headers = list[tuple[bytes, bytes]]
Parts = AsyncGenerator[Any]
"""A reply as it comes: a tuple of status and headers, and then its body, piece by piece."""
#: Headers that belong to one connection, that say what the body was before it was read, or how long there was then.
_NOT_HANDED_ON = (
    *(b"host", b"connection", b"transfer-encoding", b"content-length", b"content-encoding"),
    *(TIMEOUT.encode(), OWN_TIMEOUT.encode()),
)


async def hand_over(
    handle: DeploymentHandle[Any],
    request: Request,
    body: bytes,
    started: float,
    timeout_s: float | None,
    *,
    may_stream: bool = False,
) -> Response:
    """Ask a model's replica, and return its reply; NotReady where that is lost on the way.

    DeadlineExceeded where it does not come within the time that the caller grants, of which some has passed since
    `started`, or else within `timeout_s`. A caller that goes away takes the request back. With `may_stream` a stream of
    events is handed on as it comes, and an error in it is its last event.
    """
    left = time_left(request, started)
    seconds = timeout_s if left is None else left
    if seconds is not None and seconds <= 0:
        raise DeadlineExceeded("the deadline has passed")
    headers: Headers = [(key, value) for key, value in request.headers.raw if key.lower() not in _NOT_HANDED_ON]
    headers.append((b"content-length", str(len(body)).encode()))
    if left is not None:  # `timeout_s` stays here: it would replace the model's own, which may be shorter
        headers.append((OWN_TIMEOUT.encode(), str(left).encode()))
    what = (request.method, path_of(request), headers, body)
    if may_stream:
        return await _ask_for_stream(handle, request, what, seconds)
    with _name_losses(handle, seconds):
        async with asyncio.timeout(seconds):
            status, found, content = await _ask(handle, what)
    reply = Response(content, status)
    reply.raw_headers = found
    return reply


@contextmanager
def _name_losses(handle: DeploymentHandle[Any], seconds: float | None) -> Iterator[None]:
    """Raise what is lost on the way to a model, or comes too late, as an error that the caller understands."""
    try:
        yield
    except TimeoutError:
        raise DeadlineExceeded(f"no answer in time: the deadline was {seconds:.3g} s away") from None
    except (RayActorError, DeploymentUnavailableError, BackPressureError) as error:
        logger.warning("a replica of %s was lost: %s", handle.deployment_id, error)
        raise NotReady("the replica that had the request was lost; try again") from error
    except RayServeException as error:  # it has no such method
        raise ModelNotFound(f"Model not found: {handle.deployment_id.name} is none of ours") from error


async def _ask(handle: DeploymentHandle[Any], what: tuple[str, str, Headers, bytes]) -> tuple[int, Headers, bytes]:
    call = handle.answer.remote(*what)
    try:
        return await call  # type: ignore[no-any-return]
    except asyncio.CancelledError:
        _take_back(call)
        raise


def _take_back(call: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> None:
    """Cancel a call: Ray Serve takes back by itself only what no replica has yet."""
    with suppress(Exception):  # it raises where the call has just failed
        call.cancel()  # type: ignore[no-untyped-call]


async def _ask_for_stream(
    handle: DeploymentHandle[Any], request: Request, what: tuple[str, str, Headers, bytes], seconds: float | None
) -> Response:
    """Return a reply that goes on as its parts come; a refusal is whole."""
    call: Any = handle.options(stream=True).answer_in_parts.remote(*what)
    until = None if seconds is None else asyncio.get_running_loop().time() + seconds
    is_over = False

    async def read() -> Parts:
        nonlocal is_over
        while True:
            with _name_losses(handle, seconds):
                async with asyncio.timeout_at(until):
                    part = await anext(call, None)
            if part is None:
                is_over = True
                return
            yield part

    with ExitStack() as held:
        held.callback(lambda: None if is_over else _take_back(call))
        parts = read()
        status, found = await anext(parts)
        if dict(found).get(b"content-type", b"").startswith(EventStream.media_type.encode()):
            reply: Response = EventStream(request, parts, held.pop_all())
        else:
            reply = Response(b"".join([part async for part in parts]))
    reply.status_code, reply.raw_headers = status, found
    return reply


async def call_app(app: ASGIApp, method: str, path: str, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    """Return status, headers and body of the application's reply; `path` is below its root, and decoded."""
    async with aclosing(call_app_in_parts(app, method, path, headers, body)) as parts:
        status, found = await anext(parts)
        return status, found, b"".join([part async for part in parts])


async def call_app_in_parts(app: ASGIApp, method: str, path: str, headers: Headers, body: bytes) -> Parts:
    """Yield the application's reply as it comes; closing this ends it, as a caller's hanging up does."""
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
    sent: asyncio.Queue[MutableMapping[str, Any] | None] = asyncio.Queue()

    async def receive() -> MutableMapping[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # nobody hangs up: a caller that goes away cancels the call itself
        raise AssertionError

    running = asyncio.ensure_future(app(scope, receive, sent.put))
    running.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                yield message["status"], list(message.get("headers", []))
            else:
                yield bytes(message.get("body", b""))
        await running  # what it raised
    finally:
        running.cancel()
        await asyncio.wait([running])
