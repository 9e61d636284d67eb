"""Seconds to ready, and what they were spent on: python -m benchmarks.start photos texts.

Each start is a process of its own that loads and compiles as a replica does, in turn: eager; cold (an empty cache);
warm (the cache that the cold start left); on another node (an empty cache, and the plan from storage that nodes share);
with AOTInductor, for the first time and from the packages that this left; and in the background (an empty cache), which
is ready while it is eager. What Ray needs to start a replica's process comes on top of each.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

#: By name, since what imports them (Ray, for one) is no part of a start here.
SERVABLES = {"photos": "deployments.vision:ImageClassifier", "texts": "deployments.text:SentenceEncoder"}
STAGES = ("import and load", "eager", "cache", "share", "race", "build", "streams")
AFTER = ("background compile", "background move")


@dataclass(frozen=True)
class How:
    """One way to start: the `pt2` section, and which cache it finds."""

    cache: str
    pt2: dict[str, Any] = field(default_factory=dict)


AOT = {"export": {"aot_compile": True}}
STARTS = {
    "eager": How("none", {"compile": {"enable": False}}),
    "cold": How("first"),
    "warm": How("first"),
    "other node": How("second"),
    "AOT, cold": How("third", AOT),
    "AOT, warm": How("third", AOT),
    "background": How("fourth", {"compile": {"when": "background"}}),
}


def start_once(workload: str, threads: int, pt2: dict[str, Any], began: float) -> dict[str, float]:
    """Start in this process, which began at a time of the monotonic clock; return the seconds of each stage and of all.

    All ends where it is ready.
    """
    from deployments.args import ModelArgs
    from deployments.compile import compile_servable

    args = ModelArgs.parse({"model": SERVABLES[workload], "pt2": pt2})
    found = compile_servable(args.make_servable(), args, "cpu", threads)
    total = time.monotonic() - began
    if found.background is not None:
        found.background.run(lambda change: change())
    report = found.report
    return {**report.seconds, "total": total, "import and load": total - report.seconds["total"]}


def in_a_process(workload: str, threads: int, how: How, folder: Path) -> dict[str, float]:
    """Run `start_once` in a new process with a folder for all caches, and one that all starts share."""
    cache = folder / how.cache
    pt2 = {**how.pt2, "cache": {"uri": f"file://{folder / 'shared'}"}} if how.cache in ("first", "second") else how.pt2
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.start", workload, "--threads", str(threads)]
    done = subprocess.run(
        [*command, "--one", json.dumps({"pt2": pt2, "began": time.monotonic()})],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        env={
            **os.environ,
            "XDG_CACHE_HOME": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "PT2_CACHE_KEY": "of the benchmark alone",
        },
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draw what every start's seconds were spent on, one panel a model."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(10, 3.2 * len(results)), squeeze=False, layout="constrained")
    for axis, (workload, starts) in zip(axes[:, 0], results.items(), strict=True):
        names, left = list(starts), [0.0] * len(starts)
        for stage in (*STAGES, *AFTER):
            seconds = [found[stage] for found in starts.values()]
            axis.barh(names, seconds, left=left, label=stage, hatch="//" if stage in AFTER else None)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        axis.invert_yaxis()
        axis.set_title(workload)
        axis.set_xlabel("seconds; hatched: ready already, and answering eager")
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(describe_machine(), fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", choices=[*SERVABLES, []], default=[], help="default: both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the seconds")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(start_once(options.workloads[0], options.threads, **json.loads(options.one))))
        return
    print(f"Seconds, medians of {options.rounds} rounds, {options.threads} threads. {describe_machine()}")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for workload in options.workloads or SERVABLES:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in STARTS}
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
                for name, how in STARTS.items():
                    found[name].append(in_a_process(workload, options.threads, how, Path(folder)))
                    print(f"{workload}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
        columns = ("total", *STAGES, *AFTER)
        results[workload] = {
            name: {column: statistics.median(s.get(column, 0.0) for s in starts) for column in columns}
            for name, starts in found.items()
        }
        print(f"\n{workload}\n\n| start | ready | {' | '.join(columns[1:])} |\n|---|{'---|' * len(columns)}")
        for name, seconds in results[workload].items():
            total, *stages = seconds.values()
            print(f"| {name} | **{total:.1f}** | {' | '.join(f'{s:.1f}' if s else '' for s in stages)} |", flush=True)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
