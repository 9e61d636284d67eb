"""What one request may ask of a replica: how much JSON, how long a message, which values, how slow a body."""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient
from torch import nn

from deployments.admission import Admission
from deployments.deadline import time_left
from deployments.errors import BadRequest, Overloaded
from deployments.http import _size_as_json, make_app
from deployments.messages import read_json, weigh_json
from deployments.middleware import middlewares
from deployments.servable import Servable
from deployments.service import ModelService
from optim.shapes import Inputs
from tests.support.http_server import listen
from tests.support.local import serve_locally

EAGER = {"compile": {"enable": False}}


@pytest.fixture(scope="module")
def tiny() -> Iterator[ModelService]:
    with serve_locally({"model": "tests.support.servables:Tiny", "pt2": EAGER}) as service:
        yield service


@contextmanager
def serve(name: str, **model_args: Any) -> Iterator[TestClient]:
    args = {"model": f"tests.deployments.test_limits:{name}", "model_args": model_args, "pt2": EAGER}
    with serve_locally(args) as service, TestClient(make_app(service)) as client:
        yield client


@pytest.mark.parametrize("kind", ["[],", '{"a":1},'])
def test_json_of_countless_containers_is_refused_before_it_is_read(kind: str) -> None:
    body = f"[{kind * 500_000}0]".encode()
    with pytest.raises(BadRequest, match="more than 500000 lists and objects"):
        read_json(body)
    assert len(read_json(f"[{kind * 499_999}0]".encode())) == 500_000


def test_strings_are_not_looked_for_where_they_are_countless() -> None:
    with pytest.raises(BadRequest, match="more than 500000 lists and objects"):
        read_json(b'["' + b"[" * 500_000 + b'"' + b',""' * 500_000 + b"]")
    assert len(read_json(b'["' + b"[" * 500_000 + b'"' + b',""' * 499_999 + b"]")) == 500_000


def test_what_json_becomes_is_counted() -> None:
    assert weigh_json(b"[1,2,3]") == 7 + 2 * 32 + 88
    assert weigh_json(memoryview(b"{}")) == 2 + 88


def test_large_json_is_read_beside_the_event_loop(tiny: ModelService) -> None:
    async def run() -> tuple[int, int]:
        own = threading.get_ident()
        return await tiny.aside(100, threading.get_ident) == own, await tiny.aside(100_000, threading.get_ident) == own

    assert asyncio.run(run()) == (True, False)
    rows = [[0.5, -1, 2, 0, 1, 3, -2, 0.25]] * 60
    tensor = {"name": "features", "shape": [60, 8], "datatype": "FP32", "data": rows}
    padded = json.dumps({"inputs": [tensor]}).replace("0.5,", "0.5" + "0" * 2000 + ",")
    with TestClient(make_app(tiny)) as client:
        reply = client.post("/v2/models/tiny/infer", content=padded)
        small = client.post("/v2/models/tiny/infer", json={"inputs": [tensor]})
        assert len(padded) > 100_000
        assert (reply.status_code, reply.json()) == (200, small.json())
        wrong = client.post("/v2/models/tiny/infer", content=padded.replace("60, 8", "59, 8"))
        assert wrong.status_code == 400
    assert tiny.admission.bytes == 0


def test_an_error_repeats_only_the_beginning_of_what_was_sent(tiny: ModelService) -> None:
    with TestClient(make_app(tiny)) as client:
        tensor = {"name": "features", "shape": [1, 8], "datatype": "X" * 100_000, "data": []}
        reply = client.post("/v2/models/tiny/infer", json={"inputs": [tensor]})
    assert reply.status_code == 400
    assert "more characters)" in reply.json()["error"]
    assert len(reply.content) < 1100
    long = Overloaded("x" * 2000, 7)
    assert str(long).endswith("... (1050 more characters)")
    assert str(pickle.loads(pickle.dumps(long))) == str(long)
    assert str(BadRequest(ValueError("why"))) == "why"
    assert Overloaded("x" * 2000, 7).retry_after_s == 7


@pytest.mark.parametrize("payload", ["{}", "null", "[1" + "0" * 400 + "]", '[{"a":1}]'])
def test_a_payload_that_is_no_tensor_is_the_requests_fault(payload: str) -> None:
    with serve("Plain") as client:
        reply = client.post("/predictions/plain", content=payload, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["type"]) == (400, "BadRequestException")


@pytest.mark.parametrize("error", [IndexError("x"), AttributeError("x"), OverflowError("x"), OSError("no image")])
def test_errors_of_preprocess_that_payloads_cause_are_bad_requests(error: Exception) -> None:
    assert _status_of(error) == 400


@pytest.mark.parametrize(
    "error",
    [RuntimeError("bug"), FileNotFoundError(2, "no labels"), MemoryError(), TimeoutError(), ConnectionError("x")],
)
def test_others_are_the_servers(error: Exception) -> None:
    assert _status_of(error) == 500


