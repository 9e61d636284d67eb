"""Every engine on every bucket of two models, and what `auto` makes of them: python -m benchmarks.engines.

Each engine gets a process of its own, so that none runs with the settings another left; its ratio is against the
eager runs interleaved with it. Each is started twice: cold, with an empty folder for the caches (ours and Inductor's),
and warm, with the folder that the first start left. Last, what `auto` chose is timed in turn with ONNX Runtime and
OpenVINO called directly.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import draw_bars
from benchmarks.direct import against_direct
from benchmarks.machine import describe_machine
from benchmarks.models import SUBJECTS

KEEP = {"only_if_faster": False}
ENGINES: dict[str, Any] = {
    "channels_last": {"compile": {"backend": "channels_last", **KEEP}},
    "inductor frozen": {"compile": {"backend": "inductor", **KEEP}},
    "inductor": {"compile": {"backend": "inductor-unfrozen", **KEEP}},
    "max-autotune": {"compile": {"backend": "inductor-max-autotune", **KEEP}},
    "aot": {"compile": {"backend": "aot", **KEEP}},
    "ipex": {"compile": {"backend": "ipex", **KEEP}},
    "ipex-compile": {"compile": {"backend": "ipex-compile", **KEEP}},
    "openvino": {"compile": {"backend": "openvino", **KEEP}},
    "onnxruntime": {"compile": {"backend": "onnxruntime", **KEEP}},
    "auto": {},
}


def run_engine(subject_name: str, engine: str, threads: int) -> dict[str, Any]:
    """Compile a model with one engine in this process; return its report."""
    from optim import compile_model

    torch.set_num_threads(threads)
    subject = SUBJECTS[subject_name]
    model = compile_model(
        subject.load(),
        subject.example,
        ENGINES[engine],
        batch_sizes=subject.batch_sizes,
        lengths=subject.lengths,
        device="cpu",
    )
    return model.report.to_dict()


def in_a_process(*arguments: str, cache: str | None = None) -> Any:
    """Run this module with the arguments in a process of its own; return what it prints last, as JSON."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.engines", *arguments]
    folders = {} if cache is None else {"TORCHINDUCTOR_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
    environment = {**os.environ, **folders}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(subject: str, threads: int, engines: list[str]) -> dict[str, dict[str, Any]]:
    """Return the reports by engine, `warm_s` added to each: the seconds of a second start."""
    reports = {}
    for engine in engines:
        with tempfile.TemporaryDirectory(prefix="bench-cache-") as cache:
            arguments = ["--one", engine, "--models", subject, "--threads", str(threads)]
            reports[engine] = in_a_process(*arguments, cache=cache)
            reports[engine]["warm_s"] = in_a_process(*arguments, cache=cache)["seconds"]["total"]
        print(f"measured {subject}: {engine}", file=sys.stderr, flush=True)
    return reports


def print_table(reports: dict[str, dict[str, Any]]) -> None:
    """Print the figures as a Markdown table."""
    names = [bucket_name(b) for b in next(iter(reports.values()))["buckets"]]
    print("| engine | " + " | ".join(names) + " | ready, cold / warm (s) |")
    print("|---|" + "---|" * (len(names) + 1))
    for engine, report in reports.items():
        cells = []
        for b in report["buckets"]:
            # A lone engine that is eager was refused; `auto` may have chosen so.
            refused = b["engine"] == "eager" and engine != "auto"
            chosen = f" {b['engine']}" if engine == "auto" else ""
            cells.append(
                "refused" if refused else f"{b['ms']:.1f} ({b['eager_ms']:.1f}; **{b['speedup']:.2f}x**){chosen}"
            )
        print(f"| {engine} | " + " | ".join(cells) + f" | {report['seconds']['total']:.1f} / {report['warm_s']:.1f} |")
    for engine, report in reports.items():
        if engine != "auto" and all(b["engine"] == "eager" for b in report["buckets"]):
            first = [*report["refusals"], *(r for b in report["buckets"] for r in b["refusals"])][0]
            print(f"\n`{engine}` was refused: {first['message'].splitlines()[0]}")


def bucket_name(bucket: dict[str, Any]) -> str:
    """Return `batch 8`, or `8 x 64 tokens`."""
    return (
        f"{bucket['batch_size']} x {bucket['length']} tokens" if bucket["length"] else f"batch {bucket['batch_size']}"
    )


def plot(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Draw the ratios to eager, one panel a model, one group of bars a bucket."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(10, 3.6 * len(results)), squeeze=False, layout="constrained")
    for axis, (subject, reports) in zip(axes[:, 0], results.items(), strict=True):
        names = [bucket_name(b) for b in next(iter(reports.values()))["buckets"]]
        ratios = {
            engine: [b["speedup"] if b["engine"] != "eager" or engine == "auto" else 0 for b in report["buckets"]]
            for engine, report in reports.items()
        }
        draw_bars(axis, names, ratios, ours="auto")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_ylabel("times as fast as eager")
        axis.set_title(SUBJECTS[subject].title)
    axes[0, 0].legend(ncols=5, fontsize="small")
    figure.suptitle(describe_machine(), fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the ratios")
    parser.add_argument("--one", choices=list(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--direct", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_engine(options.models[0], options.one, options.threads)))
        return
    if options.direct:
        print(json.dumps(against_direct(SUBJECTS[options.models[0]], options.threads)))
        return
    torch.set_num_threads(options.threads)
    print(f"float32, median ms (eager's ms in the same rounds; ratio). {describe_machine()}")
    results = {}
    for name in options.models:
        results[name] = measure(name, options.threads, options.engines)
        print(f"\n{SUBJECTS[name].title}\n")
        print_table(results[name])
        if "auto" in options.engines:
            found = in_a_process("--direct", "--models", name, "--threads", str(options.threads))
            print("\n| bucket | auto (ms) | " + " | ".join(f"{key} called directly" for key in found["direct"]) + " |")
            print("|---|---|" + "---|" * len(found["direct"]))
            for bucket, row in found["buckets"].items():
                print(
                    f"| {bucket} | {row['engine']} {row['auto']:.2f} | "
                    + " | ".join(f"{row[key]:.2f}" for key in found["direct"])
                    + " |"
                )
        sys.stdout.flush()
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
