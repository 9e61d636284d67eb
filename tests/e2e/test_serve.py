"""What goes wrong behind `make serve`, with small models that are made for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import JSON, KEY, ROOT, ROW, Server, came_first, describe, pid_of

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    # Sockets of a server that is being killed, and Ray's own files.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def test_a_backend_that_fails_at_first_call_costs_nobody_a_request(server: Server) -> None:
    status, _, body = server.request("/broken/predictions/broken", ROW, {**JSON, **KEY})
    assert status == 200, body
    report = describe(server, "/broken/models/broken", KEY)
    assert {b["engine"] for b in report["buckets"]} == {"eager"}
    for bucket in report["buckets"]:
        (refusal,) = bucket["refusals"]
        assert (refusal["stage"], refusal["exception"]) == ("warm-up", "IndexError")
        assert "this backend's code cannot run" in refusal["message"]
    log = server.log.read_text()
    warnings = [line for line in log.splitlines() if "WARNING" in line and "are served eager" in line]
    assert len([line for line in warnings if "pt2test_raises_at_call" in line]) == 1, log[-3000:]


def test_a_request_that_the_model_fails_on_fails_alone(server: Server) -> None:
    rows = [[13.0 if i == 5 else float(i)] * 8 for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        replies = list(
            pool.map(lambda row: server.request("/picky/predictions/picky", json.dumps(row).encode(), JSON), rows)
        )
    assert [status for status, _, _ in replies] == [500 if i == 5 else 200 for i in range(12)]
    assert "thirteen is unlucky" in json.loads(replies[5][2])["message"]
    for i, (_, _, body) in enumerate(replies):
        if i != 5:
            assert json.loads(body) == [2.0 * i] * 8


def test_a_full_queue_is_answered_at_once_with_retry_after(server: Server) -> None:
    with ThreadPoolExecutor(12) as pool:
        replies = list(
            pool.map(lambda _: server.request("/slow/predictions/slow", ROW, JSON), range(12)),
        )
    found = Counter(status for status, _, _ in replies)
    assert set(found) == {200, 503}
    assert found[200] >= 3
    for status, headers, body in replies:
        if status == 503:
            assert int(headers["retry-after"]) >= 1
            assert json.loads(body)["type"] == "ServiceUnavailableException"
    status, _, body = server.request("/slow/v2/models/slow")
    assert status == 200


def wait_for_another_replica(server: Server, name: str, first: int) -> None:
    deadline = time.monotonic() + 600
    while pid_of(server, name) in (None, first):
        assert time.monotonic() < deadline, "the replica was not replaced"
        time.sleep(0.5)


def test_a_killed_replica_is_replaced(server: Server) -> None:
    first = pid_of(server, "tiny")
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_for_another_replica(server, "tiny", first)
    assert not came_first(server, first)
    assert came_first(server, pid_of(server, "tiny")), "nothing else served its model"
    report = describe(server, "/tiny/models/tiny")
    assert {b["engine"] for b in report["buckets"]} == {"pt2test_faithful"}


def test_a_replica_whose_device_broke_says_so_and_is_replaced(server: Server) -> None:
    first = pid_of(server, "fragile")
    assert first is not None
    status, _, body = server.request("/fragile/predictions/fragile", json.dumps([666.0] * 8).encode(), JSON)
    assert status == 503
    assert "device-side assert" in json.loads(body)["message"]
    wait_for_another_replica(server, "fragile", first)


def test_what_was_accepted_is_answered_when_the_application_is_deleted(server: Server) -> None:
    script = """
import ray
from ray import serve
ray.init(address="auto", namespace="serve", log_to_driver=False)
serve.delete("slow")
"""
    with ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(server.request, "/slow/predictions/slow", ROW, JSON) for _ in range(3)]
        command = [sys.executable, "-W", "ignore", "-c", script]
        delete = pool.submit(subprocess.run, command, cwd=ROOT, env=server.env, check=True)
        assert [reply.result()[0] for reply in replies] == [200] * 3
        delete.result()
    deadline = time.monotonic() + 120  # the proxy hears of it a little later
    while server.request("/slow/ping")[0] != 404:
        assert time.monotonic() < deadline, "the application is still there"
        time.sleep(0.2)
