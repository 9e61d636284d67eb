"""What requests notice while replicas come and go: python -m benchmarks.changes photos.

Requests at random times, at a share of what the server can do; meanwhile a new version is rolled out (warm, then cold),
and a second replica is asked for and given up again. None may fail; the slowest reply is held against the p99 before.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.baselines import SERVABLES
from benchmarks.load import Load, closed_loop, open_loop
from benchmarks.machine import describe_machine
from benchmarks.servers import PORT, Server, serve_run
from benchmarks.workloads import Workload

NAME = "bench"
PATH = f"/predictions/{NAME}"
#: Reads configurations, one JSON a line, and deploys each; started before anything is measured.
_OPERATOR = """
import json, sys
import ray
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
ray.init(address="auto", namespace="serve", log_to_driver=False)
client = _get_global_client()
for line in sys.stdin:
    if line == "count\\n":
        states = client.get_serve_details()["applications"]["bench"]["deployments"]["bench"]["replicas"]
        print(sum(r["state"] == "RUNNING" for r in states), len(states), flush=True)
    else:
        client.deploy_apps(ServeDeploySchema.model_validate(json.loads(line)))
        print("done", flush=True)
"""


class Operator:
    """Changes a running server and asks for its replicas."""

    def __init__(self, server: Server) -> None:
        assert server.config is not None
        self.config = dict(server.config)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _OPERATOR],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=server.environment,
        )
        self.replicas()

    def _say(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return self._process.stdout.readline()

    def replicas(self) -> tuple[int, int]:
        """Return how many replicas run, and how many there are."""
        running, known = self._say("count").split()
        return int(running), int(known)

    def change(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Deploy the application, changed."""
        self.config = copy.deepcopy(self.config)
        change(self.config["applications"][0])
        self._say(json.dumps(self.config))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def wait_for(what: Callable[[], bool], deadline_s: float = 300) -> None:
    """Wait until something is so; TimeoutError where it does not come."""
    end = time.monotonic() + deadline_s
    while not what():
        if time.monotonic() > end:
            raise TimeoutError("the change did not come about")
        time.sleep(1)


@contextmanager
def under_load(workload: Workload, rate: float) -> Iterator[list[Load]]:
    """Send requests at random times for as long as the block takes; its load is in the list afterwards."""
    stop, found = threading.Event(), []

    def run() -> None:
        found.append(open_loop(PORT, PATH, workload.payloads, workload.check, rate, 3600, stop))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def describe() -> tuple[str, dict[str, Any]]:
    """Return the version of the replica that answers, and its report."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/models/{NAME}", timeout=30) as reply:
        found = json.loads(reply.read())[0]
    return found["modelVersion"], found["compileReport"]


def roll_out(operator: Operator, version: str, pt2: dict[str, Any]) -> None:
    """Deploy a new version and wait until it alone is there."""

    def change(application: dict[str, Any]) -> None:
        application["args"].update(version=version, pt2=pt2)

    operator.change(change)
    wait_for(lambda: describe()[0] == version and operator.replicas() == (1, 1))


def scale(operator: Operator, replicas: int) -> None:
    """Ask for so many replicas and wait until they are there."""

    def change(application: dict[str, Any]) -> None:
        bounds = {"min_replicas": replicas, "max_replicas": max(2, replicas)}
        application["deployments"][0]["autoscaling_config"].update(bounds)

    operator.change(change)
    wait_for(lambda: operator.replicas() == (replicas, replicas))


def print_load(what: str, seconds: float, load: Load, more: str = "") -> None:
    """Print a load as a row of a table, and what failed of it to stderr."""
    print(
        f"| {what} | {seconds:.0f} | {len(load.taken)} | {len(load.failed)} / {load.wrong} | {load.ms(50):.1f} "
        f"| {load.ms(99):.1f} | {max(load.taken) * 1e3:.0f} |{more}"
    )
    if load.failed:
        print(f"failed: {set(load.failed)}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", nargs="?", choices=SERVABLES, default="photos")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.3, help="of what 32 clients get")
    # In 20 s the p99 was that of five requests, and anything from 85 to 228 ms on machines of one kind (issue 5).
    parser.add_argument("--seconds", type=float, default=120.0, help="of the load before anything changes")
    parser.add_argument("--budget-s", type=float, default=30.0)
    options = parser.parse_args()
    workload = Workload.make(options.workload)
    torch.set_num_threads(1)
    model = SERVABLES[options.workload]
    warm = {"tune": {"budget_s": options.budget_s}}
    application = {
        "import_path": "deployments.app:build",
        "args": {
            "model": f"{model.__module__}:{model.__name__}",
            "name": NAME,
            "threads": options.threads,
            "pt2": warm,
        },
        "deployments": [
            {
                "name": NAME,
                "ray_actor_options": {"num_cpus": 0.5},
                "autoscaling_config": {
                    "min_replicas": 1,
                    "max_replicas": 2,
                    "target_ongoing_requests": 16,
                    "upscale_delay_s": 1,
                    "downscale_delay_s": 5,
                },
                "max_surge_percent": 100,
            }
        ],
    }
    # Another budget is another key of the cache, so this version is compiled anew.
    cold = {"tune": {"budget_s": options.budget_s + 1}}
    changes: dict[str, Callable[[Operator], None]] = {
        "nothing": lambda operator: time.sleep(options.seconds),
        "a new version, warm": lambda operator: roll_out(operator, "2", warm),
        "a new version, cold": lambda operator: roll_out(operator, "3", cold),
        "a second replica, warm": lambda operator: scale(operator, 2),
        "back to one": lambda operator: scale(operator, 1),
    }
    rows = []
    with serve_run(application) as server:
        server.wait(PATH, workload.payloads[0])
        operator = Operator(server)
        closed_loop(PORT, PATH, workload.payloads, workload.check, 8, 5.0)
        rate = options.share * closed_loop(PORT, PATH, workload.payloads, workload.check, 32, 8.0).rate
        for what, change in changes.items():
            begin = time.monotonic()
            with under_load(workload, rate) as found:
                change(operator)
            rows.append((what, time.monotonic() - begin, found[0]))
            _, report = describe()
            said = [report[name] for name in ("start", "background", "seconds", "notes", "refusals")]
            print(f"{what}: {said}", file=sys.stderr, flush=True)
        operator.close()
    usual = rows[0][2].ms(99)
    print(f"{options.workload}, {rate:.0f} requests/s, {options.threads} threads. {describe_machine()}\n")
    print("| meanwhile | s | requests | failed / wrong | p50 ms | p99 ms | slowest ms | over twice the first p99 |")
    print("|---|---|---|---|---|---|---|---|")
    for what, seconds, load in rows:
        slow = sum(taken * 1e3 > 2 * usual for taken in load.taken)
        print_load(what, seconds, load, f" {slow} |")


if __name__ == "__main__":
    main()