def test_a_scalar_input_is_taken_as_such() -> None:
    with serve("Scaled") as client:
        inputs = client.get("/v2/models/scaled").json()["inputs"]
        assert [(given["name"], given["shape"]) for given in inputs] == [("x", [-1, 2]), ("scale", [])]
        tensors = [
            {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]},
            {"name": "scale", "shape": [], "datatype": "FP32", "data": [3]},
        ]
        reply = client.post("/v2/models/scaled/infer", json={"inputs": tensors})
    assert reply.json()["outputs"][0]["data"] == [3, 6]


def test_an_output_that_the_tensor_protocols_cannot_carry_is_served_by_the_others() -> None:
    with serve("Spectrum") as client:
        assert client.get("/v2/models/spectrum").json()["outputs"] == []
        assert client.get("/openapi.json").status_code == 200
        assert client.post("/predictions/spectrum", json=[3, 4]).json() == [5, 5]
        tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
        reply = client.post("/v2/models/spectrum/infer", json={"inputs": [tensor]})
        assert (reply.status_code, "have no datatype" in reply.json()["error"]) == (501, True)
        reply = client.post("/v2/models/spectrum/infer", json={"inputs": [tensor], "outputs": [{"name": "output_0"}]})
        assert (reply.status_code, "complex64 has no name" in reply.json()["error"]) == (501, True)


def test_the_log_repeats_only_the_beginning_of_what_was_sent(caplog: pytest.LogCaptureFixture) -> None:
    assert _status_of(ValueError("no number: " + "9" * 100_000)) == 400
    (record,) = [record for record in caplog.records if "preprocess failed" in record.message]
    assert "in preprocess" in record.message
    assert len(record.getMessage()) < 2000
    assert record.exc_info is None


def test_objects_in_a_reply_are_weighed() -> None:
    assert _size_as_json({"scores": [0.5] * 1000, "labels": ["a"] * 10}) == 20_200
    assert _size_as_json([[0.5] * 10] * 10) == 2000


def test_what_stays_of_a_json_tensor_is_its_array_alone() -> None:
    with serve_locally({"model": "tests.deployments.test_limits:Plain", "pt2": EAGER}) as service:
        held: list[int] = []
        service._run = lambda *given: held.append(service.admission.bytes) or _answer(*given)  # type: ignore
        body = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
        with TestClient(make_app(service)) as client:
            assert client.post("/v2/models/plain/infer", json=body).status_code == 200
        assert held == [len(json.dumps(body, separators=(",", ":"))) + 8]


async def _answer(inputs: Inputs, rows: int, deadline: float | None) -> Any:
    return inputs[0]


def test_a_value_error_of_check_is_the_requests_fault_over_every_protocol() -> None:
    with serve("Choosy") as client:
        tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, -2]}
        for path, body in (("predictions/choosy", [1, -2]), ("v2/models/choosy/infer", {"inputs": [tensor]})):
            reply = client.post(f"/{path}", json=body)
            assert (reply.status_code, "nothing below 0" in reply.text) == (400, True)


def test_brackets_in_text_are_no_lists() -> None:
    assert read_json(json.dumps(["[" * 600_000, '\\"[']).encode()) == ["[" * 600_000, '\\"[']
    # A string without an end is looked at once, not from each of its escaped quotes (this took 37 s).
    with pytest.raises(BadRequest, match="lists and objects"):
        read_json(b"[" * 500_001 + b'"' + b'\\"' * 40_000)
    with pytest.raises(BadRequest, match="not JSON"):
        read_json(json.dumps([1]).encode("utf-16"))
    assert read_json(b"\xef\xbb\xbf[1]") == [1]


@pytest.mark.parametrize("kind", ["uint16", "uint32", "uint64"])
def test_unsigned_inputs_are_verified_and_served(kind: str) -> None:
    tensor = {"name": "x", "shape": [1, 2], "datatype": kind.upper(), "data": [1, 2]}
    with serve("Plain", kind=kind) as client:
        assert client.post("/v2/models/plain/infer", json={"inputs": [tensor]}).json()["outputs"][0]["data"] == [1, 2]


def test_the_slowest_sender_gives_way_where_too_many_send() -> None:
    async def run() -> list[str]:
        admission = Admission(1, 1, max_arriving=2)
        ends: list[str] = []

        async def send(name: str, until: asyncio.Event) -> None:
            try:
                async with admission.receive(30):
                    await until.wait()
                ends.append(f"{name} done")
            except TimeoutError:
                ends.append(f"{name} cut off")

        never, soon = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(send("first", never)), asyncio.create_task(send("second", soon))]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(send("third", soon)))
        await tasks[0]
        soon.set()
        await asyncio.gather(*tasks)
        # The places are free again.
        await asyncio.gather(send("fourth", soon), send("fifth", soon))
        return ends

    assert asyncio.run(run()) == ["first cut off", "second done", "third done", "fourth done", "fifth done"]


