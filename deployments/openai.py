"""OpenAI's API for embeddings: what its clients send, and the replies and errors they read."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deployments.errors import (
    BadRequest,
    ModelNotFound,
    Overloaded,
    RequestError,
    Unauthorized,
    Unsupported,
)
from deployments.messages import is_whole, read_json, read_texts, write_answer
from deployments.servable import Encoder
from deployments.served import Served
from deployments.service import ModelService

_KEYS = ("input", "model", "encoding_format", "dimensions", "user")
_FORMATS = ("float", "base64")
#: `code` of an error; the SDKs decide by status, people by this.
_CODES: dict[type[RequestError], str] = {
    ModelNotFound: "model_not_found",
    Unauthorized: "invalid_api_key",
    Overloaded: "overloaded",
    Unsupported: "unsupported",
}


@dataclass(frozen=True)
class EmbeddingsRequest:
    """What a request to /v1/embeddings asks for: texts, or token ids in their place."""

    inputs: list[Any]
    model: str
    base64: bool = False
    dimensions: int | None = None


def error_body(error: RequestError, status: int) -> dict[str, Any]:
    """Return the error as OpenAI writes it; `param` is the field that the message begins with."""
    named = re.match(r"(\w+)(\[\d+\][.\w]*)?: ", str(error))
    return {
        "error": {
            "message": str(error),
            "type": "invalid_request_error" if status < 500 else "server_error",
            "param": named[1] if named and isinstance(error, BadRequest | Unsupported) else None,
            "code": _CODES.get(type(error)),
        }
    }


def describe_model(service: Served) -> dict[str, Any]:
    """Return the reply to GET /v1/models/{model}."""
    return {"id": service.name, "object": "model", "created": service.started, "owned_by": "pt2-serve"}


def read_request(body: bytes | memoryview) -> EmbeddingsRequest:
    """Return what the body of a request to /v1/embeddings asks for.

    BadRequest names the field, the value and what is allowed.
    """
    message = read_json(body)
    if not isinstance(message, Mapping):
        raise BadRequest("the body must be a JSON object")
    unknown = [key for key in message if key not in _KEYS]
    if unknown:
        raise BadRequest(f"{', '.join(unknown)}: unknown here; allowed are {', '.join(_KEYS)}")
    model = message.get("model")
    if not isinstance(model, str):
        raise BadRequest(f"model: {model!r} is not the name of a model")
    encoding = message.get("encoding_format")
    if encoding is not None and encoding not in _FORMATS:
        raise BadRequest(f"encoding_format: {encoding!r} is not one of {', '.join(_FORMATS)}")
    dimensions = message.get("dimensions")
    if dimensions is not None and (not is_whole(dimensions) or dimensions < 1):
        raise BadRequest(f"dimensions: {dimensions!r} is not a whole number from 1")
    return EmbeddingsRequest(read_texts("input", message.get("input")), model, encoding == "base64", dimensions)


async def embed(service: ModelService, wanted: EmbeddingsRequest, **how: Any) -> bytes:
    """Return the reply to a request, in JSON; `how` goes to `ModelService.run_payloads`."""
    encoder = service.servable
    assert isinstance(encoder, Encoder)
    counts: list[int] = []

    def read(item: str | Sequence[int]) -> Any:
        inputs = encoder.preprocess(item) if isinstance(item, str) else encoder.read_tokens(item)
        counts.append(encoder.count_tokens(inputs))
        return inputs

    outputs = await service.run_payloads(wanted.inputs, path="input", preprocess=read, **how)
    embeddings = next(iter(outputs.values())).float()  # [N, D]
    if (wanted.dimensions or 1) > embeddings.shape[1]:
        raise BadRequest(f"dimensions: {wanted.dimensions} is more than the {embeddings.shape[1]} that the model has")
    if wanted.dimensions is not None:  # the first of them, at length 1, as OpenAI's own models do it
        embeddings = torch.nn.functional.normalize(embeddings[:, : wanted.dimensions], dim=1)
    return await service.aside(20 * embeddings.numel(), _write_reply, wanted, embeddings, sum(counts))


def _write_reply(wanted: EmbeddingsRequest, embeddings: torch.Tensor, tokens: int) -> bytes:
    rows = embeddings.numpy().astype("<f4", copy=False)
    reply = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _write(row, wanted.base64)} for i, row in enumerate(rows)
        ],
        "model": wanted.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return write_answer(reply)


def _write(row: np.ndarray[Any, Any], as_base64: bool) -> Any:
    return base64.b64encode(row.tobytes()).decode() if as_base64 else row.tolist()
