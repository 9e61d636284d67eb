from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from deployments.http import make_app
from tests.support import models
from tests.support.local import serve_locally

ROW = [0.5, -1, 2, 0, 1, 3, -2, 0.25]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    args = {
        "model": "tests.support.servables:Tiny",
        "pt2": {"compile": {"backend": "pt2test_faithful", "only_if_faster": False}},
        "limits": {"body_bytes": 4000, "rows": 16},
    }
    with serve_locally(args) as service, TestClient(make_app(service)) as client:
        yield client


def expected(rows: list[list[float]]) -> list[list[float]]:
    with torch.no_grad():
        values: list[list[float]] = models.Mlp().eval()(torch.tensor(rows)).tolist()
    return values


def infer_body(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "features", "shape": [2, 8], "datatype": "FP32", "data": [ROW, ROW], **changes}
    return {"inputs": [{k: v for k, v in tensor.items() if v is not None}]}


def test_a_prediction(client: TestClient) -> None:
    for path in ("/predictions/tiny", "/predictions/tiny/1"):
        for method in ("POST", "PUT"):
            reply = client.request(method, path, json=ROW)
            assert reply.status_code == 200, reply.text
            assert reply.json()["values"] == pytest.approx(expected([ROW])[0], abs=1e-5)


def test_what_cannot_be_pinned_goes_to_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model thread is to meet a GPU that is gone, by which the replica's health goes."""
    asked = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(tensor)
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    args = {"model": "tests.support.servables:Tiny", "pt2": {"compile": {"enable": False}}}
    with serve_locally(args) as service, TestClient(make_app(service)) as client:
        service._pins = True  # as on a GPU
        assert client.post("/predictions/tiny", json=ROW).json()["values"] == pytest.approx(
            expected([ROW])[0], abs=1e-5
        )
        assert client.post("/v2/models/tiny/infer", json=infer_body()).status_code == 200
    assert len(asked) == 1, "and told once"


def test_a_form_as_torchserves_clients_send_it(client: TestClient) -> None:
    files = {"data": ("row.json", json.dumps(ROW), "application/json")}
    assert client.post("/predictions/tiny", files=files).status_code == 200
    files = {"body": ("row.json", json.dumps(ROW), "application/json")}
    assert client.post("/predictions/tiny", files=files).status_code == 200
    reply = client.post("/predictions/tiny", files={"photo": ("x", b"x")})
    assert reply.status_code == 400
    assert "data or body; it has photo" in reply.json()["message"]
    form = b'--x\r\nContent-Disposition: form-data; name="data"\r\n\r\n\xff\r\n--x--\r\n'
    for charset in ("undefined", "no-such-charset"):
        headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
        assert client.post("/predictions/tiny", content=form, headers=headers).status_code == 400
    reply = client.post("/predictions/tiny", content=b"--x\r\n", headers={"content-type": "multipart/form-data"})
    assert reply.status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "kind"),
    [
        ("POST", "/predictions/other", b"[]", {}, 404, "ModelNotFoundException"),
        ("POST", "/predictions/tiny/9", b"[]", {}, 404, "ModelVersionNotFoundException"),
        ("GET", "/models/other", None, {}, 404, "ModelNotFoundException"),
        ("GET", "/no/such/path", None, {}, 404, "ResourceNotFoundException"),
        ("DELETE", "/predictions/tiny", None, {}, 405, "MethodNotAllowedException"),
        ("POST", "/predictions/tiny", b"{", {"content-type": "application/json"}, 400, "BadRequestException"),
        ("POST", "/predictions/tiny", b"[1,2]", {"content-type": "application/json"}, 400, "BadRequestException"),
        ("POST", "/predictions/tiny", b"\xff", {"content-type": "text/plain"}, 400, "BadRequestException"),
        ("POST", "/predictions/tiny", b"[" * 3999, {"content-type": "application/json"}, 400, "BadRequestException"),
        ("POST", "/predictions/tiny", b"explode", {"content-type": "text/plain"}, 500, "InternalServerException"),
        ("POST", "/predictions/tiny", b"0" * 4001, {}, 413, "RequestEntityTooLargeException"),
    ],
)
def test_errors_in_torchserves_shape(
    client: TestClient, method: str, path: str, content: bytes | None, headers: dict[str, str], status: int, kind: str
) -> None:
    reply = client.request(method, path, content=content, headers=headers)
    body = reply.json()
    assert (reply.status_code, body["code"], body["type"]) == (status, status, kind)
    assert set(body) == {"code", "type", "message"}
    assert "Traceback" not in body["message"]


def test_a_body_without_length_is_cut_off_at_the_limit(client: TestClient) -> None:
    sent = []

    def chunks() -> Iterator[bytes]:
        for _ in range(10):
            sent.append(1)
            yield b"0" * 1000

    assert client.post("/predictions/tiny", content=chunks()).status_code == 413


def test_management_and_health(client: TestClient) -> None:
    assert client.get("/ping").json() == {"status": "Healthy"}
    assert client.get("/models").json()["models"][0]["modelName"] == "tiny"
    (description,) = client.get("/models/tiny").json()
    assert description["compileReport"]["buckets"][0]["engine"] == "pt2test_faithful"
    assert description["batchSize"] == 8
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/tiny/ready").status_code == 200
    assert client.get("/v2").json()["name"] == "pt2-serve"


