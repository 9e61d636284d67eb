"""Requests a second over HTTP, compiled against eager under the same server: python -m benchmarks.serving.

Starts Ray once for each variant, in turn and twice over, with one replica; a closed loop of clients sends the sample
photo. The eager baseline is the same deployment with `compile: {enable: false}`, so the ratio is the compiler's alone.
"""

from __future__ import annotations

import argparse
import http.client
import logging
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve

from benchmarks.machine import describe_machine
from deployments.app import build

PHOTO = (Path(__file__).parents[1] / "examples" / "cat.jpg").read_bytes()
VARIANTS: dict[str, Any] = {"eager": {"compile": {"enable": False}}, "compiled": {"compile": {"enable": True}}}
PORT = 8311


def run_clients(clients: int, seconds: float) -> tuple[float, float]:
    """Return requests a second and the median latency in ms; raises where a request fails."""
    taken: list[float] = []
    failed: list[int] = []
    end = time.perf_counter() + seconds

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
        while time.perf_counter() < end:
            begin = time.perf_counter()
            connection.request("POST", "/predictions/image-classifier", PHOTO)
            reply = connection.getresponse()
            reply.read()
            taken.append(time.perf_counter() - begin)
            if reply.status != 200:
                failed.append(reply.status)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {set(failed)}")
    return len(taken) / seconds, statistics.median(taken) * 1e3


def measure(pt2: Any, threads: int, client_counts: list[int], seconds: float) -> list[tuple[float, float]]:
    """Serve the model with one `pt2` section and measure it at every number of clients."""
    ray.init(num_cpus=threads, namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        app = build({"model": "deployments.vision:ImageClassifier", "pt2": pt2, "threads": threads})
        serve.run(app, name="bench", route_prefix="/")
        run_clients(4, 2.0)
        return [run_clients(clients, seconds) for clients in client_counts]
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name, pt2 in VARIANTS.items():
            found[name].append(measure(pt2, options.threads, options.clients, options.seconds))
    print(f"\nPhotos over HTTP, one replica, its model on {options.threads} threads. {describe_machine()}\n")
    print("| clients | " + " | ".join(f"{name}: requests/s (p50 ms)" for name in VARIANTS) + " | ratio |")
    print("|---|" + "---|" * (len(VARIANTS) + 1))
    for i, clients in enumerate(options.clients):
        rates = {name: statistics.median(r[i][0] for r in rounds) for name, rounds in found.items()}
        waits = {name: statistics.median(r[i][1] for r in rounds) for name, rounds in found.items()}
        cells = " | ".join(f"{rates[name]:.1f} ({waits[name]:.0f})" for name in VARIANTS)
        print(f"| {clients} | {cells} | **{rates['compiled'] / rates['eager']:.2f}x** |")


if __name__ == "__main__":
    main()
