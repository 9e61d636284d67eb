"""The Open Inference Protocol v2 over REST, JSON tensors: parsing, checking and writing its messages."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deployments.errors import BadRequest, RequestError
from deployments.service import ModelService

#: Datatypes that JSON can carry and numpy knows; BF16 exists only in binary form, BYTES is no tensor's dtype.
NUMPY_TYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
_NAMES = {np.dtype(kind): name for name, kind in NUMPY_TYPES.items()}
_MAX_DIMENSIONS = 16


@dataclass(frozen=True)
class InferRequest:
    """A parsed infer request: arrays by name, the outputs asked for (none: all), and the caller's id."""

    tensors: dict[str, np.ndarray[Any, Any]]
    outputs: tuple[str, ...] = ()
    id: str | None = None


def error_body(error: RequestError) -> dict[str, str]:
    """Return the error as the protocol writes it: `error`, and nothing else."""
    return {"error": str(error)}


def server_metadata() -> dict[str, Any]:
    """Return the reply to GET /v2."""
    try:
        version = importlib.metadata.version("pt2-serve")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        version = "0"
    return {"name": "pt2-serve", "version": version, "extensions": []}


def model_metadata(service: ModelService) -> dict[str, Any]:
    """Return the reply to GET /v2/models/{model}."""

    def describe(infos: Any) -> list[dict[str, Any]]:
        return [{"name": i.name, "datatype": datatype(i.dtype), "shape": list(i.shape)} for i in infos]

    return {
        "name": service.name,
        "versions": [service.version],
        "platform": "pytorch",
        "inputs": describe(service.inputs),
        "outputs": describe(service.outputs),
    }


def datatype(dtype: torch.dtype) -> str:
    """Return the protocol's name of a dtype."""
    if dtype == torch.bfloat16:
        return "BF16"
    return _NAMES[torch.empty(0, dtype=dtype).numpy().dtype]


def parse_request(message: Any) -> InferRequest:
    """Check an infer request and turn its data into arrays; BadRequest names what is wrong."""
    if not isinstance(message, Mapping):
        raise BadRequest("the body must be a JSON object")
    identity = message.get("id")
    if identity is not None and not isinstance(identity, str):
        raise BadRequest(f"id: {identity!r} is not text")
    given = message.get("inputs")
    if not isinstance(given, list) or not given:
        raise BadRequest("inputs: a list with at least one tensor is needed")
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for index, tensor in enumerate(given):
        name, array = _parse_tensor(f"inputs[{index}]", tensor)
        if name in tensors:
            raise BadRequest(f"inputs[{index}].name: {name!r} is given twice")
        tensors[name] = array
    outputs = message.get("outputs") or []
    if not isinstance(outputs, list) or not all(
        isinstance(o, Mapping) and isinstance(o.get("name"), str) for o in outputs
    ):
        raise BadRequest("outputs: a list of objects with a name is needed")
    return InferRequest(tensors, tuple(o["name"] for o in outputs), identity)


def _parse_tensor(path: str, tensor: Any) -> tuple[str, np.ndarray[Any, Any]]:
    if not isinstance(tensor, Mapping):
        raise BadRequest(f"{path}: an object is needed")
    name, shape, kind = tensor.get("name"), tensor.get("shape"), tensor.get("datatype")
    if not isinstance(name, str):
        raise BadRequest(f"{path}.name: text is needed")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape)
    ):
        raise BadRequest(f"{path}.shape: a list of whole numbers from 0, at most {_MAX_DIMENSIONS} of them, is needed")
    if not isinstance(kind, str) or kind not in NUMPY_TYPES:
        raise BadRequest(f"{path}.datatype: {kind!r} is not one of {', '.join(NUMPY_TYPES)}")
    if "data" not in tensor:
        raise BadRequest(f"{path}.data: the tensor's data is needed")
    flat = _to_array(path, tensor["data"], NUMPY_TYPES[kind])
    if flat.size != math.prod(shape):
        raise BadRequest(f"{path}.data: {flat.size} values do not fill the shape {shape}")
    return name, flat.reshape(shape)


def _to_array(path: str, data: Any, kind: type[np.generic]) -> np.ndarray[Any, Any]:
    """Turn nested or flat lists into an array, refusing values that the datatype would change."""
    if not isinstance(data, list):
        raise BadRequest(f"{path}.data: a list is needed")
    if not data:
        return np.empty(0, kind)
    try:
        raw = np.asarray(data)
    except (ValueError, OverflowError) as error:  # rows of different lengths, or numbers beyond 64 bits
        raise BadRequest(f"{path}.data: not a tensor: {error}") from error
    allowed = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[np.dtype(kind).kind]
    if raw.dtype.kind not in allowed:
        raise BadRequest(f"{path}.data: {raw.dtype} values are not {_NAMES[np.dtype(kind)]}")
    if np.dtype(kind).kind in "iu" and raw.size:
        limits = np.iinfo(kind)  # type: ignore[type-var]
        if int(raw.min()) < limits.min or int(raw.max()) > limits.max:
            raise BadRequest(f"{path}.data: values must lie between {limits.min} and {limits.max}")
    with np.errstate(over="ignore"):
        return raw.reshape(-1).astype(kind)


def make_response(
    service: ModelService, request: InferRequest, outputs: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, Any]:
    """Return the reply to an infer request; BadRequest where an output is asked for that the model lacks."""
    wanted = request.outputs or tuple(outputs)
    for name in wanted:
        if name not in outputs:
            raise BadRequest(f"outputs: the model has {', '.join(outputs)}, not {name!r}")
    tensors = [
        {
            "name": name,
            "datatype": _NAMES[outputs[name].dtype],
            "shape": list(outputs[name].shape),
            "data": outputs[name].reshape(-1).tolist(),
        }
        for name in wanted
    ]
    reply: dict[str, Any] = {"model_name": service.name, "model_version": service.version}
    if request.id is not None:
        reply["id"] = request.id
    return {**reply, "outputs": tensors}
