"""Seconds to ready, and what they were spent on: python -m benchmarks.start photos texts.

Each start is a process of its own that loads and compiles as a replica does: eager, cold (an empty cache), and warm
(the cache that the cold start left), in turn. What Ray needs to start a replica's process comes on top of each.
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

from benchmarks.baselines import SERVABLES
from benchmarks.machine import describe_machine

STAGES = ("import and load", "eager", "cache", "race", "build", "streams")


def start_once(workload: str, threads: int, *, eager: bool) -> dict[str, float]:
    """Start in this process; return the seconds of each stage, and of all together."""
    started = time.perf_counter()
    from deployments.args import ModelArgs
    from deployments.compile import compile_servable

    model = SERVABLES[workload]
    pt2 = {"compile": {"enable": False}} if eager else {}
    args = ModelArgs.parse({"model": f"{model.__module__}:{model.__name__}", "pt2": pt2})
    report = compile_servable(args.make_servable(), args, "cpu", threads).report
    total = time.perf_counter() - started
    return {**report.seconds, "total": total, "import and load": total - report.seconds["total"]}


def in_a_process(workload: str, threads: int, cache: Path, *, eager: bool) -> dict[str, float]:
    """Run `start_once` in a new process with a folder for all caches."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.start", workload, "--threads", str(threads), "--one"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    done = subprocess.run(
        [*command, *(["--eager"] if eager else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        env=environment,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", choices=[*SERVABLES, []], default=[], help="default: both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--eager", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(start_once(options.workloads[0], options.threads, eager=options.eager)))
        return
    print(f"Seconds, medians of {options.rounds} rounds, {options.threads} threads. {describe_machine()}")
    for workload in options.workloads or SERVABLES:
        found: dict[str, list[dict[str, Any]]] = {"eager": [], "cold": [], "warm": []}
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory(prefix="bench-cache-") as cache:
                for how, starts in found.items():
                    starts.append(in_a_process(workload, options.threads, Path(cache), eager=how == "eager"))
        print(f"\n{workload}\n\n| start | ready | {' | '.join(STAGES)} |\n|---|---|{'---|' * len(STAGES)}")
        for how, starts in found.items():
            total, *stages = (statistics.median(s.get(stage, 0.0) for s in starts) for stage in ("total", *STAGES))
            print(f"| {how} | **{total:.1f}** | {' | '.join(f'{s:.1f}' for s in stages)} |", flush=True)


if __name__ == "__main__":
    main()
