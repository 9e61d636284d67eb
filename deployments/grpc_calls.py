"""The Open Inference Protocol v2 over gRPC: the calls that a replica answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import torch
from google.protobuf.message import DecodeError

from deployments import oip
from deployments.datatypes import (
    NUMPY_TYPES,
    check_datatype,
    check_elements,
    check_shape,
    from_bytes,
    from_values,
    to_bytes,
)
from deployments.errors import (
    BadRequest,
    BodyTooLarge,
    DeadlineExceeded,
    Forbidden,
    ModelNotFound,
    NotReady,
    Overloaded,
    RequestError,
    Unauthorized,
    Unsupported,
    VersionNotFound,
)
from deployments.inference_messages import message_class
from deployments.keys import Keys
from deployments.message_size import MOST_FIELDS, weigh
from deployments.served import Served
from deployments.service import ModelService

if TYPE_CHECKING:
    from ray.serve.grpc_util import RayServegRPCContext

logger = logging.getLogger(__name__)
_CODES: dict[type[RequestError], grpc.StatusCode] = {
    BadRequest: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    VersionNotFound: grpc.StatusCode.NOT_FOUND,
    BodyTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Overloaded: grpc.StatusCode.UNAVAILABLE,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    Unauthorized: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    Unsupported: grpc.StatusCode.UNIMPLEMENTED,
}
_HEALTH = ("ServerLive", "ServerReady", "ModelReady")
#: The field of `contents` that carries a datatype; FP16 and BF16 are in none.
_FIELDS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class InferenceServicer:
    """The calls, for a deployment that has a service and keys; each takes a request message and returns a reply's.

    Errors become status codes with the same texts as over REST.
    """

    _service: Served
    _keys: Keys

    async def ServerLive(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        """Return whether the server runs."""
        return await self._answer("ServerLive", grpc_context, lambda: {"live": True})

    async def ServerReady(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        """Return whether the model can answer."""
        return await self._answer("ServerReady", grpc_context, lambda: {"ready": self._service.failure() is None})

    async def ModelReady(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        """Return whether the model asked for can answer; NOT_FOUND where it is another one."""

        def answer() -> dict[str, Any]:
            self._service.check_model(request.name, request.version or None)
            return {"ready": self._service.failure() is None}

        return await self._answer("ModelReady", grpc_context, answer)

    async def ServerMetadata(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        """Return the server's name, version, and extensions."""
        return await self._answer("ServerMetadata", grpc_context, lambda: {**oip.server_metadata(), "extensions": []})

    async def ModelMetadata(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        """Return the model's name, version, inputs and outputs."""

        def answer() -> dict[str, Any]:
            self._service.check_model(request.name, request.version or None)
            return oip.model_metadata(self._service)

        return await self._answer("ModelMetadata", grpc_context, answer)

    async def ModelInfer(self, request: bytes, grpc_context: RayServegRPCContext) -> Any:
        """Run tensors, or what a `payload` input holds, through the model."""
        return await self._answer("ModelInfer", grpc_context, lambda: infer(oip.tensors_of(self._service), request))

    async def _answer(
        self,
        call: str,
        context: RayServegRPCContext,
        answer: Callable[[], Mapping[str, Any] | Awaitable[Mapping[str, Any]]],
    ) -> Any:
        reply = message_class(f"{call}Response")
        try:
            metadata = {key.lower(): value for key, value in context.invocation_metadata() if isinstance(value, str)}
            self._keys.check_peer(context.peer())
            self._keys.check(metadata, health=call in _HEALTH, how="the metadata `authorization: Bearer KEY`")
            found = answer()
            return reply(**(await found if isinstance(found, Awaitable) else found))
        except RequestError as error:
            code, text = _CODES.get(type(error), grpc.StatusCode.INTERNAL), str(error)
        except asyncio.CancelledError:
            raise
        except Exception:  # a bug of ours: the log has its traceback, the client its request id
            logger.exception("gRPC request %s failed", context.request_id())
            code, text = grpc.StatusCode.INTERNAL, f"internal error; the log has it under {context.request_id()}"
        # Not raised: Ray Serve would write a traceback to the log for every bad request.
        context.set_code(code)
        context.set_details(text)
        return reply()


async def infer(service: ModelService, raw: bytes) -> dict[str, Any]:
    """Return the fields of the reply to a ModelInferRequest; tensors come back in the form in which they came."""
    size = len(raw)
    if size > service.limits.body_bytes:
        raise BodyTooLarge(f"the message of {size} bytes is over the limit of {service.limits.body_bytes} bytes")
    with service.admission.hold_bytes(size) as held:
        with held.more(weigh(raw)):  # what stays are arrays
            wanted, is_raw = await service.aside(size, _read, service, raw)
        outputs = await oip.run(service, wanted, wanted.timeout_s, held)
    reply: dict[str, Any] = {"model_name": service.name, "model_version": service.version, "id": wanted.id}
    return {**reply, **_write_outputs(wanted, outputs, raw=is_raw)}


def _read(service: ModelService, raw: bytes) -> tuple[oip.InferRequest, bool]:
    """Return what a message asks for, and whether its tensors are in raw form."""
    try:
        message = message_class("ModelInferRequest").FromString(raw)
    except DecodeError as error:
        raise BadRequest(f"the message is no ModelInferRequest: {error}") from error
    service.check_model(message.model_name, message.model_version or None)
    return read_request(message), bool(message.raw_input_contents)


def read_request(message: Any) -> oip.InferRequest:
    """Return what a ModelInferRequest asks for; BadRequest and Unsupported as for REST."""
    raws = message.raw_input_contents
    if raws and len(raws) != len(message.inputs):
        raise BadRequest(f"raw_input_contents: {len(raws)} for {len(message.inputs)} inputs")
    tensors: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for index, tensor in enumerate(message.inputs):
        path = f"inputs[{index}]"
        if tensor.name in tensors:
            raise BadRequest(f"{path}.name: {tensor.name!r} is given twice")
        oip.read_parameters(f"{path}.parameters", _values_of(tensor.parameters))
        kinds[tensor.name] = tensor.datatype
        tensors[tensor.name] = _read_tensor(path, tensor, raws[index] if raws else None)
    if not tensors:
        raise BadRequest("inputs: at least one tensor is needed")
    outputs = {}
    for index, output in enumerate(message.outputs):
        oip.read_parameters(f"outputs[{index}].parameters", _values_of(output.parameters))
        outputs[output.name] = True
    parameters = oip.read_parameters("parameters", _values_of(message.parameters))
    payloads = oip.take_payloads(tensors, kinds)
    return oip.InferRequest(tensors, payloads, outputs, True, message.id, oip.parse_timeout(parameters))


def _values_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    if len(parameters) > MOST_FIELDS:
        raise BadRequest(f"the message has more than {MOST_FIELDS} parameters in one place")
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "", None) for name, value in parameters.items()
    }


