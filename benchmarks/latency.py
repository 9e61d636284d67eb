"""One client's latency against calling the model directly: python -m benchmarks.latency photos texts.

Directly is the servable's preprocess, the compiled model and its postprocess in one process, one request after the
other. The same plan serves then, from the same cache. The hop is what the way costs with a model that does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import SERVABLES
from benchmarks.hop import NOTHING
from benchmarks.load import Load, closed_loop, deal
from benchmarks.machine import describe_machine
from benchmarks.servers import PORT, serve_run
from benchmarks.workloads import Workload, make_payloads

NAME = "bench"
_IDLE_S = 10.0


def model_args(workload: str, threads: int, budget_s: float) -> dict[str, Any]:
    """Return what directly and served have in common."""
    model = SERVABLES[workload]
    return {
        "model": f"{model.__module__}:{model.__name__}",
        "name": NAME,
        "threads": threads,
        "pt2": {"tune": {"budget_s": budget_s}},
    }


def call_directly(workload: str, threads: int, budget_s: float, seconds: float) -> dict[str, float]:
    """Answer the requests in this process in random order; return the p50 of each part, ms."""
    from deployments.args import ModelArgs
    from deployments.compile import compile_servable

    args = ModelArgs.parse(model_args(workload, threads, budget_s))
    servable = args.make_servable()
    model = compile_servable(servable, args, "cpu", threads)
    payloads = make_payloads(workload)
    cards = deal(len(payloads))
    parts: dict[str, list[float]] = {"read": [], "model": [], "answer": [], "all": []}
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        row = servable.preprocess(payloads[next(cards)])
        read = time.perf_counter()
        output = model(*(t.unsqueeze(0) for t in (row if isinstance(row, tuple) else (row,))))
        ran = time.perf_counter()
        servable.postprocess(output[0])
        done = time.perf_counter()
        times = (read - begin, ran - read, done - ran, done - begin)
        for part, taken in zip(parts.values(), times, strict=True):
            part.append(taken)
    return {name: statistics.median(part) * 1e3 for name, part in parts.items()}


def directly(workload: str, options: argparse.Namespace, cache: Path) -> dict[str, float]:
    """Run `call_directly` in a process of its own, with a folder for all caches."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.latency", workload, "--direct"]
    command += ["--threads", str(options.threads), "--seconds", str(options.seconds)]
    command += ["--budget-s", str(options.budget_s)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def served(workload: str, options: argparse.Namespace, cache: Path) -> tuple[Load, Load, Load | None]:
    """Return one client's load on the model, on one that does nothing, and on the model under `options.against`."""
    model = model_args(workload, options.threads, options.budget_s)
    work = Workload.make(workload)
    torch.set_num_threads(1)

    def ask(args: dict[str, Any], settings: list[str]) -> Load:
        path = f"/predictions/{args['name']}"
        check = work.check if args is not NOTHING else lambda index, body: True
        environment = {"XDG_CACHE_HOME": str(cache), **dict(setting.split("=", 1) for setting in settings)}
        with serve_run({"import_path": "deployments.app:build", "args": args}, environment) as server:
            server.wait(path, work.payloads[0])
            closed_loop(PORT, path, work.payloads, check, 1, 3.0)
            if options.against and args is not NOTHING:
                before = server.cpu_s()
                time.sleep(_IDLE_S)
                cores = (server.cpu_s() - before) / _IDLE_S
                print(f"{' '.join(settings) or 'make serve'}: {cores:.3f} cores without requests", file=sys.stderr)
            return closed_loop(PORT, path, work.payloads, check, 1, options.seconds)

    other = ask(model, options.against) if options.against else None
    return ask(model, []), ask(NOTHING, []), other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", choices=[*SERVABLES, []], default=[], help="default: both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=60.0)
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="serve under this environment too; watch both idle",
    )
    parser.add_argument("--direct", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.direct:
        print(json.dumps(call_directly(options.workloads[0], options.threads, options.budget_s, options.seconds)))
        return
    print(f"p50, ms; medians of {options.rounds} rounds, {options.threads} threads. {describe_machine()}\n")
    print("| requests | directly (read, model, answer) | the hop | served | served less hop is | failed / wrong |")
    print("|---|---|---|---|---|---|")
    for workload in options.workloads or SERVABLES:
        rounds, others = [], []
        with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
            cache = Path(folder)
            for _ in range(options.rounds):
                alone = directly(workload, options, cache)
                load, hop, other = served(workload, options, cache)
                rounds.append((alone, hop, load))
                print(f"{workload}: {alone}, hop {hop.ms(50):.2f}, served {load.ms(50):.2f}", file=sys.stderr)
                if other is not None:
                    others.append(other)
        read, model, answer, whole = (
            statistics.median(alone[part] for alone, _, _ in rounds) for part in ("read", "model", "answer", "all")
        )
        hop_ms = statistics.median(hop.ms(50) for _, hop, _ in rounds)
        served_ms = statistics.median(load.ms(50) for _, _, load in rounds)
        bad = f"{sum(len(load.failed) for *_, load in rounds)} / {sum(load.wrong for *_, load in rounds)}"
        print(
            f"| {workload} | {whole:.2f} ({read:.2f}, {model:.2f}, {answer:.2f}) | {hop_ms:.2f} | {served_ms:.2f} "
            f"| **{(served_ms - hop_ms) / whole:.2f}x** | {bad} |",
            flush=True,
        )
        if others:
            other_ms = statistics.median(load.ms(50) for load in others)
            bad = f"{sum(len(load.failed) for load in others)} / {sum(load.wrong for load in others)}"
            print(
                f"\nUnder {' '.join(options.against)}, {workload}: {other_ms:.2f} ms, failed / wrong {bad}", flush=True
            )


if __name__ == "__main__":
    main()
