"""Requests a second over HTTP against what people run without us: python -m benchmarks.serving photos texts.

Every server has one replica or worker, eager or ours, with the same threads; each starts anew for every round, in turn.
Every reply is compared with eager's. The clients run on the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bars import draw_bars
from benchmarks.baselines import SERVABLES
from benchmarks.load import Load, closed_loop, make_form, open_loop
from benchmarks.machine import describe_machine
from benchmarks.servers import PORT, Server, serve_run, start
from benchmarks.workloads import Workload

OURS = "pt2-serve"


def make_servers(workload: str, threads: int, budget_s: float) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Return what starts each server; it yields the server and the path to post to."""
    model = SERVABLES[workload]

    @contextmanager
    def plain() -> Iterator[tuple[Server, str]]:
        application = {
            "import_path": "benchmarks.baselines:plain_ray_serve",
            "args": {"workload": workload, "threads": threads},
        }
        with serve_run(application, plain=True) as server:
            yield server, "/"

    @contextmanager
    def unbatched() -> Iterator[tuple[Server, str]]:
        options = [workload, "--threads", str(threads), "--port", str(PORT)]
        with start(["-m", "benchmarks.baselines", *options]) as server:
            yield server, "/"

    @contextmanager
    def ours() -> Iterator[tuple[Server, str]]:
        application = {
            "import_path": "deployments.app:build",
            "args": {
                "model": f"{model.__module__}:{model.__name__}",
                "name": "bench",
                "threads": threads,
                "pt2": {"tune": {"budget_s": budget_s}},
                "batching": {"max_queue": 256},  # the others refuse nothing either
            },
        }
        with serve_run(application) as server:
            yield server, "/predictions/bench"

    def lit(*flags: str) -> Callable[[], AbstractContextManager[Any]]:
        @contextmanager
        def begin() -> Iterator[tuple[Server, str]]:
            options = [workload, "--threads", str(threads), "--port", str(PORT), *flags]
            with start(["-m", "benchmarks.lit", *options]) as server:
                yield server, "/predict"

        return begin

    return {
        "Ray Serve, eager, `@serve.batch`": plain,
        "LitServe, eager": lit(),
        "LitServe, torch.compile": lit("--compiled"),
        "Starlette, eager, unbatched": unbatched,
        OURS: ours,
    }


@dataclass
class Found:
    """What one server was measured to do in one round; CPU in ms a request."""

    closed: list[tuple[Load, float]]
    open: list[tuple[float, Load]]
    """By share of the rate at the clients of `--capacity`."""
    memory_mb: float
    batches: tuple[float, float] | None = None
    """Requests a run, and the share of all that ran that was padding, in tokens; ours only."""


