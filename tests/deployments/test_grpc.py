"""The Open Inference Protocol over gRPC as Triton's own client speaks it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from deployments.args import AuthArgs
from deployments.errors import BadRequest, Forbidden
from deployments.grpc_calls import read_request
from deployments.inference_messages import PACKAGE, SERVICE, message_class
from deployments.keys import Keys
from deployments.message_size import weigh
from deployments.service import ModelService
from tests.support import models
from tests.support.grpc_server import listen_grpc
from tests.support.local import serve_locally

ROWS = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
KEY = "k" * 16
OPEN = Keys(AuthArgs(), "127.0.0.1", {})


@pytest.fixture(scope="module")
def tiny() -> Iterator[ModelService]:
    args = {
        "model": "tests.support.servables:Tiny",
        "pt2": {"compile": {"enable": False}},
        "limits": {"body_bytes": 4000, "rows": 16},
    }
    with serve_locally(args) as service:
        yield service


@pytest.fixture(scope="module")
def port(tiny: ModelService) -> Iterator[int]:
    with listen_grpc(tiny, OPEN) as found:
        yield found


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as found:
        yield found


def test_the_proxy_which_is_given_the_calls_does_not_load_torch_for_them() -> None:
    code = "import sys, deployments.grpc; print(*sorted({'torch', 'numpy', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def expected(rows: Any) -> Any:
    with torch.no_grad():
        return models.Mlp().eval()(torch.tensor(rows)).numpy()


def make_input(name: str, values: Any, kind: str) -> Any:
    found = triton.InferInput(name, list(values.shape), kind)
    found.set_data_from_numpy(values)
    return found


def call(port: int, name: str, request: Any) -> Any:
    """Call with our own messages, for what Triton's client does not send."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary(
            f"/{PACKAGE}.{SERVICE}/{name}",
            request_serializer=message_class(f"{name}Request").SerializeToString,
            response_deserializer=message_class(f"{name}Response").FromString,
        )
        return ask(request, timeout=30)


def make_request(**changes: Any) -> Any:
    """Return a request with its tensor in `contents`."""
    tensor = message_class("InferTensor")(name="features", datatype="FP32", shape=[2, 8])
    tensor.contents.fp32_contents.extend(ROWS.reshape(-1).tolist())
    return message_class("ModelInferRequest")(**{"model_name": "tiny", "inputs": [tensor], **changes})


