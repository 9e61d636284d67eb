"""The OpenAPI description of what a model answers, served at /openapi.json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deployments import oip, openapi_text
from deployments.datatypes import DATATYPES
from deployments.generation_service import GenerationService
from deployments.paths import HEALTH_PATHS, MODEL_PATHS
from deployments.servable import Encoder
from deployments.served import Served
from deployments.service import ModelService

Json = dict[str, Any]
_TEXT: Json = {"type": "string"}
_TEXTS: Json = {"type": "array", "items": _TEXT}
_TEXT_OR_NULL: Json = {"type": ["string", "null"]}
_FLAG: Json = {"type": "boolean"}
_WHOLE: Json = {"type": "integer"}
_ANY: Json = {}
#: What the statuses mean, of any path.
_MEANINGS = {
    400: "the request is wrong; the message names what",
    401: "a key is needed, or the one given is wrong",
    404: "no such path, model or version",
    408: "the deadline passed, or the body was too slow",
    413: "the body is over `limits.body_bytes`",
    415: "the body is packed in a way that is not known here",
    500: "the model failed",
    501: "the protocol has it, this server has not",
    503: "the queue is full (Retry-After says when to try again), or the model cannot answer any more",
}
_LOOKUP, _BODY = (401, 404), (400, 401, 404, 408, 413, 415, 500, 501, 503)


def describe(service: Served, root: str = "") -> Json:
    """Return the description for one model below a root; its names, version, inputs and outputs are in it."""
    names = {"model": service.name, "version": service.version}
    paths: Json = {}

    def add(path: str, method: str, text: str, ok: Json, statuses: Iterable[int], body: Json | None = None) -> None:
        parameters = [_in_path(name, value) for name, value in names.items() if f"{{{name}}}" in path]
        if method != "get":
            parameters = [*parameters, _TIMEOUT, *([_JSON_LENGTH] if path.endswith("/infer") else [])]
        error = _ERRORS["v2" if path.startswith("/v2") else "v1" if path.startswith("/v1") else "torchserve"]
        responses: Json = {"200": {"description": "the answer", "content": ok}}
        is_open = path in HEALTH_PATHS and service.args.auth.open_health
        if path in HEALTH_PATHS and not is_open:
            statuses = (401, *statuses)
        for status in statuses:
            is_ping = (path, status) == ("/ping", 500)  # the status in words, as TorchServe has it
            responses[str(status)] = {
                "description": _MEANINGS[status],
                "content": _json(_object(status=_TEXT) if is_ping else error),
            }
        operation = {"summary": text, "parameters": parameters, "responses": responses}
        if body is not None:
            operation["requestBody"] = {"required": True, "content": body}
        if is_open:
            operation["security"] = []
        paths.setdefault(path, {})[method] = operation

    for path in ("/predictions/{model}", "/predictions/{model}/{version}"):
        for method in ("post", "put"):
            add(
                path, method, "Answer one request in the model's own terms", {"*/*": {"schema": _ANY}}, _BODY, _PAYLOADS
            )
    add("/ping", "get", "Whether the model can answer", _json(_object(status=_TEXT)), (500,))
    add("/models", "get", "The model", _json(_object(models={"type": "array", "items": {"type": "object"}})), (401,))
    for path in ("/models/{model}", "/models/{model}/{version}"):
        described = {"type": "array", "items": {"type": "object"}}
        add(path, "get", "The model, and the compile report of the replica that answers", _json(described), _LOOKUP)
    add("/v2", "get", "The server", _json(_object(name=_TEXT, version=_TEXT, extensions=_TEXTS)), (401,))
    add("/v2/health/live", "get", "Whether the server runs", _json(_object(live=_FLAG)), ())
    add("/v2/health/ready", "get", "Whether the model can answer", _json(_object(ready=_FLAG)), (503,))
    for path in MODEL_PATHS:
        add(path, "get", "The model's inputs and outputs", _json(_METADATA), _LOOKUP)
        ready = _object(name=_TEXT, ready=_FLAG)
        add(f"{path}/ready", "get", "Whether the model can answer", _json(ready), (404, 503))
        answer = {**_json(_infer_answer()), "application/octet-stream": {"schema": _ANY}}
        if isinstance(service, ModelService):
            add(f"{path}/infer", "post", _infer_text(service), answer, _BODY, _infer_body(service))
    described = _object(id=_TEXT, object=_TEXT, created=_WHOLE, owned_by=_TEXT)
    listed = _object(object=_TEXT, data={"type": "array", "items": described})
    add("/v1/models", "get", "The model", _json(listed), (401,))
    add("/v1/models/{model}", "get", "The model", _json(described), _LOOKUP)
    if isinstance(service, ModelService) and isinstance(service.servable, Encoder):
        add(
            "/v1/embeddings", "post", "Embeddings of texts", _json(_EMBEDDINGS), _BODY, _json(_embeddings_body(service))
        )
    if isinstance(service, GenerationService):
        text = "Continue texts, whole or by server-sent events"
        body = _json(openapi_text.completion_body(service))
        add("/v1/completions", "post", text, openapi_text.answer(chat=False), _BODY, body)
        text = "Answer a chat, whole or by server-sent events"
        add(
            "/v1/chat/completions",
            "post",
            text,
            openapi_text.answer(chat=True),
            _BODY,
            _json(openapi_text.chat_body(service)),
        )
    return {
        "openapi": "3.1.0",
        "info": {"title": f"pt2-serve: {service.name}", "version": service.version},
        "servers": [{"url": root or "/"}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _in_path(name: str, value: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": [value]}}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


_TIMEOUT: Json = {
    "name": "x-request-timeout-seconds",
    "in": "header",
    "description": "Seconds until 408 is answered.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
_JSON_LENGTH: Json = {
    "name": oip.HEADER_LENGTH,
    "in": "header",
    "description": "Of a body in binary form: how many bytes are JSON; the tensors' follow. 0: one tensor's alone.",
    "schema": {"type": "integer", "minimum": 0},
}
_ERRORS: dict[str, Json] = {
    "torchserve": _object(code=_WHOLE, type=_TEXT, message=_TEXT),
    "v2": _object(error=_TEXT),
    "v1": _object(error=_object(message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL)),
}
_PAYLOADS: Json = {
    "application/json": {"schema": _ANY},
    "text/plain": {"schema": _TEXT},
    "application/octet-stream": {"schema": _ANY},
    "multipart/form-data": {"schema": {"anyOf": [_object(data=_TEXT), _object(body=_TEXT)]}},
    "application/x-www-form-urlencoded": {"schema": {"anyOf": [_object(data=_TEXT), _object(body=_TEXT)]}},
}
_TENSOR_METADATA = _object(name=_TEXT, datatype=_TEXT, shape={"type": "array", "items": _WHOLE})
_METADATA = _object(
    name=_TEXT,
    versions=_TEXTS,
    platform=_TEXT,
    inputs={"type": "array", "items": _TENSOR_METADATA},
    outputs={"type": "array", "items": _TENSOR_METADATA},
)
_EMBEDDINGS = _object(
    object=_TEXT,
    model=_TEXT,
    data={
        "type": "array",
        "items": _object(
            object=_TEXT, index=_WHOLE, embedding={"oneOf": [_TEXT, {"type": "array", "items": {"type": "number"}}]}
        ),
    },
    usage=_object(prompt_tokens=_WHOLE, total_tokens=_WHOLE),
)


def _infer_text(service: ModelService) -> str:
    inputs = ", ".join(f"{i['name']} {i['datatype']} {i['shape']}" for i in oip.model_metadata(service)["inputs"])
    return f"Run tensors through the model: {inputs}; or BYTES named {oip.PAYLOAD}, requests as /predictions takes them"


def _infer_body(service: ModelService) -> Json:
    tensor = _object(
        name={"type": "string", "enum": [*(info.name for info in service.inputs), oip.PAYLOAD]},
        datatype={"type": "string", "enum": list(DATATYPES)},
        shape={"type": "array", "items": {"type": "integer", "minimum": 0}},
    )
    tensor["properties"] = {**tensor["properties"], "data": {"type": "array"}, "parameters": {"type": "object"}}
    body = _object(inputs={"type": "array", "items": tensor, "minItems": 1})
    output = _object(name=_TEXT)
    output["properties"] = {**output["properties"], "parameters": {"type": "object"}}
    body["properties"] = {
        **body["properties"],
        "id": _TEXT,
        "parameters": {"type": "object"},
        "outputs": {"type": "array", "items": output},
    }
    return {**_json(body), "application/octet-stream": {"schema": _ANY}}


def _infer_answer() -> Json:
    tensor = _object(name=_TEXT, datatype=_TEXT, shape={"type": "array", "items": _WHOLE})
    return _object(model_name=_TEXT, model_version=_TEXT, outputs={"type": "array", "items": tensor})


def _embeddings_body(service: ModelService) -> Json:
    tokens = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    body = _object(
        model={"type": "string", "enum": [service.name]},
        input={
            "oneOf": [
                _TEXT,
                {**_TEXTS, "minItems": 1, "maxItems": service.limits.items},
                tokens,
                {"type": "array", "items": tokens, "minItems": 1},
            ]
        },
    )
    more = {
        "encoding_format": {"type": "string", "enum": ["float", "base64"]},
        "dimensions": {"type": "integer", "minimum": 1},
        "user": _TEXT,
    }
    return {**body, "properties": {**body["properties"], **more}, "additionalProperties": False}