def measure(workload: Workload, server: Server, path: str, options: argparse.Namespace, *, is_ours: bool) -> Found:
    """Load one server, in a closed loop and then at random times."""
    payloads = [make_form(p) for p in workload.payloads] if path == "/predict" else workload.payloads
    server.wait(path, payloads[0])
    closed_loop(PORT, path, payloads, workload.check, 4, 3.0)
    found = Found([], [], 0.0)
    for clients in options.clients:
        before = server.cpu_s()
        load = closed_loop(PORT, path, payloads, workload.check, clients, options.seconds)
        found.closed.append((load, (server.cpu_s() - before) / max(len(load.taken), 1) * 1e3))
    capacity = found.closed[options.clients.index(options.capacity)][0].rate
    for share in options.shares:
        load = open_loop(PORT, path, payloads, workload.check, share * capacity, 2 * options.seconds)
        found.open.append((share * capacity, load))
    found.memory_mb = server.memory_mb()
    if is_ours:
        time.sleep(12)  # Ray's metrics are that late
        requests, runs = (server.total(f"{name}_count") for name in ("pt2_queue_wait_ms", "pt2_run_ms"))
        padding, ran = server.total("pt2_tokens_total", 'kind="padding"'), server.total("pt2_tokens_total")
        found.batches = (requests / max(runs, 1), padding / max(ran, 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", choices=[*SERVABLES, []], default=[], help="default: both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--capacity", type=int, default=32, help="the clients whose rate `--shares` are of")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.5, 0.8, 0.95])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--servers", nargs="+", help="only those whose name holds one of these words")
    parser.add_argument("--budget-s", type=float, default=60.0)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the rates")
    options = parser.parse_args()
    if options.capacity not in options.clients:
        parser.error(f"--capacity {options.capacity} is not among --clients")
    print(f"One replica or worker, {options.threads} threads. {describe_machine()}", flush=True)
    results = {}
    for name in options.workloads or SERVABLES:
        workload = Workload.make(name)
        found: dict[str, list[Found]] = {}
        for _ in range(options.rounds):
            for system, begin in make_servers(name, options.threads, options.budget_s).items():
                if options.servers and not any(word in system for word in [*options.servers, OURS]):
                    continue
                with begin() as (server, path):
                    found.setdefault(system, []).append(
                        measure(workload, server, path, options, is_ours=system == OURS)
                    )
                print(f"measured {name}: {system}", file=sys.stderr, flush=True)
        print_closed(workload, found, options.clients)
        print_open(found, options.shares)
        results[name] = found
    if options.plot:
        plot(results, options.clients, options.plot)


def print_closed(workload: Workload, found: dict[str, list[Found]], clients: list[int]) -> None:
    """Print requests a second by server and clients: medians of the rounds, and how often ours is the other's."""
    rates = {system: [rate(rounds, i) for i in range(len(clients))] for system, rounds in found.items()}
    print(f"\n{workload.name}: requests/s (p50 ms; CPU ms a request), and what {OURS} is times that\n")
    print("| server | " + " | ".join(f"{n} clients" for n in clients) + " | memory (MB) | failed / wrong |")
    print("|---|" + "---|" * (len(clients) + 2))
    for system, rounds in found.items():
        cells = []
        for i in range(len(clients)):
            p50 = statistics.median(r.closed[i][0].ms(50) for r in rounds)
            cpu = statistics.median(r.closed[i][1] for r in rounds)
            ratio = "" if system == OURS else f" **{rates[OURS][i] / rates[system][i]:.2f}x**"
            cells.append(f"{rates[system][i]:.1f} ({p50:.0f}; {cpu:.0f}){ratio}")
        loads = [load for r in rounds for load, _ in r.closed]
        bad = f"{sum(len(load.failed) for load in loads)} / {sum(load.wrong for load in loads)}"
        memory = statistics.median(r.memory_mb for r in rounds)
        print(f"| {system} | {' | '.join(cells)} | {memory:.0f} | {bad} |", flush=True)
    for requests, padding in (r.batches for r in found[OURS] if r.batches):
        print(f"\n{OURS}: {requests:.2f} requests a run, {100 * padding:.0f} % of what ran padding, over all loads")


def print_open(found: dict[str, list[Found]], shares: list[float]) -> None:
    """Print latencies at random arrivals, by server and share of its own rate; the round with the median p99."""
    if not shares:
        return
    print("\n| server | " + " | ".join(f"at {100 * share:.0f} % of its rate" for share in shares) + " |")
    print("|---|" + "---|" * len(shares))
    for system, rounds in found.items():
        cells = []
        for i in range(len(shares)):
            at, load = sorted((r.open[i] for r in rounds), key=lambda pair: pair[1].ms(99))[len(rounds) // 2]
            p50, p99 = load.ms(50), load.ms(99)
            bad = f", {len(load.failed)} failed, {load.wrong} wrong" if load.failed or load.wrong else ""
            cells.append(f"{at:.0f}/s: p50 {p50:.0f}, p99 {p99:.0f} ms, {p99 / p50:.2f}{bad}")
        print(f"| {system} | {' | '.join(cells)} |", flush=True)


def rate(rounds: list[Found], place: int) -> float:
    """Return the median requests a second of the rounds."""
    return statistics.median(r.closed[place][0].rate for r in rounds)


def plot(results: dict[str, dict[str, list[Found]]], clients: list[int], path: Path) -> None:
    """Draw requests a second by server and clients, one panel a workload."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(10, 3.6 * len(results)), squeeze=False, layout="constrained")
    for axis, (workload, found) in zip(axes[:, 0], results.items(), strict=True):
        names = [f"{n} client{'s' * (n > 1)}" for n in clients]
        rates = {system: [rate(rounds, i) for i in range(len(clients))] for system, rounds in found.items()}
        draw_bars(axis, names, rates, ours=OURS)
        axis.set_ylabel("requests a second")
        axis.set_title(workload)
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(describe_machine(), fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
