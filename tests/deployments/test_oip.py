"""The Open Inference Protocol as Triton's own client speaks it, over real sockets."""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from starlette.testclient import TestClient
from tritonclient.utils import InferenceServerException

from deployments.http import make_app
from deployments.service import ModelService
from tests.support import models
from tests.support.http_server import listen
from tests.support.local import serve_locally

ROWS = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
INFER = "/v2/models/tiny/infer"
LENGTH = "inference-header-content-length"


@pytest.fixture(scope="module")
def tiny() -> Iterator[ModelService]:
    args = {"model": "tests.support.servables:Tiny", "pt2": {"compile": {"enable": False}}, "limits": {"items": 40}}
    with serve_locally(args) as service:
        yield service


@pytest.fixture(scope="module")
def mixed() -> Iterator[ModelService]:
    with serve_locally({"model": "tests.support.servables:Mixed", "pt2": {"compile": {"enable": False}}}) as service:
        yield service


@pytest.fixture(scope="module")
def http(tiny: ModelService) -> Iterator[TestClient]:
    with TestClient(make_app(tiny)) as client:
        yield client


@pytest.fixture(scope="module")
def client(tiny: ModelService) -> Iterator[Any]:
    with listen(make_app(tiny)) as port:
        found = triton.InferenceServerClient(f"127.0.0.1:{port}")
        yield found
        found.close()


def expected(rows: Any) -> Any:
    with torch.no_grad():
        return models.Mlp().eval()(torch.tensor(rows)).numpy()


def make_input(binary: bool = True) -> Any:
    features = triton.InferInput("features", [2, 8], "FP32")
    features.set_data_from_numpy(ROWS, binary_data=binary)
    return features


