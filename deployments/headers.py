"""Request headers that Ray Serve would stumble over, mended before it reads them."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send


class CleanHeaders:
    """Makes every header value one that is UTF-8, by replacing the bytes that are not.

    Ray Serve 2.60 decodes those that are its own (`x-request-id` and others) without a guard, and answers 500 in plain
    words where they are not UTF-8. A client may send any bytes above 0x7F there.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on."""
        if scope["type"] == "http" and not all(value.isascii() for _, value in scope["headers"]):
            headers = [(name, value.decode("utf-8", "replace").encode()) for name, value in scope["headers"]]
            scope = {**scope, "headers": headers}
        await self.app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Return what RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, set by `make serve`, asks for."""
    return [Middleware(CleanHeaders)]