def test_the_model_describes_itself(client: TestClient) -> None:
    for path in ("/v2/models/tiny", "/v2/models/tiny/versions/1"):
        assert client.get(path).json() == {
            "name": "tiny",
            "versions": ["1"],
            "platform": "pytorch",
            "inputs": [{"name": "features", "datatype": "FP32", "shape": [-1, 8]}],
            "outputs": [{"name": "output_0", "datatype": "FP32", "shape": [-1, 4]}],
        }


@pytest.mark.parametrize("data", [[ROW, ROW], ROW + ROW])
def test_infer_with_nested_and_flat_data(client: TestClient, data: Any) -> None:
    reply = client.post("/v2/models/tiny/infer", json={"id": "7", **infer_body(data=data)})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("tiny", "1", "7")
    (output,) = body["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("output_0", "FP32", [2, 4])
    flat = [value for row in expected([ROW, ROW]) for value in row]
    assert output["data"] == pytest.approx(flat, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "the body must be a JSON object"),
        ({}, "inputs: a list"),
        ({"inputs": [5]}, "inputs[0]: an object is needed"),
        (infer_body(name=None), "inputs[0].name"),
        (infer_body(name="other"), "the inputs must be features; got other"),
        (infer_body(shape=[2, -8]), "inputs[0].shape"),
        (infer_body(shape=[2, 7]), "16 values do not fill the shape [2, 7]"),
        (infer_body(shape=[16, 1]), "expected float32 [-1, 8], got float32 [16, 1]"),
        (infer_body(shape=[True, 16]), "inputs[0].shape"),
        (infer_body(datatype="FP33"), "'FP33' is not one of BOOL"),
        (infer_body(datatype="BYTES"), "elements of BYTES are text"),
        (infer_body(datatype="BYTES", data=["x"] * 16), "BYTES is for one input named payload"),
        (infer_body(datatype="BF16"), "BF16 has a binary form only"),
        (infer_body(datatype="FP64"), "expected float32 [-1, 8], got float64 [2, 8]"),
        (infer_body(datatype="INT8"), "values are not INT8"),
        (infer_body(data=[["a"] * 8] * 2), "values are not FP32"),
        (infer_body(data=[ROW, ROW[:-1]]), "not a tensor"),
        (infer_body(data=None), "inputs[0].data"),
        (infer_body(data="x"), "a list is needed"),
        (infer_body(shape=[0, 8], data=[]), "number of rows"),
        (infer_body(shape=[17, 8], data=[ROW] * 17), "17 rows in one request; at most 16"),
        ({"inputs": infer_body()["inputs"] * 2}, "given twice"),
        ({**infer_body(), "outputs": [{"name": "nope"}]}, "the model has output_0, not 'nope'"),
        ({**infer_body(), "outputs": "x"}, "outputs: a list"),
        ({**infer_body(), "id": 5}, "id: 5 is not text"),
    ],
)
def test_infer_errors_name_what_is_wrong(client: TestClient, body: Any, message: str) -> None:
    reply = client.post("/v2/models/tiny/infer", json=body)
    assert reply.status_code == 400
    assert set(reply.json()) == {"error"}
    assert message in reply.json()["error"]


def test_other_errors_in_the_protocols_shape(client: TestClient) -> None:
    for method, path, status in (
        ("GET", "/v2/models/other", 404),
        ("POST", "/v2/models/tiny/versions/3/infer", 404),
        ("GET", "/v2/nothing", 404),
        ("DELETE", "/v2/models/tiny", 405),
    ):
        reply = client.request(method, path)
        assert reply.status_code == status
        assert set(reply.json()) == {"error"}
    assert client.post("/v2/models/tiny/infer", content=b"[" * 3999).status_code == 400
    assert client.post("/v2/models/tiny/infer", content=b"0" * 4001).status_code == 413


def test_health_tells_of_a_model_that_cannot_answer_any_more() -> None:
    args = {"model": "tests.support.servables:PickyServable", "pt2": {"compile": {"enable": False}}}
    with serve_locally(args) as service, TestClient(make_app(service)) as client:
        assert client.get("/ping").status_code == 200
        service.failure = lambda: "RuntimeError: CUDA error: device-side assert triggered"
        assert client.get("/ping").json() == {"status": "Unhealthy"}
        for path in ("/v2/health/ready", "/v2/models/picky-servable/ready"):
            reply = client.get(path)
            assert reply.status_code == 503
            assert "device-side assert" in reply.json()["error"]
        assert client.get("/v2/health/live").json() == {"live": True}


def test_what_json_cannot_carry_is_an_error_and_not_broken_json(client: TestClient) -> None:
    nan = [[float("nan")] * 8] * 2
    reply = client.post("/v2/models/tiny/infer", content=json.dumps(infer_body(data=nan)))
    assert reply.status_code == 400
    assert "NaN is no JSON value" in reply.json()["error"]
    # TorchServe read what Python writes; a figure that is missing has no answer that JSON could carry.
    headers = {"content-type": "application/json"}
    for row in (json.dumps(nan[0]), "[1e999,0,0,0,0,0,0,0]"):
        reply = client.post("/predictions/tiny", content=row, headers=headers)
        assert reply.status_code == 400
        assert "JSON cannot carry" in reply.json()["message"]
    assert client.post("/v2/models/tiny/infer", json=infer_body()).status_code == 200