def test_triton_asks_how_the_server_is(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("tiny", "2")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.get_model_metadata("tiny")["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, 8]}]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_triton_infers(client: Any, binary_in: bool, binary_out: bool | None, coding: str | None) -> None:
    outputs = None if binary_out is None else [triton.InferRequestedOutput("output_0", binary_data=binary_out)]
    reply = client.infer(
        "tiny",
        [make_input(binary_in)],
        model_version="1",
        outputs=outputs,
        request_id="7",
        request_compression_algorithm=coding,
        response_compression_algorithm=coding,
    )
    assert reply.as_numpy("output_0") == pytest.approx(expected(ROWS), abs=1e-5)
    message = reply.get_response()
    assert (message["id"], message["model_name"], message["model_version"]) == ("7", "tiny", "1")
    assert ("data" in message["outputs"][0]) == (binary_out is False)


def test_triton_infers_asynchronously(tiny: ModelService) -> None:
    async def ask(port: int) -> Any:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{port}") as client:
            replies = await asyncio.gather(*(client.infer("tiny", [make_input()]) for _ in range(8)))
            return [reply.as_numpy("output_0") for reply in replies]

    with listen(make_app(tiny)) as port:
        for found in asyncio.run(ask(port)):
            assert found == pytest.approx(expected(ROWS), abs=1e-5)
        waiting = triton.InferenceServerClient(f"127.0.0.1:{port}", concurrency=4)
        for pending in [waiting.async_infer("tiny", [make_input()]) for _ in range(4)]:
            assert pending.get_result().as_numpy("output_0") == pytest.approx(expected(ROWS), abs=1e-5)
        waiting.close()


def test_triton_reads_our_errors(client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("tiny", [make_input()], model_version="9")
    assert (caught.value.status(), caught.value.message()) == (
        "404",
        "Model version: 9 does not exist for model: tiny",
    )
    wrong = triton.InferInput("features", [2, 8], "INT64")
    wrong.set_data_from_numpy(ROWS.astype(np.int64))
    with pytest.raises(InferenceServerException, match="expected float32"):
        client.infer("tiny", [wrong])
    with pytest.raises(InferenceServerException, match="sequence_id: this server does not have it") as caught:
        client.infer("tiny", [make_input()], sequence_id=5)
    assert caught.value.status() == "501"
    with pytest.raises(InferenceServerException) as caught:
        client.infer("tiny", [make_input()], outputs=[triton.InferRequestedOutput("output_0", class_count=3)])
    assert caught.value.status() == "501"


def test_triton_sends_every_dtype(mixed: ModelService) -> None:
    count = np.array([1, 2**40], np.int64)
    flag = np.array([True, False])
    half = np.array([[1, 2, 3, 4], [0.5, 0, 0, 1]], np.float16)
    inputs = []
    for name, kind, value in (
        ("half", "FP16", half),
        ("brain", "BF16", half.astype(np.float32)),
        ("flag", "BOOL", flag),
        ("count", "INT64", count),
    ):
        inputs.append(triton.InferInput(name, list(value.shape), kind))
        inputs[-1].set_data_from_numpy(value)
    with listen(make_app(mixed)) as port:
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        kinds = {output["name"]: output["datatype"] for output in client.get_model_metadata("mixed")["outputs"]}
        assert kinds == {"half_out": "FP16", "brain_out": "BF16", "flag_out": "BOOL", "count_out": "INT64"}
        reply = client.infer("mixed", inputs)
        for name, wanted in (
            ("half_out", half * 2),
            ("brain_out", half * 2),
            ("flag_out", ~flag),
            ("count_out", count + 1),
        ):
            assert np.array_equal(reply.as_numpy(name), wanted), name
            assert reply.get_output(name)["datatype"] == kinds[name]
        # JSON has no BF16: the figures come as FP32, and say so.
        reply = client.infer("mixed", inputs, outputs=[triton.InferRequestedOutput("brain_out", binary_data=False)])
        assert reply.get_output("brain_out")["datatype"] == "FP32"
        assert np.array_equal(reply.as_numpy("brain_out"), half * 2)
        client.close()


def test_a_payload_is_what_predictions_take(client: Any, tiny: ModelService, mixed: ModelService) -> None:
    payloads = np.array([str(n).encode() for n in range(30)], dtype=np.object_)
    with listen(make_app(mixed)) as port:
        numbers = triton.InferenceServerClient(f"127.0.0.1:{port}")
        for binary in (True, False):
            given = triton.InferInput("payload", [30], "BYTES")
            given.set_data_from_numpy(payloads, binary_data=binary)
            reply = numbers.infer("mixed", [given])
            assert reply.as_numpy("count_out").tolist() == list(range(1, 31))
            assert reply.as_numpy("half_out").shape == (30, 4)
        given.set_data_from_numpy(np.array([b"1", b"x"] * 15, dtype=np.object_))
        with pytest.raises(InferenceServerException, match=r"payload\[1\]: the request cannot be read: ValueError"):
            numbers.infer("mixed", [given])
        numbers.close()
    assert mixed.admission.rows == mixed.admission.bytes == 0


def test_a_list_of_payloads_takes_no_more_of_the_queue_than_two_buckets(mixed: ModelService) -> None:
    seen = []

    async def ask() -> None:
        async def look() -> None:
            while True:
                seen.append(mixed.admission.rows)
                await asyncio.sleep(0)

        looking = asyncio.create_task(look())
        outputs = await mixed.run_payloads([str(n) for n in range(200)], path="payload")
        assert outputs["count_out"].tolist() == list(range(1, 201))
        looking.cancel()

    asyncio.run(ask())
    assert max(seen) == 16


def test_the_raw_data_of_one_input_is_enough(http: TestClient) -> None:
    reply = http.post(INFER, content=ROWS[:1].tobytes(), headers={LENGTH: "0"})
    assert reply.status_code == 200, reply.text
    length = int(reply.headers[LENGTH])
    assert reply.headers["content-type"] == "application/octet-stream"
    (output,) = json.loads(reply.content[:length])["outputs"]
    assert output == {"name": "output_0", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}
    assert np.frombuffer(reply.content[length:], np.float32) == pytest.approx(expected(ROWS[:1])[0], abs=1e-5)
    assert http.post(INFER, content=b"\0" * 31, headers={LENGTH: "0"}).status_code == 400


def binary(message: Any, raw: bytes = b"", length: str | None = None) -> dict[str, Any]:
    text = json.dumps(message).encode()
    return {"content": text + raw, "headers": {LENGTH: str(len(text)) if length is None else length}}


def one_input(size: Any = 64, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "features", "shape": [2, 8], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    return {"inputs": [{**tensor, **changes}]}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (binary(one_input(), ROWS.tobytes()[:-1]), "64 is not a number of bytes up to the 63 that are left"),
        (binary(one_input(), ROWS.tobytes() + b"\0"), "1 bytes are left behind the binary data"),
        (binary(one_input(-1), ROWS.tobytes()), "-1 is not a number of bytes"),
        (binary(one_input(True), ROWS.tobytes()), "True is not a number of bytes"),
        (binary(one_input(shape=[2, 7]), ROWS.tobytes()), "64 bytes do not fill FP32 [2, 7]"),
        (binary(one_input(data=[1]), ROWS.tobytes()), "only one of them"),
        (binary(one_input(parameters=5), b""), "inputs[0].parameters: an object is needed"),
        (binary(one_input(datatype="BYTES"), ROWS.tobytes()), "announced"),
        (binary(one_input(0, datatype="BYTES", shape=[0])), "BYTES is for one input named payload"),
        (binary(one_input(0, name="payload", datatype="BYTES", shape=[0])), "payload has no elements"),
        (binary(one_input(), ROWS.tobytes(), "-3"), "'-3' is not a number of bytes"),
        (binary(one_input(), ROWS.tobytes(), "9" * 30), "is not a number of bytes"),
        (binary(one_input(), ROWS.tobytes(), "9999"), "9999 bytes of JSON are announced"),
        (binary({**one_input(), "parameters": {"binary_data_output": 1}}, ROWS.tobytes()), "1 is not true or false"),
        (binary({**one_input(), "parameters": {"timeout": "x"}}, ROWS.tobytes()), "timeout: 'x'"),
        (binary({**one_input(), "outputs": [{"name": "nope"}]}, ROWS.tobytes()), "the model has output_0, not 'nope'"),
    ],
)
def test_errors_of_the_binary_form_name_what_is_wrong(http: TestClient, request_: dict[str, Any], message: str) -> None:
    reply = http.post(INFER, **request_)
    assert reply.status_code == 400
    assert set(reply.json()) == {"error"}
    assert message in reply.json()["error"]


def test_too_many_payloads_are_refused(http: TestClient) -> None:
    raw = struct.pack("<I", 1) + b"1"
    request = binary(one_input(5 * 41, name="payload", datatype="BYTES", shape=[41]), raw * 41)
    reply = http.post(INFER, **request)
    assert (reply.status_code, reply.json()["error"]) == (
        400,
        "payload: 41 in one request; at most 40 are allowed (limits.items)",
    )


def test_tritons_timeout_is_a_deadline_in_microseconds(http: TestClient) -> None:
    message = {**one_input(), "parameters": {"timeout": 1}}
    assert http.post(INFER, **binary(message, ROWS.tobytes())).status_code == 408
    message = {**one_input(), "parameters": {"timeout": 30_000_000}}
    assert http.post(INFER, **binary(message, ROWS.tobytes())).status_code == 200


def test_a_figure_that_json_cannot_carry_comes_in_binary_form(http: TestClient) -> None:
    missing = np.full((2, 8), np.nan, np.float32)
    reply = http.post(INFER, **binary(one_input(), missing.tobytes()))
    assert reply.status_code == 400
    assert "binary_data" in reply.json()["error"]
    message = {**one_input(), "parameters": {"binary_data_output": True}}
    assert http.post(INFER, **binary(message, missing.tobytes())).status_code == 200


def test_a_reply_is_packed_only_for_who_asks_for_one_coding(http: TestClient) -> None:
    request = binary(one_input(), ROWS.tobytes())
    for accepted, found in (("gzip", "gzip"), ("deflate", "deflate"), ("gzip, deflate, br", None), ("identity", None)):
        reply = http.post(
            INFER, content=request["content"], headers={**request["headers"], "accept-encoding": accepted}
        )
        assert reply.headers.get("content-encoding") == found
        assert reply.json()["outputs"][0]["shape"] == [2, 4]


def test_half_a_surrogate_pair_does_no_harm(http: TestClient) -> None:
    message = {**one_input(), "id": "\ud800"}
    assert http.post(INFER, **binary(message, ROWS.tobytes())).json()["id"] == "\ud800"
    assert (
        http.post(
            INFER, **binary({"inputs": [{**one_input()["inputs"][0], "name": "\ud800"}]}, ROWS.tobytes())
        ).status_code
        == 400
    )


def test_packed_json_is_unpacked_on_every_path(http: TestClient) -> None:
    body = gzip.compress(json.dumps(ROWS[0].tolist()).encode())
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    assert http.post("/predictions/tiny", content=body, headers=headers).status_code == 200
