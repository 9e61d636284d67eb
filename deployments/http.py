"""The HTTP application of a replica: one endpoint, one call; every error in the body its protocol's clients expect."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from deployments import oip, torchserve
from deployments.admission import Held
from deployments.errors import BadRequest, BodyTooLarge, Overloaded, RequestError
from deployments.service import ModelService

logger = logging.getLogger(__name__)
_DISCARD_BYTES = 64 * 1024 * 1024
_DISCARD_S = 5.0
TIMEOUT_HEADER = "x-request-timeout-seconds"
Handler = Callable[[ModelService, Request], Awaitable[Response]]


def make_app(service: ModelService) -> Starlette:
    """Return the ASGI application that answers for one model."""
    endpoints: list[tuple[str, str, Handler]] = [
        ("GET", "/ping", _ping),
        ("POST PUT", "/predictions/{model}", _predict),  # PUT is what TorchServe's own `curl -T photo.jpg` sends
        ("POST PUT", "/predictions/{model}/{version}", _predict),
        ("GET", "/models", _list_models),
        ("GET", "/models/{model}", _describe_model),
        ("GET", "/models/{model}/{version}", _describe_model),
        ("GET", "/v2", _server_metadata),
        ("GET", "/v2/health/live", _live),
        ("GET", "/v2/health/ready", _ready),
    ]
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        endpoints += [
            ("GET", prefix, _model_metadata),
            ("GET", f"{prefix}/ready", _model_ready),
            ("POST", f"{prefix}/infer", _infer),
        ]
    routes = [Route(path, _guard(service, handler), methods=methods.split()) for methods, path, handler in endpoints]
    return Starlette(routes=routes, exception_handlers={HTTPException: _routing_error})


def _guard(service: ModelService, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(service, request)
        except ClientDisconnect:
            raise
        except RequestError as error:
            return _error(request, error)
        except Exception:  # a bug of ours: the log has its traceback, the client its request id
            logger.exception("request %s failed", _request_id(request))
            return _error(request, RequestError(f"internal error; the log has it under request {_request_id(request)}"))

    return endpoint


def _routing_error(request: Request, error: Exception) -> Response:
    """Answer for paths and methods that no route has."""
    assert isinstance(error, HTTPException)
    texts = {
        404: f"no such path: {_path(request)}",
        405: f"{request.method} is not allowed here; use {(error.headers or {}).get('Allow', 'another method')}",
    }
    text = texts.get(error.status_code, str(error.detail))
    return _error(request, RequestError(text), status=error.status_code, headers=dict(error.headers or {}))


def _error(
    request: Request, error: RequestError, status: int | None = None, headers: dict[str, str] | None = None
) -> Response:
    status = status or error.status
    headers = headers or {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after_s)
    is_oip = _path(request).startswith("/v2")
    body = oip.error_body(error) if is_oip else torchserve.error_body(error, status)
    return _json(body, status, headers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    try:
        body = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise RequestError("the reply holds NaN or infinity, which JSON cannot carry") from error
    return Response(body.encode(), status, headers, media_type="application/json")


def _path(request: Request) -> str:
    """Return the path below the application's route prefix."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", ""))


def _request_id(request: Request) -> str:
    return request.headers.get("x-request-id", "-")


async def read_body(request: Request, limit: int, held: Held) -> bytes:
    """Return the body; BodyTooLarge as soon as more than `limit` bytes are announced or have come.

    Its bytes are held as soon as they are known of: Overloaded where the replica has no room for them.
    """
    stream = request.stream()
    try:
        return await _collect(request, stream, limit, held)
    except RequestError:
        if request.headers.get("connection", "").lower() == "close":
            await _discard(stream)
        raise


async def _collect(request: Request, stream: AsyncIterator[bytes], limit: int, held: Held) -> bytes:
    text = request.headers.get("content-length", "")
    size = int(text) if text.isdecimal() else 0
    if size <= limit:
        held.grow_to(size)
        chunks, size = [], 0
        async for chunk in stream:
            size += len(chunk)
            if size > limit:
                break
            held.grow_to(size)
            chunks.append(chunk)
        else:
            return b"".join(chunks)
    raise BodyTooLarge(f"the body is over the limit of {limit} bytes")


async def _discard(stream: AsyncIterator[bytes]) -> None:
    """Read on for a while without keeping anything.

    uvicorn closes a connection that asked for it as soon as the reply is written; a client that is still sending
    then sees a reset and never reads the reply.
    """
    left = _DISCARD_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            async for chunk in stream:
                left -= len(chunk)
                if left < 0:
                    break


def _check_model(service: ModelService, request: Request) -> None:
    service.check_model(request.path_params["model"], request.path_params.get("version"))


def _time_left(request: Request, started: float) -> float | None:
    """Return the seconds left of those that the caller grants, or None where the configured time holds.

    Ray Serve's proxy reads the same header, and answers in words of its own when the time is over: ours has to be
    there a little before that.
    """
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise BadRequest(f"{TIMEOUT_HEADER}: {text!r} is not allowed; use a number of seconds above 0")
    return max(seconds - min(0.05 * seconds, 0.1) - (time.monotonic() - started), 0.0)


async def _ping(service: ModelService, request: Request) -> Response:
    if service.failure() is not None:
        return _json({"status": "Unhealthy"}, 500)
    return _json({"status": "Healthy"})


async def _predict(service: ModelService, request: Request) -> Response:
    _check_model(service, request)
    started = time.monotonic()
    with service.admission.hold_bytes() as held:
        body = await read_body(request, service.limits.body_bytes, held)
        payload = await torchserve.decode_payload(request, body)
        reply = await service.predict(payload, _time_left(request, started), held)
    if isinstance(reply, bytes | bytearray | memoryview):
        return Response(bytes(reply), media_type="application/octet-stream")
    if isinstance(reply, str):
        return Response(reply, media_type="text/plain")
    return _json(reply)


async def _list_models(service: ModelService, request: Request) -> Response:
    return _json(torchserve.model_list(service))


async def _describe_model(service: ModelService, request: Request) -> Response:
    _check_model(service, request)
    return _json(torchserve.model_description(service))


async def _server_metadata(service: ModelService, request: Request) -> Response:
    return _json(oip.server_metadata())


async def _live(service: ModelService, request: Request) -> Response:
    return _json({"live": True})


async def _ready(service: ModelService, request: Request) -> Response:
    service.check_ready()
    return _json({"ready": True})


async def _model_metadata(service: ModelService, request: Request) -> Response:
    _check_model(service, request)
    return _json(oip.model_metadata(service))


async def _model_ready(service: ModelService, request: Request) -> Response:
    _check_model(service, request)
    service.check_ready()
    return _json({"name": service.name, "ready": True})


async def _infer(service: ModelService, request: Request) -> Response:
    _check_model(service, request)
    started = time.monotonic()
    with service.admission.hold_bytes() as held:
        body = await read_body(request, service.limits.body_bytes, held)
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        wanted = oip.parse_request(message)
        outputs = await service.infer(wanted.tensors, _time_left(request, started), held)
    return _json(oip.make_response(service, wanted, outputs))
