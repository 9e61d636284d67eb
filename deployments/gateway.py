"""`build`: an application that answers for all models at one root, by handing requests over to their handles.

It costs a hop: a model asked at its own application's prefix is one hop away, through the gateway it is two. Keys are
each model's own affair; the gateway hands the caller's headers on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve._private.common import ReplicaState
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments import oip
from deployments.admission import Admission
from deployments.args import LimitsArgs
from deployments.asgi_call import Headers
from deployments.body import read_body
from deployments.errors import BadRequest, ModelNotFound, NotReady
from deployments.messages import read_json
from deployments.replies import guard, json_reply, path_of, routing_error
from optim.errors import ConfigError
from optim.strict import read_section

logger = logging.getLogger(__name__)
#: How old the list of models may be before it is looked up again, in seconds.
_FRESH_S = 2.0
#: Headers that belong to one connection, or that say what the body was before it was read.
_NOT_HANDED_ON = (b"host", b"connection", b"transfer-encoding", b"content-length", b"content-encoding")


@dataclass(frozen=True, kw_only=True)
class GatewayArgs:
    """The `args` of the gateway's application."""

    applications: list[str] | None = None
    """Names of the applications it answers for; default all others."""
    limits: LimitsArgs = field(default_factory=LimitsArgs)
    """`body_bytes`, `body_s` and `bytes_in_flight` hold for what is handed over; the models have their own as well."""


def build(args: Mapping[str, Any]) -> serve.Application:
    """Check `args` and return the gateway's application."""
    try:
        parsed = parse_args(args)
    except ConfigError as error:
        raise RayServeException(f"configuration error: {error}") from None
    return serve.deployment(name="gateway", max_ongoing_requests=1000)(Gateway).bind(parsed)


def parse_args(args: Any) -> GatewayArgs:
    """Return the gateway's args; ConfigError names the key, the value and what is allowed."""
    return read_section("args", args or {}, GatewayArgs)


class Directory:
    """Which models there are, by name, with a handle to each; belongs to the event loop."""

    def __init__(self, applications: list[str] | None, own: str) -> None:
        self._applications = applications
        self._own = own
        self._found: dict[str, DeploymentHandle[Any]] = {}
        self._handles: dict[tuple[str, str], DeploymentHandle[Any]] = {}
        self._waiting: dict[str, str] = {}
        self._looked = 0.0
        self._lock = asyncio.Lock()

    async def handles(self) -> dict[str, DeploymentHandle[Any]]:
        """Return the models that can answer."""
        async with self._lock:
            if time.monotonic() - self._looked > _FRESH_S:
                await asyncio.to_thread(self._look)
                self._looked = time.monotonic()
        return self._found

    async def find(self, model: str) -> DeploymentHandle[Any]:
        """Return a model's handle; ModelNotFound, or NotReady while none of its replicas can answer."""
        found = (await self.handles()).get(model)
        if found is not None:
            return found
        if model in self._waiting:
            raise NotReady(f"model {model} is not ready: application {self._waiting[model]}")
        raise ModelNotFound(f"Model not found: {model}")

    async def waiting(self) -> dict[str, str]:
        """Return the models none of whose replicas can answer, and what their applications do."""
        await self.handles()
        return self._waiting

    def _look(self) -> None:
        found: dict[str, DeploymentHandle[Any]] = {}
        waiting: dict[str, str] = {}
        for name, application in sorted(serve.status().applications.items()):
            if name == self._own or (self._applications is not None and name not in self._applications):
                continue
            for model, deployment in application.deployments.items():
                if not deployment.replica_states.get(ReplicaState.RUNNING):
                    waiting[model] = f"{name} is {application.status.value}"
                elif model in found:
                    other = found[model].deployment_id.app_name
                    logger.warning("applications %s and %s both have a model %s: the first answers", other, name, model)
                else:
                    if (name, model) not in self._handles:
                        self._handles[name, model] = serve.get_deployment_handle(model, name)
                    found[model] = self._handles[name, model]
        self._found, self._waiting = found, {name: why for name, why in waiting.items() if name not in found}


