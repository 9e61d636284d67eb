"""`build`: an application that answers for all models at one root, by handing requests over to their handles.

It costs a hop: a model asked at its own application's prefix is one hop away, through the gateway it is two. It looks
at keys before it reads a body, and hands the caller's headers on: the models look as well.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve._private.common import ReplicaState
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments import oip
from deployments.admission import Admission
from deployments.args import AuthArgs, LimitsArgs
from deployments.asgi_call import Headers
from deployments.body import read_body
from deployments.errors import BadRequest, ModelNotFound, NotReady
from deployments.http_host import find_http_host
from deployments.keys import Keys
from deployments.messages import read_json
from deployments.replies import Endpoint, guard, json_reply, make_starlette, path_of
from optim.errors import ConfigError
from optim.strict import read_section

logger = logging.getLogger(__name__)
#: How old the list of models may be before it is looked up again, in seconds.
_FRESH_S = 2.0
#: How long the first request may wait for that list, in seconds.
_PATIENCE_S = 10.0
#: Headers that belong to one connection, or that say what the body was before it was read.
_NOT_HANDED_ON = (b"host", b"connection", b"transfer-encoding", b"content-length", b"content-encoding")


@dataclass(frozen=True, kw_only=True)
class GatewayLimits:
    """What may be on its way to the models."""

    body_bytes: int = LimitsArgs.body_bytes
    """Largest request body, packed or unpacked. Default 16 MiB."""
    body_s: float = LimitsArgs.body_s
    """Seconds until a request's body has to be there. Default 30."""
    bytes_in_flight: int = LimitsArgs.bytes_in_flight
    """Bodies it holds before it answers 503. Default 256 MiB."""


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
    """Check `args` and return the gateway's application."""
    try:
        parsed = parse_args(args)
    except ConfigError as error:
        raise RayServeException(f"configuration error: {error}") from None
    return serve.deployment(name="gateway", max_ongoing_requests=1000)(Gateway).bind(parsed)


def parse_args(args: Any) -> GatewayArgs:
    """Return the gateway's args; ConfigError names the key, the value and what is allowed."""
    parsed = read_section("args", args, GatewayArgs)
    for key, value in asdict(parsed.limits).items():
        if not value > 0:
            raise ConfigError(f"args.limits.{key}", value, "use a number above 0")
    return parsed


class Directory:
    """Which models there are, by name, with a handle to each; belongs to the event loop.

    It is looked up again beside the requests, which meanwhile go by what was found before: Ray Serve's controller may
    be away, and while it builds a new version of an application it does not know what that one has.
    """

    def __init__(self, applications: list[str] | None, own: str) -> None:
        self._applications = applications
        self._own = own
        self._found: dict[str, DeploymentHandle[Any]] = {}
        self._waiting: dict[str, str] = {}
        self._handles: dict[tuple[str, str], DeploymentHandle[Any]] = {}
        self._looked = -math.inf
        self._looking: asyncio.Task[None] | None = None

    async def handles(self) -> dict[str, DeploymentHandle[Any]]:
        """Return the models that can answer; NotReady where they could not be looked up yet."""
        if time.monotonic() - self._looked > _FRESH_S and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look_up())
        if self._looked == -math.inf and self._looking is not None:
            await asyncio.wait([self._looking], timeout=_PATIENCE_S)
            if self._looked == -math.inf:
                raise NotReady("Ray Serve has not yet said which models there are")
        return self._found

    async def find(self, model: str) -> DeploymentHandle[Any]:
        """Return a model's handle; ModelNotFound, or NotReady where it may come yet."""
        found = (await self.handles()).get(model)
        if found is not None:
            return found
        if self._waiting:
            raise NotReady(f"model {model} is not ready: {self._what_waits()}")
        raise ModelNotFound(f"Model not found: {model}")

    async def check_ready(self) -> None:
        """Raise NotReady where an application has no model that can answer."""
        await self.handles()
        if self._waiting:
            raise NotReady(f"not ready: {self._what_waits()}")

    def _what_waits(self) -> str:
        return "; ".join(f"{name} is {status}" for name, status in self._waiting.items())

    async def _look_up(self) -> None:
        try:
            await asyncio.to_thread(self._look)
        except Exception:  # whatever keeps the controller from answering
            logger.exception("the models could not be looked up; those found before stay")
        else:
            self._looked = time.monotonic()

    def _look(self) -> None:
        found: dict[str, DeploymentHandle[Any]] = {}
        waiting: dict[str, str] = {}
        for name, application in sorted(serve.status().applications.items()):
            status = application.status
            if name == self._own or (self._applications is not None and name not in self._applications):
                continue
            if status == ApplicationStatus.DELETING:
                continue
            states = {model: deployment.replica_states for model, deployment in application.deployments.items()}
            models = [model for model, replicas in states.items() if replicas.get(ReplicaState.RUNNING)]
            if not states:  # a version is being built, or could not be: the one before goes on serving
                models = [model for app, model in self._handles if app == name]
            if not models and status in (ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING):
                waiting[name] = status.value
            for model in models:
                if (name, model) not in self._handles:
                    self._handles[name, model] = serve.get_deployment_handle(model, name)
                if model in found:
                    other = found[model].deployment_id.app_name
                    logger.warning("applications %s and %s both have a model %s: the first answers", other, name, model)
                else:
                    found[model] = self._handles[name, model]
        self._found, self._waiting = found, waiting


@serve.ingress()
class Gateway:
    """Answers `/predictions/…`, `/models…`, `/v2/…` and `/v1/…` for every model."""

    def __init__(self, args: GatewayArgs) -> None:
        """Look nothing up yet: models may come later. ConfigError where keys are needed, and there are none."""
        self._args = args
        self._keys = Keys(args.auth, find_http_host(), os.environ)
        self._directory = Directory(args.applications, serve.get_replica_context().app_name)
        self._admission = Admission(1, args.limits.bytes_in_flight)

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
            Route("/v1/embeddings", self._endpoint(self._by_body), methods=["POST"]),
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
        await self._directory.check_ready()
        for reply in await self._ask_all(request):
            if reply.status_code != 200:
                return reply
        return json_reply({"ready": True})

    async def _ask_all(self, request: Request) -> list[Response]:
        """Return what every model answers to a request; applications that are not ours have none."""
        handles = (await self._directory.handles()).values()
        asked = [_hand_over(handle, request, b"") for handle in handles]
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
    except RayServeException as error:  # it has no such method
        raise ModelNotFound(f"Model not found: {handle.deployment_id.name} is none of ours") from error
    reply = Response(content, status)
    reply.raw_headers = found
    return reply
