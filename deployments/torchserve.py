"""TorchServe's inference API: how its clients send payloads, and the replies and errors they read."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from deployments.errors import (
    BadRequest,
    BodyTooLarge,
    BodyTooSlow,
    DeadlineExceeded,
    ModelFailed,
    ModelNotFound,
    NotReady,
    Overloaded,
    RequestError,
    Unauthorized,
    UnsupportedEncoding,
    VersionNotFound,
)
from deployments.messages import read_json
from deployments.service import ModelService

#: TorchServe's exception names, by our errors; 405 and unknown paths come from routing.
_TYPES: dict[type[RequestError], str] = {
    BadRequest: "BadRequestException",
    ModelNotFound: "ModelNotFoundException",
    VersionNotFound: "ModelVersionNotFoundException",
    BodyTooLarge: "RequestEntityTooLargeException",
    DeadlineExceeded: "RequestTimeoutException",
    Overloaded: "ServiceUnavailableException",
    NotReady: "ServiceUnavailableException",
    ModelFailed: "InternalServerException",
    BodyTooSlow: "RequestTimeoutException",
    UnsupportedEncoding: "UnsupportedMediaTypeException",
    Unauthorized: "InvalidKeyException",
}
_TYPES_BY_STATUS = {404: "ResourceNotFoundException", 405: "MethodNotAllowedException", 400: "BadRequestException"}


def error_body(error: RequestError, status: int) -> dict[str, Any]:
    """Return the error as TorchServe writes it: code, type, message."""
    kind = _TYPES.get(type(error)) or _TYPES_BY_STATUS.get(status, "InternalServerException")
    return {"code": status, "type": kind, "message": str(error)}


async def decode_payload(request: Request, body: bytes) -> Any:
    """Return what the servable gets: JSON decoded, text as str, the field `data` or `body` of a form, else bytes."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() == "multipart/form-data":
        return await _decode_form(request, body)
    return _decode(content_type, body)


def _decode(content_type: str, body: bytes) -> Any:
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json":
        return read_json(body, with_nan=True)  # Python's clients write it, TorchServe read it
    if kind.startswith("text/"):
        try:
            return body.decode()
        except UnicodeDecodeError as error:
            raise BadRequest(f"the text is not UTF-8: {error}") from error
    return body


async def _decode_form(request: Request, body: bytes) -> Any:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, receive).form(max_files=2, max_fields=16) as form:
            part = form.get("data", form.get("body"))
            if part is None:
                raise BadRequest(f"the form needs a field data or body; it has {', '.join(form) or 'none'}")
            if isinstance(part, UploadFile):
                return _decode(part.content_type or "", await part.read())
            return part
    except HTTPException as error:  # Starlette's word for a malformed form
        raise BadRequest(f"the form cannot be read: {error.detail}") from error
    except (ValueError, LookupError) as error:  # text in a charset that it is not in, or that there is none of
        raise BadRequest(f"the form cannot be read: {error}") from error


def model_list(service: ModelService) -> dict[str, Any]:
    """Return the reply to GET /models."""
    return {"models": [{"modelName": service.name, "modelUrl": service.args.model}]}


def model_description(service: ModelService) -> list[dict[str, Any]]:
    """Return the reply to GET /models/{model}: TorchServe's keys, and the answering replica's compile report."""
    batching = service.args.batching
    return [
        {
            "modelName": service.name,
            "modelVersion": service.version,
            "modelUrl": service.args.model,
            "runtime": "python",
            "batchSize": max(batching.batch_sizes),
            "maxBatchDelay": batching.wait_ms,
            "jobQueueSize": batching.max_queue,
            "responseTimeout": service.limits.timeout_s,
            "loadedAtStartup": True,
            "compileReport": service.report(),
        }
    ]
