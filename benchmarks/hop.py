"""What the way to a replica costs, by Ray Serve's switches: python -m benchmarks.hop.

The model does nothing, so the latency is the hop: client, proxy, replica, batching, model thread, and back; the body
is a photo's size. The same replica answers every time; only the environment of `serve run` differs.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping

import torch
from torch import nn

from benchmarks.load import closed_loop
from benchmarks.machine import describe_machine
from benchmarks.servers import PORT, serve_run
from deployments.servable import Servable
from optim.shapes import Inputs

_BODY = os.urandom(40_000)
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
PYTHON = {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
TWO_LOOPS = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "1"}
VARIANTS: dict[str, Mapping[str, str]] = {
    "Python proxy (a plain `serve run`)": {**PYTHON, **TWO_LOOPS},
    "Python proxy, one event loop": {**PYTHON, **ONE_LOOP},
    "Python proxy, `RAY_SERVE_THROUGHPUT_OPTIMIZED=1`": {**PYTHON, "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    "HAProxy": {**HAPROXY, **TWO_LOOPS},
    "HAProxy, one event loop (`make serve`)": {**HAPROXY, **ONE_LOOP},
    "HAProxy, one event loop, log in blocks of 100": {
        **HAPROXY,
        **ONE_LOOP,
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "100",
    },
}


#: The arguments of a model that does nothing.
NOTHING = {"model": "benchmarks.hop:Nothing", "name": "nothing", "pt2": {"compile": {"enable": False}}}


class Nothing(Servable):
    """Takes any body and answers a number."""

    def load(self) -> nn.Module:
        """Return a module that does nothing."""
        return nn.Identity()

    def example(self, batch_size: int, length: int | None) -> Inputs:
        """Return one number a row. [B, 1]."""
        return (torch.ones(batch_size, 1),)

    def preprocess(self, payload: bytes) -> Inputs:
        """Return the body's size. -> [1]."""
        return (torch.tensor([float(len(payload))]),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    application = {"import_path": "deployments.app:build", "args": NOTHING}
    path = "/predictions/nothing"
    found: dict[str, list[list[tuple[float, float, float]]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name, environment in VARIANTS.items():
            with serve_run(application, environment) as server:
                server.wait(path, _BODY)
                closed_loop(PORT, path, [_BODY], lambda i, body: True, 4, 3.0)
                figures = []
                for clients in options.clients:
                    before = server.cpu_s()
                    load = closed_loop(PORT, path, [_BODY], lambda i, body: True, clients, options.seconds)
                    if load.failed:
                        raise RuntimeError(f"{name}: {len(load.failed)} requests failed: {set(load.failed)}")
                    figures.append((load.ms(50), load.rate, (server.cpu_s() - before) / len(load.taken) * 1e3))
                found[name].append(figures)
                print(f"{name}: {figures}", flush=True)
    print(f"\n{describe_machine()}\n")
    print("| way | " + " | ".join(f"{n} clients: p50 ms; requests/s; CPU ms a request" for n in options.clients) + " |")
    print("|---|" + "---|" * len(options.clients))
    for name, rounds in found.items():
        medians = [[statistics.median(r[i][k] for r in rounds) for k in range(3)] for i in range(len(options.clients))]
        print(f"| {name} | " + " | ".join(f"{p50:.2f}; {rate:.0f}; {cpu:.1f}" for p50, rate, cpu in medians) + " |")


if __name__ == "__main__":
    main()