def _read_tensor(path: str, tensor: Any, raw: bytes | None) -> Any:
    shape, kind = check_shape(path, tensor.shape[:MOST_FIELDS]), check_datatype(path, tensor.datatype)
    if raw is not None:
        if tensor.HasField("contents"):
            raise BadRequest(f"{path}: there are contents, and raw_input_contents; only one of them is allowed")
        return from_bytes(path, memoryview(raw), kind, shape)
    if kind not in _FIELDS:
        raise BadRequest(f"{path}.datatype: {kind} has a raw form only (raw_input_contents)")
    values = getattr(tensor.contents, _FIELDS[kind])
    if kind == "BYTES":
        check_elements(path, len(values))
        return from_values(path, list(values), kind, shape)
    return from_values(path, np.array(values), kind, shape)


def _write_outputs(
    request: oip.InferRequest, outputs: Mapping[str, torch.Tensor], *, raw: bool
) -> dict[str, Sequence[Any]]:
    tensors, buffers = [], []
    written = {name: to_bytes(value) for name, value in oip.pick_outputs(request, outputs).items()}
    raw = raw or any(kind not in _FIELDS for kind, _, _ in written.values())
    for name, (kind, shape, data) in written.items():
        tensor = message_class("InferTensor")(name=name, datatype=kind, shape=shape)
        if raw:
            buffers.append(bytes(data))
        else:
            getattr(tensor.contents, _FIELDS[kind]).extend(np.frombuffer(data, NUMPY_TYPES[kind]).tolist())
        tensors.append(tensor)
    return {"outputs": tensors, "raw_output_contents": buffers}
