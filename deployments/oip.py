"""The Open Inference Protocol v2 over REST: reading, checking and writing its messages, in JSON and in binary form."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.admission import Held
from deployments.datatypes import (
    check_datatype,
    check_shape,
    datatype,
    from_bytes,
    from_json,
    has_name,
    to_bytes,
    to_json,
)
from deployments.errors import BadRequest, RequestError, Unsupported
from deployments.messages import read_json, to_json_bytes
from deployments.served import Served
from deployments.service import ModelService

#: Header of requests and replies in binary form: how many bytes of the body are JSON; tensors follow.
HEADER_LENGTH = "inference-header-content-length"
#: The BYTES input that stands for requests as /predictions takes them: photos, texts. Any servable has it.
PAYLOAD = "payload"
#: Extensions of Triton that change what an answer is; a client that asks for them must not be answered without.
_UNSUPPORTED = ("shared_memory_region", "classification", "sequence_id")


@dataclass(frozen=True)
class InferRequest:
    """A parsed infer request.

    `tensors` has arrays (BF16: torch tensors) by name, `payloads` the elements of a `payload` input, or None;
    `outputs` those asked for, with whether in binary form (none: all, as `binary` says); `timeout_s` the caller's.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    payloads: list[Any] | None = None
    outputs: dict[str, bool] = field(default_factory=dict)
    binary: bool = False
    id: str | None = None
    timeout_s: float | None = None


def error_body(error: RequestError) -> dict[str, str]:
    """Return the error as the protocol writes it: `error`, and nothing else."""
    return {"error": str(error)}


def server_metadata() -> dict[str, Any]:
    """Return the reply to GET /v2."""
    try:
        version = importlib.metadata.version("pt2-serve")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        version = "0"
    return {"name": "pt2-serve", "version": version, "extensions": ["binary_tensor_data"]}


def tensors_of(service: Served) -> ModelService:
    """Return the service of a model that takes tensors; Unsupported where it is of another kind."""
    if not isinstance(service, ModelService):
        raise Unsupported(f"{service.name} generates text and takes no tensors; ask /v1/completions")
    return service


def model_metadata(service: Served) -> dict[str, Any]:
    """Return the reply to GET /v2/models/{model}; tensors that the protocol cannot carry are not in it."""

    def describe(infos: Any) -> list[dict[str, Any]]:
        return [
            {"name": i.name, "datatype": datatype(i.dtype), "shape": list(i.shape)} for i in infos if has_name(i.dtype)
        ]

    return {
        "name": service.name,
        "versions": [service.version],
        "platform": "pytorch",
        "inputs": describe(service.inputs),
        "outputs": describe(service.outputs),
    }


def parse_length(header: str | None) -> int | None:
    """Return how many bytes of a body are JSON by the header that says so; None for all of them."""
    if header is None:
        return None
    if not (header.isascii() and header.isdigit() and len(header) < 20):
        raise BadRequest(f"{HEADER_LENGTH}: {header!r} is not a number of bytes")
    return int(header)


def read_request(service: ModelService, body: bytes | memoryview, length: int | None) -> InferRequest:
    """Return what an infer request's body asks for; `length` is that of its JSON, None where there is nothing else.

    BadRequest names what is wrong, Unsupported what Triton has and this server has not.
    """
    if length is None:
        return parse_request(read_json(body), memoryview(b""))
    if length > len(body):
        raise BadRequest(f"{HEADER_LENGTH}: {length} bytes of JSON are announced, the body has {len(body)}")
    if length == 0:
        return _read_raw(service, memoryview(body))
    return parse_request(read_json(body[:length]), memoryview(body)[length:])


def _read_raw(service: ModelService, raw: memoryview) -> InferRequest:
    """Return the request whose body is nothing but the data of one row of a model with one input."""
    if len(service.inputs) != 1:
        names = ", ".join(info.name for info in service.inputs)
        raise BadRequest(f"{HEADER_LENGTH}: 0 is for models with one input; this one has {names}")
    info = service.inputs[0]
    kind, row = datatype(info.dtype), list(info.shape[1:])
    if row.count(-1) == 1:
        taken = info.dtype.itemsize * math.prod(size for size in row if size != -1)
        row[row.index(-1)] = len(raw) // taken if taken else 0
    return InferRequest(tensors={info.name: from_bytes(info.name, raw, kind, [1, *row])}, binary=True)


def parse_request(message: Any, raw: memoryview) -> InferRequest:
    """Check an infer request and turn its data, and the binary data behind it, into arrays."""
    if not isinstance(message, dict):
        raise BadRequest("the body must be a JSON object")
    identity = message.get("id")
    if identity is not None and not isinstance(identity, str):
        raise BadRequest(f"id: {identity!r} is not text")
    parameters = read_parameters("parameters", message.get("parameters"))
    given = message.get("inputs")
    if not isinstance(given, list) or not given:
        raise BadRequest("inputs: a list with at least one tensor is needed")
    tensors: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for index, tensor in enumerate(given):
        path = f"inputs[{index}]"
        name, kind, value, raw = _parse_tensor(path, tensor, raw)
        if name in tensors:
            raise BadRequest(f"{path}.name: {name!r} is given twice")
        tensors[name], kinds[name] = value, kind
    if len(raw):
        raise BadRequest(f"{len(raw)} bytes are left behind the binary data of the inputs")
    payloads = take_payloads(tensors, kinds)
    return InferRequest(
        tensors,
        payloads,
        _parse_outputs(message.get("outputs") or [], binary := _flag("parameters", parameters, "binary_data_output")),
        binary,
        identity,
        parse_timeout(parameters),
    )


