from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import numpy as np
import pytest
from starlette.testclient import TestClient

from deployments.errors import DeadlineExceeded, Overloaded
from deployments.http import make_app
from deployments.service import ModelService
from tests.support.local import serve_locally

SLOW = {
    "model": "tests.support.servables:PickyServable",
    "model_args": {"delay_s": 0.5},
    "name": "slow",
    "pt2": {"compile": {"enable": False}},
    "batching": {"batch_sizes": [1]},
}
ROW = [1.0] * 8


@pytest.fixture(scope="module")
def service() -> Iterator[ModelService]:
    with serve_locally(SLOW) as service:
        yield service


@pytest.mark.parametrize(("path", "is_oip"), [("/predictions/slow", False), ("/v2/models/slow/infer", True)])
def test_a_deadline_in_the_header_is_answered_in_the_protocols_shape(
    service: ModelService, path: str, is_oip: bool
) -> None:
    tensor = {"name": "x", "shape": [1, 8], "datatype": "FP32", "data": ROW}
    body = {"inputs": [tensor]} if is_oip else ROW
    with TestClient(make_app(service)) as client:
        reply = client.post(path, json=body, headers={"x-request-timeout-seconds": "0.2"})
        assert reply.status_code == 408, reply.text
        text = reply.json()["error" if is_oip else "message"]
        assert "no answer in time: the deadline was" in text
        if not is_oip:
            assert reply.json()["type"] == "RequestTimeoutException"
        reply = client.post(path, json=body, headers={"x-request-timeout-seconds": "soon"})
        assert reply.status_code == 400
        assert "x-request-timeout-seconds: 'soon' is not allowed" in reply.text
        assert client.post(path, json=body, headers={"x-request-timeout-seconds": "60"}).status_code == 200
    assert (service.admission.rows, service.admission.bytes) == (0, 0)


def test_what_is_not_wanted_any_more_does_not_keep_the_others_waiting(service: ModelService) -> None:
    async def run() -> list[object]:
        first = asyncio.create_task(service.predict(ROW))
        await asyncio.sleep(0.1)  # it runs; the next ones wait
        late = [service.predict(ROW, timeout_s=0.05) for _ in range(10)]
        gone = [asyncio.create_task(service.predict(ROW)) for _ in range(10)]
        last = asyncio.create_task(service.predict(ROW))
        found = await asyncio.gather(*late, return_exceptions=True)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        calls = service.report()["after_ready"]["calls"]
        assert await first == await last == [2.0] * 8
        # Of 21 requests behind the first, only the last one has cost a run (the first may have been counted before).
        assert service.report()["after_ready"]["calls"] <= calls + 2
        return list(found)

    assert all(isinstance(error, DeadlineExceeded) for error in asyncio.run(run()))
    assert service.admission.rows == 0


def test_more_rows_than_the_queue_holds_are_refused_before_any_work(
    service: ModelService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.admission, "max_rows", 3)

    async def run() -> list[object]:
        found = await asyncio.gather(*(service.predict(ROW) for _ in range(5)), return_exceptions=True)
        return list(found)

    found = asyncio.run(run())
    assert [isinstance(result, Overloaded) for result in found] == [False] * 3 + [True] * 2


def test_more_bytes_than_a_replica_holds_are_refused() -> None:
    with serve_locally({**SLOW, "limits": {"bytes_in_flight": 500}}) as service:
        rows = {"x": np.ones((16, 8), np.float32)}  # 512 bytes

        async def run() -> list[object]:
            calls = [service.infer(rows), service.infer(rows)]
            return list(await asyncio.gather(*calls, return_exceptions=True))

        first, second = asyncio.run(run())
        assert isinstance(first, dict)
        assert isinstance(second, Overloaded)
        with TestClient(make_app(service)) as client, service.admission.hold_bytes(490):
            reply = client.post(
                "/predictions/slow", content=json.dumps(ROW), headers={"content-type": "application/json"}
            )
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) >= 1
            assert "490 bytes" in reply.json()["message"]
        assert service.admission.bytes == 0
