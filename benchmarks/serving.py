"""Requests a second over HTTP against what people run without us: python -m benchmarks.serving photos texts.

Every server has one replica or worker, eager or ours, with the same threads; each starts anew for every round, in turn.
Every reply is compared with eager's. The clients run on the same machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

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


def measure(workload: Workload, server: Server, path: str, options: argparse.Namespace) -> list[tuple[Load, float]]:
    """Return what each number of clients found, and the server's CPU ms a request."""
    payloads = [make_form(p) for p in workload.payloads] if path == "/predict" else workload.payloads
    server.wait(path, payloads[0])
    closed_loop(PORT, path, payloads, workload.check, 4, 3.0)
    found = []
    for clients in options.clients:
        before = server.cpu_s()
        load = closed_loop(PORT, path, payloads, workload.check, clients, options.seconds)
        found.append((load, (server.cpu_s() - before) / max(len(load.taken), 1) * 1e3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", choices=[*SERVABLES, []], default=list(SERVABLES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--servers", nargs="+", help="only those whose name holds one of these words")
    parser.add_argument("--budget-s", type=float, default=30.0)
    options = parser.parse_args()
    print(f"One replica or worker, {options.threads} threads. {describe_machine()}", flush=True)
    for name in options.workloads:
        workload = Workload.make(name)
        servers = {
            server: begin
            for server, begin in make_servers(name, options.threads, options.budget_s).items()
            if not options.servers or any(word in server for word in [*options.servers, OURS])
        }
        found: dict[str, list[list[tuple[Load, float]]]] = {server: [] for server in servers}
        tails = []
        for _ in range(options.rounds):
            for system, begin in servers.items():
                with begin() as (server, path):
                    found[system].append(measure(workload, server, path, options))
                    if system == OURS:
                        rate = 0.8 * found[system][-1][-1][0].rate
                        tails.append((rate, open_loop(PORT, path, workload.payloads, workload.check, rate, 20)))
        print_table(workload, found, options.clients)
        for rate, tail in tails:
            bad = f"{len(tail.failed)} failed, {tail.wrong} wrong"
            ratio = tail.ms(99) / tail.ms(50)
            print(f"at {rate:.1f}/s (80 %): p50 {tail.ms(50):.0f} ms, p99 {tail.ms(99):.0f} ms, {ratio:.2f}; {bad}")


def print_table(workload: Workload, found: dict[str, list[list[tuple[Load, float]]]], clients: list[int]) -> None:
    """Print requests a second by server and clients: medians of the rounds, and how often ours is the other's."""
    rates = {
        system: [statistics.median(r[i][0].rate for r in rounds) for i in range(len(clients))]
        for system, rounds in found.items()
    }
    print(f"\n{workload.name}: requests/s (p50 ms; CPU ms a request), and what {OURS} is times that\n")
    print("| server | " + " | ".join(f"{n} clients" for n in clients) + " | failed / wrong |")
    print("|---|" + "---|" * (len(clients) + 1))
    for system, rounds in found.items():
        cells = []
        for i in range(len(clients)):
            p50 = statistics.median(r[i][0].ms(50) for r in rounds)
            cpu = statistics.median(r[i][1] for r in rounds)
            ratio = "" if system == OURS else f" **{rates[OURS][i] / rates[system][i]:.2f}x**"
            cells.append(f"{rates[system][i]:.1f} ({p50:.0f}; {cpu:.0f}){ratio}")
        bad = f"{sum(len(c[0].failed) for r in rounds for c in r)} / {sum(c[0].wrong for r in rounds for c in r)}"
        print(f"| {system} | {' | '.join(cells)} | {bad} |", flush=True)


if __name__ == "__main__":
    main()
