"""`build`: an application that answers for all models at one root, by handing requests over to their handles.

It costs a hop: a model asked at its own application's prefix is one hop away, through the gateway it is two. It looks
at keys before it reads a body, and hands the caller's headers on: the models look as well.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments import oip
from deployments.admission import Admission
from deployments.app import is_the_task_of_ray_serve
from deployments.args import AuthArgs, LimitsArgs
from deployments.asgi_call import hand_over
from deployments.body import read_body
from deployments.directory import Directory
from deployments.driver import stop_serve_run_soon
from deployments.errors import BadRequest, ModelNotFound
from deployments.http_host import find_http_host
from deployments.keys import Keys
from deployments.messages import read_json, weigh_json
from deployments.paths import BY_BODY
from deployments.priority import come_forward
from deployments.replies import Endpoint, guard, json_reply, make_starlette
from deployments.serve_log import share_serve_log
from optim.errors import ConfigError
from optim.strict import read_section

#: Requests that it has at once; half of them may be waiting for their bodies.
_MOST_REQUESTS = 1000


@dataclass(frozen=True, kw_only=True)
class GatewayLimits:
    """What may be on its way to the models."""

    body_bytes: int = LimitsArgs.body_bytes
    """Largest request body, packed or unpacked. Default 16 MiB."""
    body_s: float = LimitsArgs.body_s
    """Seconds until a request's body has to be there. Default 30."""
    bytes_in_flight: int = LimitsArgs.bytes_in_flight
    """Bodies it holds before it answers 503. Default 256 MiB."""
    timeout_s: float | None = None
    """Seconds until a model's reply has to be there, a stream to its end; `x-request-timeout-seconds` replaces it.
    Default none."""


@dataclass(frozen=True, kw_only=True)
class GatewayArgs:
    """The `args` of the gateway's application."""

    applications: list[str] | None = None
    """Names of the applications it answers for; default all others."""
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    """What it holds; the models have limits of their own."""
    auth: AuthArgs = field(default_factory=AuthArgs)
    """Who is let in, before the models look at the same headers: where they have keys of their own, give it all."""


def build(args: Mapping[str, Any]) -> serve.Application:
    """Check `args` and return the gateway's application; errors are those of `deployments.app:build`."""
    try:
        parsed = parse_args(args)
        if is_the_task_of_ray_serve():  # where keys are needed and there are none, say so at once
            Keys(parsed.auth, find_http_host(), os.environ)
    except ConfigError as error:
        stops = "; stopping `serve run`" if stop_serve_run_soon() else ""
        raise RayServeException(f"configuration error: {error}{stops}") from None
    return serve.deployment(name="gateway", max_ongoing_requests=_MOST_REQUESTS)(Gateway).bind(parsed)


def parse_args(args: Any) -> GatewayArgs:
    """Return the gateway's args; ConfigError names the key, the value and what is allowed."""
    parsed = read_section("args", args, GatewayArgs)
    for key, value in asdict(parsed.limits).items():
        if value is not None and not value > 0:  # NaN is not above 0 either
            raise ConfigError(f"args.limits.{key}", value, "use a number above 0")
    return parsed


@serve.ingress()
class Gateway:
    """Answers `/predictions/…`, `/models…`, `/v2/…` and `/v1/…` for every model."""

    def __init__(self, args: GatewayArgs) -> None:
        """Look nothing up yet: models may come later. ConfigError where keys are needed, and there are none."""
        self._args = args
        share_serve_log()
        come_forward()
        self._keys = Keys(args.auth, find_http_host(), os.environ)
        self._directory = Directory(args.applications, serve.get_replica_context().app_name)
        self._admission = Admission(1, args.limits.bytes_in_flight, max_arriving=_MOST_REQUESTS // 2)
        self._ask = partial(hand_over, timeout_s=args.limits.timeout_s)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the HTTP application; Ray Serve calls it when the replica is ready."""
        every = ["GET", "POST", "PUT"]
        routes = [
            Route("/ping", self._endpoint(self._ping, health=True)),
            Route("/models", self._endpoint(self._list_models)),
            Route("/v1/models", self._endpoint(self._list_openai_models)),
            Route("/v2", self._endpoint(self._server)),
            Route("/v2/health/live", self._endpoint(self._live, health=True)),
            Route("/v2/health/ready", self._endpoint(self._ready, health=True)),
            *(Route(path, self._endpoint(self._by_body), methods=["POST"]) for path in BY_BODY),
        ]
        for prefix in ("/predictions", "/models", "/v2/models", "/v1/models"):
            for path in (f"{prefix}/{{model}}", f"{prefix}/{{model}}/{{rest:path}}"):
                routes.append(Route(path, self._endpoint(self._by_path), methods=every))
        return make_starlette(routes)

    def _endpoint(self, handler: Endpoint, *, health: bool = False) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            self._keys.check(request.headers, health=health)
            return await handler(request)

        return guard(endpoint)

    async def check_health(self) -> None:
        """Read a changed file of keys; Ray Serve calls it every few seconds."""
        await asyncio.to_thread(self._keys.refresh)

    async def _by_path(self, request: Request) -> Response:
        started = time.monotonic()
        handle = await self._directory.find(request.path_params["model"])
        with self._admission.hold_bytes() as held:
            body = await read_body(request, self._args.limits, held)
            return await self._ask(handle, request, bytes(body), started)

    async def _by_body(self, request: Request) -> Response:
        started = time.monotonic()
        with self._admission.hold_bytes() as held:
            body = bytes(await read_body(request, self._args.limits, held))
            held.grow_to(weigh_json(body))
            message = read_json(body)
            model = message.get("model") if isinstance(message, dict) else None
            if not isinstance(model, str):
                raise BadRequest(f"model: {model!r} is not the name of a model")
            handle, may_stream = await self._directory.find(model), message.get("stream") is True
            return await self._ask(handle, request, body, started, may_stream=may_stream)

    async def _ping(self, request: Request) -> Response:
        return json_reply({"status": "Healthy"})

    async def _live(self, request: Request) -> Response:
        return json_reply({"live": True})

    async def _server(self, request: Request) -> Response:
        return json_reply(oip.server_metadata())

    async def _ready(self, request: Request) -> Response:
        await self._directory.check_ready()
        for reply in await self._ask_all(request):
            if reply.status_code != 200:
                return reply
        return json_reply({"ready": True})

    async def _ask_all(self, request: Request) -> list[Response]:
        """Return what every running model answers to a request; applications that are not ours have none."""
        started = time.monotonic()
        asked = [self._ask(handle, request, b"", started) for handle in await self._directory.running()]
        replies = await asyncio.gather(*asked, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, ModelNotFound):
                raise reply
        return [reply for reply in replies if isinstance(reply, Response)]

    async def _list_models(self, request: Request) -> Response:
        return await self._join(request, "models", {})

    async def _list_openai_models(self, request: Request) -> Response:
        return await self._join(request, "data", {"object": "list"})

    async def _join(self, request: Request, key: str, rest: dict[str, Any]) -> Response:
        """Put together the lists of the models that let the caller in; who is let in nowhere gets the last refusal."""
        replies = await self._ask_all(request)
        good = [reply for reply in replies if reply.status_code == 200]
        if replies and not good:
            return replies[-1]
        return json_reply({**rest, key: [item for reply in good for item in json.loads(bytes(reply.body))[key]]})
