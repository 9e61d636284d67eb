"""Every engine on every bucket of a model, timed in turn with eager in one process: python -m benchmarks.engines.

Each engine gets a process of its own, so that none runs with the settings another left; the ratio is against the
eager runs interleaved with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks.machine import describe_machine

ENGINES: dict[str, Any] = {
    "ipex": {"compile": {"backend": "ipex", "only_if_faster": False}},
    "openvino": {"compile": {"backend": "openvino", "only_if_faster": False}},
    "inductor frozen": {"compile": {"backend": "inductor", "only_if_faster": False}},
    "inductor": {"compile": {"backend": "inductor", "freeze": False, "only_if_faster": False}},
    "aot": {"export": {"aot_compile": True}, "compile": {"enable": False, "only_if_faster": False}},
}


def run_engine(name: str, threads: int, batch_sizes: list[int]) -> dict[str, Any]:
    """Compile EfficientNet-Lite0 with one engine in this process; return its report."""
    from deployments.vision import ImageClassifier
    from optim import compile_model

    torch.set_num_threads(threads)
    servable = ImageClassifier()
    model = compile_model(servable.load(), servable.example, ENGINES[name], batch_sizes=batch_sizes)
    return model.report.to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--one", choices=list(ENGINES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_engine(options.one, options.threads, options.batch_sizes)))
        return
    torch.set_num_threads(options.threads)
    print(f"EfficientNet-Lite0, float32, median ms (eager's ms in the same rounds; ratio). {describe_machine()}\n")
    print("| engine | " + " | ".join(f"batch {size}" for size in options.batch_sizes) + " | seconds to ready |")
    print("|---|" + "---|" * (len(options.batch_sizes) + 1))
    for name in ENGINES:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.engines", "--one", name]
        command += ["--threads", str(options.threads), "--batch-sizes", *map(str, options.batch_sizes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        report = json.loads(done.stdout.splitlines()[-1])
        cells = [
            f"{b['ms']:.1f} ({b['eager_ms']:.1f}; **{b['speedup']:.2f}x**)"
            if b["engine"] != "eager"
            else f"refused: {report['refusals'] or b['refusals']}"
            for b in report["buckets"]
        ]
        print(f"| {name} | " + " | ".join(cells) + f" | {report['seconds']['total']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