def take_payloads(tensors: dict[str, Any], kinds: Mapping[str, str]) -> list[Any] | None:
    """Return the elements of the input `payload`, if that is what is given; BYTES goes nowhere else."""
    texts = [name for name, kind in kinds.items() if kind == "BYTES"]
    if not texts:
        return None
    if texts != [PAYLOAD] or len(tensors) > 1:
        raise BadRequest(f"inputs: BYTES is for one input named {PAYLOAD} and no other; got {', '.join(tensors)}")
    found: list[Any] = tensors.pop(PAYLOAD)
    if not found:
        raise BadRequest(f"inputs: {PAYLOAD} has no elements")
    return found


def _parse_tensor(path: str, tensor: Any, raw: memoryview) -> tuple[str, str, Any, memoryview]:
    """Return an input's name, datatype and value, and the binary data that is left for the others."""
    if not isinstance(tensor, dict):
        raise BadRequest(f"{path}: an object is needed")
    name = tensor.get("name")
    if not isinstance(name, str):
        raise BadRequest(f"{path}.name: text is needed")
    shape = check_shape(path, tensor.get("shape"))
    kind = check_datatype(path, tensor.get("datatype"))
    parameters = read_parameters(f"{path}.parameters", tensor.get("parameters"))
    size = parameters.get("binary_data_size")
    if size is None:
        if "data" not in tensor:
            raise BadRequest(f"{path}.data: the tensor's data is needed")
        return name, kind, from_json(path, tensor["data"], kind, shape), raw
    if "data" in tensor:
        raise BadRequest(f"{path}: there is data, and binary_data_size; only one of them is allowed")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(raw):
        raise BadRequest(
            f"{path}.parameters.binary_data_size: {size!r} is not a number of bytes up to the {len(raw)} that are left"
        )
    return name, kind, from_bytes(path, raw[:size], kind, shape), raw[size:]


def _parse_outputs(given: Any, binary: bool) -> dict[str, bool]:
    if not isinstance(given, list) or not all(isinstance(o, dict) and isinstance(o.get("name"), str) for o in given):
        raise BadRequest("outputs: a list of objects with a name is needed")
    outputs = {}
    for index, output in enumerate(given):
        path = f"outputs[{index}].parameters"
        outputs[output["name"]] = _flag(path, read_parameters(path, output.get("parameters")), "binary_data", binary)
    return outputs


def read_parameters(path: str, given: Any) -> Mapping[str, Any]:
    """Return parameters of a request, of a tensor or of an output; Unsupported for those of Triton's own extensions."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise BadRequest(f"{path}: an object is needed")
    for name in _UNSUPPORTED:
        if given.get(name):
            raise Unsupported(f"{path}.{name}: this server does not have it")
    return given


def _flag(path: str, parameters: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadRequest(f"{path}.{name}: {value!r} is not true or false")
    return value


def parse_timeout(parameters: Mapping[str, Any]) -> float | None:
    """Return Triton's `timeout`, whole microseconds (0: none), in seconds."""
    value = parameters.get("timeout", 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise BadRequest(f"parameters.timeout: {value!r} is not a whole number of microseconds")
    return value / 1e6 or None


async def run(
    service: ModelService, request: InferRequest, timeout_s: float | None, held: Held
) -> dict[str, torch.Tensor]:
    """Return the model's outputs, by name, for what a request has."""
    if request.payloads is None:
        return await service.run_tensors(request.tensors, timeout_s, held)
    return await service.run_payloads(request.payloads, timeout_s, held, path=PAYLOAD)


def pick_outputs(request: InferRequest, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the outputs that are asked for, else those that the metadata names.

    BadRequest for one that the model lacks, Unsupported where there is none that the protocol can carry.
    """
    carried = [name for name, value in outputs.items() if has_name(value.dtype)]
    if not request.outputs and not carried:
        raise Unsupported(f"the outputs ({', '.join(outputs)}) have no datatype in the Open Inference Protocol")
    for name in request.outputs:
        if name not in outputs:
            raise BadRequest(f"outputs: the model has {', '.join(outputs)}, not {name!r}")
    return {name: outputs[name] for name in request.outputs or carried}


def weigh_reply(request: InferRequest, outputs: Mapping[str, torch.Tensor]) -> int:
    """Return how much work it is to write a reply, in bytes of JSON: a figure is 20, and 16 bytes copied are one."""
    return sum(
        value.nbytes // 16 if request.outputs.get(name, request.binary) else 20 * value.numel()
        for name, value in outputs.items()
    )


def write_reply(
    service: ModelService, request: InferRequest, outputs: Mapping[str, torch.Tensor]
) -> tuple[bytes, int | None]:
    """Return the body of the reply and, where tensors follow the JSON, how long that is.

    BadRequest where an output is asked for that the model lacks, or that JSON cannot carry.
    """
    tensors: list[dict[str, Any]] = []
    buffers: list[memoryview | bytes] = []
    for name, value in pick_outputs(request, outputs).items():
        if request.outputs.get(name, request.binary):
            kind, shape, raw = to_bytes(value)
            buffers.append(raw)
            tensors.append(
                {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
            )
        else:
            kind, shape, data = to_json(value)
            tensors.append({"name": name, "datatype": kind, "shape": shape, "data": data})
    reply: dict[str, Any] = {"model_name": service.name, "model_version": service.version}
    if request.id is not None:
        reply["id"] = request.id
    text = to_json_bytes({**reply, "outputs": tensors})
    return (b"".join([text, *buffers]), len(text)) if buffers else (text, None)
