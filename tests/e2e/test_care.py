"""Deadlines, callers that go away, and hot changes, against a running server."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from deployments.priority import NICER, may_come_back
from deployments.processes import children, parent, title
from tests.e2e.conftest import JSON, ROW, Server, describe, pid_of, steady_requests

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # sockets that are closed in the middle, on purpose
]


@pytest.mark.parametrize("prefix", ["/slow", "/all"])
def test_a_deadline_is_answered_in_the_protocols_own_shape(server: Server, prefix: str) -> None:
    headers = {**JSON, "x-request-timeout-seconds": "0.2"}
    status, _, body = server.request(f"{prefix}/predictions/slow", ROW, headers)  # it takes 0.5 s
    assert (status, json.loads(body)["type"]) == (408, "RequestTimeoutException"), body


def slow_runs(server: Server) -> int:
    return int(describe(server, "/slow/models/slow")["after_ready"]["calls"])


@pytest.mark.parametrize("prefix", ["/slow", "/all"])
def test_callers_that_go_away_cost_the_others_nothing(server: Server, prefix: str) -> None:
    before = slow_runs(server)

    def ask_until_let_in() -> int:
        while (status := server.request("/slow/predictions/slow", ROW, JSON)[0]) == 503:
            time.sleep(0.02)
        return status

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.request, "/slow/predictions/slow", ROW, JSON)
        gone = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        time.sleep(0.2)  # the first one runs
        for caller in gone:
            head = f"POST {prefix}/predictions/slow HTTP/1.1\r\nHost: x\r\nContent-Length: {len(ROW)}\r\n"
            caller.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + ROW)
        time.sleep(0.1)
        for caller in gone:
            caller.close()
        last = pool.submit(ask_until_let_in)
        assert (first.result()[0], last.result()) == (200, 200)
    # The queue holds three: those who left gave their places back, and never ran.
    assert slow_runs(server) - before == 2


def test_a_hot_change_restarts_nothing_and_fails_no_request(server: Server) -> None:
    def settings() -> tuple[float, int]:
        (found,) = json.loads(server.request("/tiny/models/tiny")[2])
        return found["maxBatchDelay"], found["jobQueueSize"]

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline, (settings(), server.log.read_text()[-3000:])
            time.sleep(0.2)

    first = pid_of(server, "tiny")
    with steady_requests(server, "tiny") as answers:
        assert settings() == (0.0, 64)
        server.change("tiny", deployment={"user_config": {"wait_ms": 3, "max_queue": 32}})
        wait_for(lambda: settings() == (3.0, 32))
        server.change("tiny", deployment={"user_config": {"wait_ms": 5, "batch_sizes": [1]}})
        wait_for(lambda: "the change of user_config is refused" in server.log.read_text())
        assert settings() == (3.0, 32)
        assert "user_config.batch_sizes: [1] is not allowed" in server.log.read_text()
    assert {answer.status for answer in answers} == {200}
    assert pid_of(server, "tiny") == first


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
def test_what_serves_comes_before_the_rest_of_ray(server: Server) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    if not may_come_back(usual):
        pytest.skip("this process may not raise its priority again")
    replica = pid_of(server, "tiny")
    assert replica is not None
    raylet = parent(replica)
    names = ("ray::ProxyActor", "ray::HAProxyManager", "ray::ServeController")
    serving = [child for child in children(raylet) if title(child).startswith(names)]
    assert len(serving) == len(names)
    serving += [replica, *(below for child in serving for below in children(child))]
    assert len(serving) > len(names) + 1, "HAProxy is a child of its manager"
    threads = [int(thread) for process in serving for thread in os.listdir(f"/proc/{process}/task")]
    assert {os.getpriority(os.PRIO_PROCESS, thread) - usual for thread in threads} == {0}
    assert os.getpriority(os.PRIO_PROCESS, raylet) - usual == NICER
