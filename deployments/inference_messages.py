"""Messages of the Open Inference Protocol v2 over gRPC: package `inference`, as KServe and Triton number its fields.

Built here from the table below, not by a code generator: generated code is tied to a range of protobuf's versions, and
Ray's environment decides which one there is. They live in a pool of their own, so that a process may import Triton's
client, which has messages of the same names, beside them.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = "GRPCInferenceService"
_PARAMETERS = "map InferParameter"
#: Message -> fields in order of their numbers (from 1): name, and type; `*` is repeated, `map` from text.
_MESSAGES: dict[str, list[tuple[str, str]]] = {
    "InferParameter": [
        ("bool_param", "bool"),
        ("int64_param", "int64"),
        ("string_param", "string"),
        ("double_param", "double"),
        ("uint64_param", "uint64"),
    ],
    "InferTensorContents": [
        ("bool_contents", "*bool"),
        ("int_contents", "*int32"),
        ("int64_contents", "*int64"),
        ("uint_contents", "*uint32"),
        ("uint64_contents", "*uint64"),
        ("fp32_contents", "*float"),
        ("fp64_contents", "*double"),
        ("bytes_contents", "*bytes"),
    ],
    "TensorMetadata": [("name", "string"), ("datatype", "string"), ("shape", "*int64")],
    "InferTensor": [
        ("name", "string"),
        ("datatype", "string"),
        ("shape", "*int64"),
        ("parameters", _PARAMETERS),
        ("contents", "InferTensorContents"),
    ],
    "InferRequestedOutput": [("name", "string"), ("parameters", _PARAMETERS)],
    "ServerLiveRequest": [],
    "ServerLiveResponse": [("live", "bool")],
    "ServerReadyRequest": [],
    "ServerReadyResponse": [("ready", "bool")],
    "ModelReadyRequest": [("name", "string"), ("version", "string")],
    "ModelReadyResponse": [("ready", "bool")],
    "ServerMetadataRequest": [],
    "ServerMetadataResponse": [("name", "string"), ("version", "string"), ("extensions", "*string")],
    "ModelMetadataRequest": [("name", "string"), ("version", "string")],
    "ModelMetadataResponse": [
        ("name", "string"),
        ("versions", "*string"),
        ("platform", "string"),
        ("inputs", "*TensorMetadata"),
        ("outputs", "*TensorMetadata"),
    ],
    "ModelInferRequest": [
        ("model_name", "string"),
        ("model_version", "string"),
        ("id", "string"),
        ("parameters", _PARAMETERS),
        ("inputs", "*InferTensor"),
        ("outputs", "*InferRequestedOutput"),
        ("raw_input_contents", "*bytes"),
    ],
    "ModelInferResponse": [
        ("model_name", "string"),
        ("model_version", "string"),
        ("id", "string"),
        ("parameters", _PARAMETERS),
        ("outputs", "*InferTensor"),
        ("raw_output_contents", "*bytes"),
    ],
}
#: The calls; each takes a message of its name with `Request`, and returns one with `Response`.
CALLS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")


def _describe() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="pt2-serve/inference.proto", package=PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field_name, kind) in enumerate(fields, 1):
            field = message.field.add(name=field_name, number=number, label=1)
            if kind.startswith("*"):
                field.label, kind = 3, kind[1:]
            if kind.startswith("map "):
                field.label = 3
                entry = message.nested_type.add(name="".join(map(str.title, field_name.split("_"))) + "Entry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, label=1, type=9)
                _set_type(entry.field.add(name="value", number=2, label=1), kind.removeprefix("map "))
                _set_type(field, f"{name}.{entry.name}")
            else:
                _set_type(field, kind)
        if name == "InferParameter":
            message.oneof_decl.add(name="parameter_choice")
            for field in message.field:
                field.oneof_index = 0
    return file


def _set_type(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    scalar = getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind.upper()}", None)
    if scalar is not None:
        field.type = scalar
    else:
        field.type, field.type_name = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE, f".{PACKAGE}.{kind}"


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_describe())


def _make_classes() -> dict[str, Any]:
    classes = {}
    for name in _MESSAGES:
        classes[name] = message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        classes[name].__module__ = __name__  # where pickle finds it: Ray's Python proxy hands messages on that way
    return classes


_classes = _make_classes()
globals().update(_classes)


def message_class(name: str) -> Any:
    """Return the class of a message of this package by its name."""
    return _classes[name]
