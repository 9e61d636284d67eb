"""Replies over HTTP: JSON, and every error in the body that its protocol's clients expect."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from deployments import oip, openai, torchserve
from deployments.body import discard
from deployments.errors import (
    BodyTooSlow,
    DeadlineExceeded,
    Overloaded,
    RequestError,
    Unauthorized,
    Unsupported,
    UnsupportedEncoding,
)
from deployments.messages import to_json_bytes

logger = logging.getLogger(__name__)
Endpoint = Callable[[Request], Awaitable[Response]]


def guard(handler: Endpoint) -> Endpoint:
    """Return a handler whose errors are replies; what is no RequestError is a bug of ours, and its text stays here."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            raise
        except RequestError as error:
            if not isinstance(error, BodyTooSlow):  # whose sender would hold its place that much longer
                await discard(request)
            return error_reply(request, error)
        except Exception:  # the log has its traceback, the client its request id
            return error_reply(request, internal_error(request))

    return endpoint


def internal_error(request: Request) -> RequestError:
    """Log the exception that is being handled, a bug of ours, and return what the client is told of it."""
    name = request.headers.get("x-request-id", "-")
    logger.exception("request %s failed", name)
    return RequestError(f"internal error; the log has it under request {name}")


def make_starlette(routes: Sequence[Route]) -> Starlette:
    """Return the application of these routes; what none of them has gets its protocol's error as well."""
    app = Starlette(routes=routes, exception_handlers={HTTPException: _routing_error})
    app.router.redirect_slashes = False  # it would send clients to wherever their Host header says
    return app


def _routing_error(request: Request, error: Exception) -> Response:
    """Answer for paths and methods that no route has."""
    assert isinstance(error, HTTPException)
    texts = {
        404: f"no such path: {path_of(request)}",
        405: f"{request.method} is not allowed here; use {(error.headers or {}).get('Allow', 'another method')}",
    }
    text = texts.get(error.status_code, str(error.detail))
    return error_reply(request, RequestError(text), status=error.status_code, headers=dict(error.headers or {}))


def error_reply(
    request: Request, error: RequestError, status: int | None = None, headers: dict[str, str] | None = None
) -> Response:
    """Return an error in the shape of the protocol whose path was asked."""
    status = status or error.status
    headers = headers or {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, UnsupportedEncoding):
        headers["Accept-Encoding"] = "gzip, deflate"
    elif isinstance(error, BodyTooSlow):
        headers["Connection"] = "close"
    path = path_of(request)
    if path.startswith("/v2"):
        return json_reply(oip.error_body(error), status, headers)
    if path.startswith("/v1"):
        if isinstance(error, Unsupported | DeadlineExceeded):
            headers["x-should-retry"] = "false"  # OpenAI's clients would ask again, twice
        return json_reply(openai.error_body(error, status), status, headers)
    return json_reply(torchserve.error_body(error, status), status, headers)


def json_reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a reply in JSON; RequestError where JSON cannot carry the content."""
    try:
        body = to_json_bytes(content)
    except ValueError as error:
        raise RequestError("the reply holds NaN or infinity, which JSON cannot carry") from error
    return Response(body, status, headers, media_type="application/json")


def path_of(request: Request) -> str:
    """Return the path below the application's route prefix."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", ""))