def test_slow_senders_leave_room_for_a_good_request() -> None:
    head = b"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    row = b"[0.5, -1, 2, 0, 1, 3, -2, 0.25]"
    with serve_locally({"model": "tests.support.servables:Tiny", "pt2": EAGER}) as service:
        service.admission._max_arriving = 3
        with listen(make_app(service)) as port:
            slow = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(3)]
            for number, connection in enumerate(slow):
                connection.sendall(head % 99 + b"[")
                while len(service.admission._arriving) < number + 1:
                    pass
            with socket.create_connection(("127.0.0.1", port), timeout=30) as good:
                good.sendall(head % len(row) + row)
                assert good.recv(4096).startswith(b"HTTP/1.1 200 ")
            assert slow[0].recv(4096).startswith(b"HTTP/1.1 408 ")
            assert len(service.admission._arriving) == 2
            for connection in slow:
                connection.close()


class Plain(Servable):
    """Rows of two numbers, as they are."""

    input_names = ("x",)

    def __init__(self, kind: str = "float32") -> None:
        self._kind = getattr(torch, kind)

    def load(self) -> nn.Module:
        return nn.Identity().eval()

    def example(self, batch_size: int, length: int | None) -> Inputs:
        return (torch.ones(batch_size, 2).to(self._kind),)


class _Spectrum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.complex(x, x.flip(-1))


class Spectrum(Plain):
    """Complex numbers, of which people get the size."""

    def load(self) -> nn.Module:
        return _Spectrum().eval()

    def preprocess(self, payload: Any) -> Inputs:
        return (torch.tensor(payload, dtype=torch.float32),)

    def postprocess(self, output: torch.Tensor) -> Any:
        return output.abs().tolist()


class Choosy(Plain):
    """Takes nothing below 0."""

    def preprocess(self, payload: Any) -> Inputs:
        return (torch.tensor(payload, dtype=torch.float32),)

    def check(self, inputs: Inputs) -> None:
        if bool((inputs[0] < 0).any()):
            raise ValueError("nothing below 0 is taken")


class Failing(Plain):
    """Raises what it is told to."""

    error: Exception = ValueError()

    def preprocess(self, payload: Any) -> Inputs:
        raise self.error


class _Scale(nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale


class Scaled(Servable):
    """A row, and a figure for all rows."""

    def load(self) -> nn.Module:
        return _Scale().eval()

    def example(self, batch_size: int, length: int | None) -> Inputs:
        return torch.ones(batch_size, 2), torch.tensor(2.0)


def _status_of(error: Exception) -> int:
    Failing.error = error
    with serve("Failing") as client:
        return int(client.post("/predictions/failing", content=b"x").status_code)


def mend(**headers: bytes) -> dict[str, bytes]:
    """Return the headers that Ray Serve and we then see."""
    middleware, _ = middlewares()
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    given = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    scope: Any = {"type": "http", "headers": given}
    asyncio.run(middleware.cls(app, *middleware.args, **middleware.kwargs)(scope, None, None))  # type: ignore[arg-type]
    return {name.decode(): value for name, value in seen}


def test_header_values_reach_ray_serve_as_utf8() -> None:
    assert mend(x_request_id=b"\xff7", name="é".encode()) == {"x-request-id": "\ufffd7".encode(), "name": "é".encode()}
    assert mend(x_request_id=b"plain") == {"x-request-id": b"plain"}


def test_a_proxy_says_that_the_server_lives_while_no_replica_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Response("a replica's", 503)(scope, receive, send)

    _, live = middlewares()
    client = TestClient(live.cls(app, *live.args, **live.kwargs))
    for prefix in ("", "/texts"):
        assert client.get(f"{prefix}/v2/health/live").json() == {"live": True}
        assert client.get(f"{prefix}/v2/health/ready").status_code == 503
        assert client.post(f"{prefix}/v2/health/live").status_code == 503
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: None)
    assert len(middlewares()) == 1  # a replica answers itself


def test_ray_serve_is_told_a_later_deadline_than_the_callers() -> None:
    assert mend(x_request_timeout_seconds=b"2.5") == {
        "x-request-timeout-seconds": b"3.5",
        "x-pt2-timeout-seconds": b"2.5",
    }
    for wrong in (b"x", b"-1", b"0", b"nan"):  # as before: ours to answer
        assert mend(x_request_timeout_seconds=wrong) == {"x-request-timeout-seconds": wrong}


def test_the_deadline_is_the_callers_whichever_header_says_it() -> None:
    def left(**headers: bytes) -> float | None:
        raw = [(name.encode(), value) for name, value in mend(**headers).items()]
        return time_left(Request({"type": "http", "headers": raw}), time.monotonic())

    assert left() is None
    assert left(x_request_timeout_seconds=b"2.5") == pytest.approx(2.5, abs=0.1)
    plain = Request({"type": "http", "headers": [(b"x-request-timeout-seconds", b"1.9")]})  # without `make serve`
    assert 1 < (time_left(plain, time.monotonic()) or 0) <= 1.9 * 0.95