@serve.ingress()
class Gateway:
    """Answers `/predictions/…`, `/models…`, `/v2/…` and `/v1/…` for every model."""

    def __init__(self, args: GatewayArgs) -> None:
        """Look nothing up yet: models may come later."""
        self._args = args
        self._directory = Directory(args.applications, serve.get_replica_context().app_name)
        self._admission = Admission(1, args.limits.bytes_in_flight)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the HTTP application; Ray Serve calls it when the replica is ready."""
        every = ["GET", "POST", "PUT"]
        routes = [
            Route("/ping", guard(self._ping)),
            Route("/models", guard(self._list_models)),
            Route("/v1/models", guard(self._list_openai_models)),
            Route("/v2", guard(self._server)),
            Route("/v2/health/live", guard(self._live)),
            Route("/v2/health/ready", guard(self._ready)),
            Route("/v1/embeddings", guard(self._by_body), methods=["POST"]),
        ]
        for prefix in ("/predictions", "/models", "/v2/models", "/v1/models"):
            for path in (f"{prefix}/{{model}}", f"{prefix}/{{model}}/{{rest:path}}"):
                routes.append(Route(path, guard(self._by_path), methods=every))
        app = Starlette(routes=routes, exception_handlers={HTTPException: routing_error})
        app.router.redirect_slashes = False
        return app

    async def _by_path(self, request: Request) -> Response:
        handle = await self._directory.find(request.path_params["model"])
        with self._admission.hold_bytes() as held:
            body = await read_body(request, self._args.limits, held)
            return await _hand_over(handle, request, bytes(body))

    async def _by_body(self, request: Request) -> Response:
        with self._admission.hold_bytes() as held:
            body = bytes(await read_body(request, self._args.limits, held))
            message = read_json(body)
            model = message.get("model") if isinstance(message, dict) else None
            if not isinstance(model, str):
                raise BadRequest(f"model: {model!r} is not the name of a model")
            return await _hand_over(await self._directory.find(model), request, body)

    async def _ping(self, request: Request) -> Response:
        return json_reply({"status": "Healthy"})

    async def _live(self, request: Request) -> Response:
        return json_reply({"live": True})

    async def _server(self, request: Request) -> Response:
        return json_reply(oip.server_metadata())

    async def _ready(self, request: Request) -> Response:
        waiting = await self._directory.waiting()
        if waiting:
            raise NotReady(f"not ready: {'; '.join(waiting.values())}")
        for handle in (await self._directory.handles()).values():
            reply = await _hand_over(handle, request, b"")
            if reply.status_code != 200:
                return reply
        return json_reply({"ready": True})

    async def _list_models(self, request: Request) -> Response:
        return await self._join(request, "models", {})

    async def _list_openai_models(self, request: Request) -> Response:
        return await self._join(request, "data", {"object": "list"})

    async def _join(self, request: Request, key: str, rest: dict[str, Any]) -> Response:
        """Put together the lists of the models that let the caller in; who is let in nowhere gets the last refusal."""
        handles = (await self._directory.handles()).values()
        replies = await asyncio.gather(*(_hand_over(handle, request, b"") for handle in handles))
        good = [reply for reply in replies if reply.status_code == 200]
        if replies and not good:
            return replies[-1]
        return json_reply({**rest, key: [item for reply in good for item in json.loads(bytes(reply.body))[key]]})


async def _hand_over(handle: DeploymentHandle[Any], request: Request, body: bytes) -> Response:
    """Ask a model's replica, and return its reply; NotReady where that is lost on the way."""
    headers: Headers = [(key, value) for key, value in request.headers.raw if key.lower() not in _NOT_HANDED_ON]
    headers.append((b"content-length", str(len(body)).encode()))
    path = path_of(request)
    try:
        status, found, content = await handle.answer.remote(request.method, path, headers, body)
    except (RayActorError, DeploymentUnavailableError, BackPressureError) as error:
        logger.warning("a replica of %s was lost: %s", handle.deployment_id, error)
        raise NotReady("the replica that had the request was lost; try again") from error
    reply = Response(content, status)
    reply.raw_headers = found
    return reply