def test_triton_asks_how_the_server_is(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    with pytest.raises(InferenceServerException, match="Model version: 2 does not exist"):
        client.is_model_ready("tiny", "2")
    assert client.get_server_metadata().name == "pt2-serve"
    metadata = client.get_model_metadata("tiny", "1")
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("tiny", ["1"], "pytorch")
    (given,) = metadata.inputs
    assert (given.name, given.datatype, list(given.shape)) == ("features", "FP32", [-1, 8])


@pytest.mark.parametrize("outputs", [None, ["output_0"]])
def test_triton_infers(client: Any, outputs: list[str] | None) -> None:
    asked = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
    reply = client.infer("tiny", [make_input("features", ROWS, "FP32")], outputs=asked, request_id="7")
    assert reply.as_numpy("output_0") == pytest.approx(expected(ROWS), abs=1e-5)
    message = reply.get_response()
    assert (message.id, message.model_name, message.model_version) == ("7", "tiny", "1")


def test_tensors_in_contents_come_back_in_contents(port: int) -> None:
    reply = call(port, "ModelInfer", make_request())
    (output,) = reply.outputs
    assert not reply.raw_output_contents
    assert list(output.contents.fp32_contents) == pytest.approx(expected(ROWS).reshape(-1).tolist(), abs=1e-5)


def test_triton_sends_every_dtype_and_payloads() -> None:
    count = np.array([1, 2**40], np.int64)
    flag = np.array([True, False])
    half = np.array([[1, 2, 3, 4], [0.5, 0, 0, 1]], np.float16)
    inputs = [
        make_input("half", half, "FP16"),
        make_input("brain", half.astype(np.float32), "BF16"),
        make_input("flag", flag, "BOOL"),
        make_input("count", count, "INT64"),
    ]
    args = {"model": "tests.support.servables:Mixed", "pt2": {"compile": {"enable": False}}}
    with (
        serve_locally(args) as service,
        listen_grpc(service, OPEN) as port,
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        reply = client.infer("mixed", inputs)
        for name, kind, wanted in (
            ("half_out", "FP16", half * 2),
            ("brain_out", "BF16", half * 2),
            ("flag_out", "BOOL", ~flag),
            ("count_out", "INT64", count + 1),
        ):
            assert np.array_equal(reply.as_numpy(name), wanted), name
            assert reply.get_output(name).datatype == kind
        payloads = np.array([str(n).encode() for n in range(20)], dtype=np.object_)
        reply = client.infer("mixed", [make_input("payload", payloads, "BYTES")])
        assert reply.as_numpy("count_out").tolist() == list(range(1, 21))
        tensor = message_class("InferTensor")(name="payload", datatype="BYTES", shape=[2])
        tensor.contents.bytes_contents.extend([b"4", b"5"])
        asked = [message_class("InferRequestedOutput")(name="count_out")]
        ours = message_class("ModelInferRequest")(model_name="mixed", inputs=[tensor], outputs=asked)
        assert list(call(port, "ModelInfer", ours).outputs[0].contents.int64_contents) == [5, 6]
        assert service.admission.rows == service.admission.bytes == 0


def parameters(**values: Any) -> Any:
    return {name: message_class("InferParameter")(**value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"model_name": "other"}, "NOT_FOUND", "Model not found: other"),
        ({"model_version": "3"}, "NOT_FOUND", "Model version: 3"),
        ({"inputs": []}, "INVALID_ARGUMENT", "inputs: at least one"),
        ({"raw_input_contents": [b"1", b"2"]}, "INVALID_ARGUMENT", "raw_input_contents: 2 for 1 inputs"),
        ({"raw_input_contents": [b"1"]}, "INVALID_ARGUMENT", "only one of them"),
        ({"outputs": [message_class("InferRequestedOutput")(name="x")]}, "INVALID_ARGUMENT", "has output_0, not 'x'"),
        ({"parameters": parameters(timeout={"string_param": "x"})}, "INVALID_ARGUMENT", "timeout: 'x'"),
        ({"parameters": parameters(timeout={"int64_param": 1})}, "DEADLINE_EXCEEDED", "deadline"),
        ({"parameters": parameters(sequence_id={"int64_param": 1})}, "UNIMPLEMENTED", "sequence_id"),
        ({"raw_input_contents": [b"0" * 5000]}, "RESOURCE_EXHAUSTED", "over the limit of 4000 bytes"),
    ],
)
def test_errors_have_their_codes(port: int, change: Any, code: str, message: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(port, "ModelInfer", make_request(**change))
    assert caught.value.code().name == code
    assert message in caught.value.details()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datatype": "FP33"}, "'FP33' is not one of BOOL"),
        ({"datatype": "FP16"}, "FP16 has a raw form only"),
        ({"datatype": "INT64"}, "0 values do not fill"),
        ({"shape": [2, -8]}, "inputs[0].shape"),
        ({"shape": [16, 1]}, "expected float32 [-1, 8], got float32 [16, 1]"),
        ({"shape": [2, 7]}, "16 values do not fill the shape [2, 7]"),
    ],
)
def test_errors_of_tensors_name_what_is_wrong(port: int, change: Any, message: str) -> None:
    request = make_request()
    for name, value in change.items():
        if name == "shape":
            del request.inputs[0].shape[:]
            request.inputs[0].shape.extend(value)
        else:
            setattr(request.inputs[0], name, value)
    with pytest.raises(grpc.RpcError) as caught:
        call(port, "ModelInfer", request)
    assert caught.value.code().name == "INVALID_ARGUMENT"
    assert message in caught.value.details()


