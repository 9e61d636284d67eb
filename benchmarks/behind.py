"""What requests notice of compiling in the background: python -m benchmarks.behind photos.

Requests at random times, slow enough for the eager model, go to a replica that serves eager for good, then to one with
`compile.when: background` and an empty cache: while another process compiles, while buckets move over, and afterwards.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.baselines import SERVABLES
from benchmarks.changes import NAME, PATH, describe, print_load, under_load, wait_for
from benchmarks.load import Load, closed_loop
from benchmarks.machine import describe_machine
from benchmarks.servers import PORT, serve_run
from benchmarks.workloads import Workload


def serve_and_watch(
    workload: Workload, args: dict[str, Any], rate: float | None, phases: dict[str, Callable[[], None]]
) -> tuple[float, list[tuple[str, float, Load]]]:
    """Serve a model, and send requests during each phase; without a rate, at half of what one client gets."""
    application = {
        "import_path": "deployments.app:build",
        "args": {"name": NAME, **args},
        "deployments": [{"name": NAME, "ray_actor_options": {"num_cpus": 0.5}}],
    }
    rows = []
    with serve_run(application) as server:
        server.wait(PATH, workload.payloads[0])
        if rate is None:
            closed_loop(PORT, PATH, workload.payloads, workload.check, 1, 5.0)
            rate = closed_loop(PORT, PATH, workload.payloads, workload.check, 1, 10.0).rate / 2
        for what, wait in phases.items():
            begin = time.monotonic()
            with under_load(workload, rate) as found:
                wait()
            rows.append((what, time.monotonic() - begin, found[0]))
            report = describe()[1]
            print(f"{what}: {report['background']} {report['seconds']} {report['notes']}", file=sys.stderr, flush=True)
    return rate, rows


def wait_while(state: str) -> None:
    """Wait until the background is in another state than this one."""
    wait_for(lambda: describe()[1]["background"] != state, 1200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", nargs="?", choices=SERVABLES, default="photos")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0, help="of the load before and after")
    options = parser.parse_args()
    workload = Workload.make(options.workload)
    torch.set_num_threads(1)
    model = SERVABLES[options.workload]
    args = {"model": f"{model.__module__}:{model.__name__}", "threads": options.threads}
    rest = lambda: time.sleep(options.seconds)  # noqa: E731
    rate, rows = serve_and_watch(
        workload, {**args, "pt2": {"compile": {"enable": False}}}, None, {"eager for good": rest}
    )
    phases = {
        "compiling": lambda: wait_while("compiling"),
        "moving over": lambda: wait_while("moving"),
        "compiled": rest,
    }
    _, more = serve_and_watch(workload, {**args, "pt2": {"compile": {"when": "background"}}}, rate, phases)
    print(f"{options.workload}, {rate:.1f} requests/s, {options.threads} threads. {describe_machine()}\n")
    print("| state | s | requests | failed / wrong | p50 ms | p99 ms | slowest ms |\n|---|---|---|---|---|---|---|")
    for what, seconds, load in [*rows, *more]:
        print_load(what, seconds, load)


if __name__ == "__main__":
    main()
