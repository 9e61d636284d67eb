"""Deadlines, callers that go away, and hot changes, against a running server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import JSON, ROOT, ROW, Server, describe, pid_of

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # sockets that are closed in the middle, on purpose
]


def test_a_deadline_is_answered_in_the_protocols_own_shape(server: Server) -> None:
    headers = {**JSON, "x-request-timeout-seconds": "0.2"}
    status, _, body = server.request("/slow/predictions/slow", ROW, headers)  # it takes 0.5 s
    assert (status, json.loads(body)["type"]) == (408, "RequestTimeoutException"), body


def slow_runs(server: Server) -> int:
    return int(describe(server, "/slow/models/slow")["after_ready"]["calls"])


def test_callers_that_go_away_cost_the_others_nothing(server: Server) -> None:
    before = slow_runs(server)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.request, "/slow/predictions/slow", ROW, JSON)
        gone = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        time.sleep(0.2)  # the first one runs
        for caller in gone:
            head = f"POST /slow/predictions/slow HTTP/1.1\r\nHost: x\r\nContent-Length: {len(ROW)}\r\n"
            caller.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + ROW)
        time.sleep(0.1)
        for caller in gone:
            caller.close()
        time.sleep(0.1)
        last = pool.submit(server.request, "/slow/predictions/slow", ROW, JSON)
        assert (first.result()[0], last.result()[0]) == (200, 200)
    # The queue holds three: the last one was let in because those who left gave their places back.
    assert slow_runs(server) - before == 2


CHANGE = """
import sys, yaml, ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
ray.init(address="auto", namespace="serve", log_to_driver=False)
config = yaml.safe_load(open(sys.argv[1]))
for application in config["applications"]:
    if application["name"] == sys.argv[2]:
        application["deployments"][0]["user_config"] = yaml.safe_load(sys.argv[3])
_get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
"""


def test_a_hot_change_restarts_nothing_and_fails_no_request(server: Server) -> None:
    def change(user_config: str) -> None:
        command = [sys.executable, "-W", "ignore", "-c", CHANGE, str(server.config), "tiny", user_config]
        subprocess.run(command, cwd=ROOT, env=server.env, check=True)

    def settings() -> tuple[float, int]:
        (found,) = json.loads(server.request("/tiny/models/tiny")[2])
        return found["maxBatchDelay"], found["jobQueueSize"]

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline, (settings(), server.log.read_text()[-3000:])
            time.sleep(0.2)

    first = pid_of(server, "tiny")
    stop = threading.Event()

    def ask() -> Counter[int]:
        found: Counter[int] = Counter()
        while not stop.is_set():
            found[server.request("/tiny/predictions/tiny", ROW, JSON)[0]] += 1
        return found

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            assert settings() == (0.0, 64)
            change("{wait_ms: 3, max_queue: 32}")
            wait_for(lambda: settings() == (3.0, 32))
            change("{wait_ms: 5, batch_sizes: [1]}")
            wait_for(lambda: "the change of user_config is refused" in server.log.read_text())
            assert settings() == (3.0, 32)
            assert "user_config.batch_sizes: [1] is not allowed" in server.log.read_text()
        finally:
            stop.set()
        answers = sum((found.result() for found in asking), Counter())
    assert set(answers) == {200}
    assert pid_of(server, "tiny") == first