def send(port: int, raw: bytes) -> grpc.RpcError:
    """Send bytes as a ModelInferRequest and return the error."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary(f"/{PACKAGE}.{SERVICE}/ModelInfer", lambda given: given, lambda given: given)
        with pytest.raises(grpc.RpcError) as caught:
            ask(raw, timeout=30)
    return caught.value


@pytest.mark.parametrize(
    "raw", [b"\xff" * 50, b"\x0a", b"\x0a\x7fshort", b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x07"]
)
def test_bytes_that_are_no_message_are_the_callers_fault(port: int, raw: bytes) -> None:
    error = send(port, raw)
    assert (error.code().name, "is no ModelInferRequest" in error.details()) == ("INVALID_ARGUMENT", True)


def test_a_message_of_countless_tensors_is_not_unpacked(port: int) -> None:
    error = send(port, b"\x2a\x00" * 1001)
    assert error.details() == "the message has more than 1000 fields"
    assert send(port, b"\x2a\x00" * 1000).details() != error.details()


def test_a_message_counts_as_what_it_becomes() -> None:
    request = make_request()
    # Name and datatype (two fields), two sizes in one, and 16 figures.
    assert 12 * 64 + 4 * 90 < weigh(request.SerializeToString()) < 12 * 64 + 7 * 90 + 24 * 40
    tensor = message_class("InferTensor")(name="features", datatype="FP32", shape=[2, 8])
    raw = message_class("ModelInferRequest")(inputs=[tensor], raw_input_contents=[bytes(6400)])
    assert 6400 < weigh(raw.SerializeToString()) < 6400 + 24 * 40
    photo = message_class("InferTensor")(name="payload", datatype="BYTES", shape=[1])
    photo.contents.bytes_contents.append(bytes(100_000))
    numbers = message_class("InferTensor")(name="count", datatype="INT64", shape=[100_000])
    numbers.contents.int64_contents.extend([1] * 100_000)
    for tensor, weight in ((photo, 100_000), (numbers, 2_400_000)):
        raw = message_class("ModelInferRequest")(inputs=[tensor]).SerializeToString()
        assert weight < weigh(raw) < weight + 2000
        assert weigh(raw + b"\x3a\xff\xff\xff\xff\x0f") > weight  # a length that is not there: refused later
    sizes = b"\x18\x01" * 100_000  # a shape that is not packed: a field for each size
    raw = b"\x2a\xc0\x9a\x0c" + sizes
    assert weigh(raw) == 90 * 10_000 + 24 * (len(sizes) - 10_000), "no more of them are looked at one by one"
    photo.contents.bytes_contents.extend([b""] * 20_000)
    raw = message_class("ModelInferRequest")(inputs=[photo]).SerializeToString()
    assert weigh(raw) > 90 * 10_000 + 24 * 20_000


def test_countless_parameters_and_sizes_of_one_tensor_are_refused() -> None:
    request = make_request()
    for number in range(1001):
        request.inputs[0].parameters[str(number)].bool_param = True
    with pytest.raises(BadRequest, match="more than 1000 parameters in one place"):
        read_request(request)
    request = make_request()
    request.inputs[0].shape.extend([1] * 100_000)
    with pytest.raises(BadRequest, match="at most 16 of them"):
        read_request(request)


def test_nothing_is_unpacked_for_who_has_no_key(tiny: ModelService) -> None:
    with listen_grpc(tiny, Keys(AuthArgs(), "0.0.0.0", {"PT2_API_KEYS": KEY})) as port:
        assert send(port, b"\xff" * 50).code().name == "UNAUTHENTICATED"


def test_keys_come_as_metadata(tiny: ModelService) -> None:
    given = [make_input("features", ROWS, "FP32")]
    with (
        listen_grpc(tiny, Keys(AuthArgs(), "0.0.0.0", {"PT2_API_KEYS": KEY})) as port,
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        assert client.is_server_live()
        assert client.is_model_ready("tiny")
        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
            assert client.infer("tiny", given, headers=headers).as_numpy("output_0").shape == (2, 4)
        with pytest.raises(InferenceServerException, match="a key is needed") as caught:
            client.infer("tiny", given)
        assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
        with pytest.raises(InferenceServerException, match="a key is needed"):
            client.get_model_metadata("tiny", headers={"x-api-key": "x" * 16})


def test_without_keys_only_callers_on_the_same_machine_are_answered() -> None:
    for peer in ("ipv4:127.0.0.1:4711", "ipv6:%5B::1%5D:4711", "ipv6:[::ffff:127.0.0.1]:4711", "unix:", "unix:/x"):
        OPEN.check_peer(peer)
    for peer in ("ipv4:10.0.0.7:4711", "ipv6:%5Bfe80::1%5D:4711", "ipv6:[::ffff:10.0.0.1]:1", "", "127.0.0.1"):
        with pytest.raises(Forbidden, match="same machine"):
            OPEN.check_peer(peer)
    Keys(AuthArgs(), "127.0.0.1", {"PT2_API_KEYS": KEY}).check_peer("ipv4:10.0.0.7:4711")
    Keys(AuthArgs(required=False), "127.0.0.1", {}).check_peer("ipv4:10.0.0.7:4711")
