"""What sees a request before Ray Serve does, in its proxies and in replicas: `make serve` has it called."""

from __future__ import annotations

from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

#: The caller's deadline as Ray Serve and this server read it, in seconds.
TIMEOUT = "x-request-timeout-seconds"
#: The same, where Ray Serve has been told a later one.
OWN_TIMEOUT = "x-pt2-timeout-seconds"
#: By how much later, in seconds.
_LATER_S = 1.0


class MendHeaders:
    """Makes header values UTF-8, and leaves it to this server to answer when a deadline is over.

    Ray Serve 2.60 decodes the headers that are its own (`x-request-id` and others) without a guard, and answers 500 in
    plain words where they are not UTF-8; a client may send any bytes above 0x7F there. And when the caller's time is
    over it answers 408 in plain words, a moment before ours would be there in the protocol's own: so it is told a
    second more. It still answers where no replica can.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on."""
        if scope["type"] == "http":
            headers: list[tuple[bytes, bytes]] = scope["headers"]
            if not all(value.isascii() for _, value in headers):
                headers = [(name, value.decode("utf-8", "replace").encode()) for name, value in headers]
            if any(name == TIMEOUT.encode() for name, _ in headers):
                headers = _tell_later(headers)
            scope = {**scope, "headers": headers}
        await self.app(scope, receive, send)


def _tell_later(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    mended = [(name, value) for name, value in headers if name != OWN_TIMEOUT.encode()]
    for index, (name, value) in enumerate(mended):
        try:
            seconds = float(value) if name == TIMEOUT.encode() else 0
        except ValueError:
            continue
        if seconds > 0:  # what is not is answered 400
            mended[index] = (name, str(seconds + _LATER_S).encode())
            mended.append((OWN_TIMEOUT.encode(), value))
            break
    return mended


class AnswerLive:
    """Answers /v2/health/live, below any prefix, in a proxy.

    One has it while the first replica still compiles, and would let it wait for that: who restarts what is not live
    would never see it ready.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand a request on."""
        is_asked = scope["type"] == "http" and scope["path"].endswith("/v2/health/live") and scope["method"] == "GET"
        await (JSONResponse({"live": True}) if is_asked else self.app)(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Return what RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH asks for: in a replica what it needs, in a proxy all."""
    try:
        serve.get_replica_context()
    except RayServeException:
        return [Middleware(MendHeaders), Middleware(AnswerLive)]
    return [Middleware(MendHeaders)]
