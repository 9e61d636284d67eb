"""The HTTP application of a replica: one endpoint, one call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments import http_text, oip, openai, openapi, torchserve
from deployments.body import PACKED, pack, read_body
from deployments.deadline import time_left
from deployments.errors import BadRequest
from deployments.generation_service import GenerationService
from deployments.keys import Keys
from deployments.messages import weigh_json, write_answer
from deployments.paths import HEALTH_PATHS, MODEL_PATHS
from deployments.replies import Endpoint, guard, json_reply, make_starlette
from deployments.servable import Encoder
from deployments.served import Served
from deployments.service import ModelService

Handler = Callable[[Any, Request], Awaitable[Response]]
Endpoints = list[tuple[str, str, Handler]]


def make_app(service: Served, keys: Keys | None = None) -> Starlette:
    """Return the ASGI application that answers for one model; without `keys` it lets everybody in."""
    # Starlette tries them in this order, each in about 3 us: what is asked for most comes first.
    own: Endpoints = [
        *(("POST", f"{prefix}/infer", _infer) for prefix in MODEL_PATHS),
        *([("POST", "/v1/embeddings", _embed)] if isinstance(service, ModelService) else []),
    ]
    if isinstance(service, GenerationService):
        own = [
            ("POST", "/v1/completions", http_text.complete),
            ("POST", "/v1/chat/completions", http_text.chat),
            *own,
        ]
    endpoints: Endpoints = [
        *own,
        ("POST PUT", "/predictions/{model}", _predict),  # PUT is what TorchServe's own `curl -T photo.jpg` sends
        ("POST PUT", "/predictions/{model}/{version}", _predict),
        ("GET", "/ping", _ping),
        ("GET", "/v2/health/live", _live),
        ("GET", "/v2/health/ready", _ready),
        *(("GET", f"{prefix}/ready", _model_ready) for prefix in MODEL_PATHS),
        *(("GET", prefix, _model_metadata) for prefix in MODEL_PATHS),
        ("GET", "/v2", _server_metadata),
        ("GET", "/models", _list_models),
        ("GET", "/models/{model}", _describe_model),
        ("GET", "/models/{model}/{version}", _describe_model),
        ("GET", "/v1/models", _list_openai_models),
        ("GET", "/v1/models/{model}", _describe_openai_model),
        ("GET", "/openapi.json", _openapi),
    ]
    routes = [
        Route(path, _endpoint(service, handler, keys, path), methods=methods.split())
        for methods, path, handler in endpoints
    ]
    return make_starlette(routes)


def _endpoint(service: Served, handler: Handler, keys: Keys | None, path: str) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        if keys is not None:
            keys.check(request.headers, health=path in HEALTH_PATHS)
        return await handler(service, request)

    return guard(endpoint)


def _check_model(service: Served, request: Request) -> None:
    service.check_model(request.path_params["model"], request.path_params.get("version"))


async def _ping(service: Served, request: Request) -> Response:
    if service.failure() is not None:
        return json_reply({"status": "Unhealthy"}, 500)
    return json_reply({"status": "Healthy"})


async def _openapi(service: Served, request: Request) -> Response:
    return json_reply(openapi.describe(service, request.scope.get("root_path", "")))


async def _predict(service: Served, request: Request) -> Response:
    _check_model(service, request)
    started = time.monotonic()
    with service.admission.hold_bytes() as held:
        body = bytes(await read_body(request, service.limits, held))
        content_type = request.headers.get("content-type", "")
        if torchserve.may_hold_json(content_type):
            held.grow_to(weigh_json(body))
        payload = await service.aside(len(body), torchserve.decode_payload, content_type, body)
        reply = await service.predict(payload, time_left(request, started), held)
        if isinstance(reply, bytes | bytearray | memoryview):
            return Response(bytes(reply), media_type="application/octet-stream")
        if isinstance(reply, str):
            return Response(reply, media_type="text/plain")
        content = await service.aside(_size_as_json(reply), write_answer, reply)
    return Response(content, media_type="application/json")


def _size_as_json(reply: Any) -> int:
    """Return about how many bytes a reply has as JSON, looking at the first element of a list only."""
    if isinstance(reply, dict):
        return sum(map(_size_as_json, reply.values()))
    if not isinstance(reply, list) or not reply:
        return 0
    return len(reply) * max(_size_as_json(reply[0]), 20)


async def _list_models(service: Served, request: Request) -> Response:
    return json_reply(torchserve.model_list(service))


async def _describe_model(service: Served, request: Request) -> Response:
    version = request.path_params.get("version")
    service.check_model(request.path_params["model"], None if version == "all" else version)  # TorchServe's word
    return json_reply(torchserve.model_description(service))


async def _server_metadata(service: Served, request: Request) -> Response:
    return json_reply(oip.server_metadata())


async def _live(service: Served, request: Request) -> Response:
    return json_reply({"live": True})


async def _ready(service: Served, request: Request) -> Response:
    service.check_ready()
    return json_reply({"ready": True})


async def _model_metadata(service: Served, request: Request) -> Response:
    _check_model(service, request)
    return json_reply(oip.model_metadata(service))


async def _model_ready(service: Served, request: Request) -> Response:
    _check_model(service, request)
    service.check_ready()
    return json_reply({"name": service.name, "ready": True})


async def _infer(service: Served, request: Request) -> Response:
    _check_model(service, request)
    started = time.monotonic()
    tensors = oip.tensors_of(service)
    length = oip.parse_length(request.headers.get(oip.HEADER_LENGTH))
    with service.admission.hold_bytes() as held:
        body = await read_body(request, service.limits, held, lead=length)
        as_json = body if length is None else body[:length]
        with held.more(weigh_json(as_json)):  # what stays are arrays
            wanted = await service.aside(len(as_json), oip.read_request, tensors, body, length)
        left = time_left(request, started)
        outputs = await oip.run(tensors, wanted, wanted.timeout_s if left is None else left, held)
        weight = oip.weigh_reply(wanted, outputs)
        content, json_length = await service.aside(weight, oip.write_reply, tensors, wanted, outputs)
    headers = {} if json_length is None else {oip.HEADER_LENGTH: str(json_length)}
    # Most libraries say of themselves that they can unpack several codings; who names a single one has asked for it.
    coding = request.headers.get("accept-encoding", "").strip().lower()
    if coding in PACKED:
        content = await asyncio.to_thread(pack, content, coding)
        headers["Content-Encoding"] = coding
    kind = "application/json" if json_length is None else "application/octet-stream"
    return Response(content, headers=headers, media_type=kind)


async def _list_openai_models(service: Served, request: Request) -> Response:
    return json_reply({"object": "list", "data": [openai.describe_model(service)]})


async def _describe_openai_model(service: Served, request: Request) -> Response:
    _check_model(service, request)
    return json_reply(openai.describe_model(service))


async def _embed(service: ModelService, request: Request) -> Response:
    started = time.monotonic()
    with service.admission.hold_bytes() as held:
        body = await read_body(request, service.limits, held)
        held.grow_to(weigh_json(body))
        wanted = await service.aside(len(body), openai.read_request, body)
        service.check_model(wanted.model)
        if not isinstance(service.servable, Encoder):
            raise BadRequest(f"model: {wanted.model} makes no embeddings")
        content = await openai.embed(service, wanted, timeout_s=time_left(request, started), held=held)
    return Response(content, media_type="application/json")
