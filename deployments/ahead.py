"""`python -m deployments.ahead serve_config.yaml`: compile into the cache without serving, for images and CI.

Replicas on machines of the same kind, with the same packages and this cache (`pt2.cache.folder`), then start warm.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from deployments.args import ModelArgs
from deployments.check import OUR_BUILDER
from deployments.check import main as check
from deployments.compile import compile_all, resources
from optim.report import CompileReport
from optim.share import finish_offers


def _models(config: Mapping[str, Any]) -> Iterator[tuple[ModelArgs, str, int]]:
    """Yield what the replicas of a checked configuration file compile, with device and threads."""
    for application in config.get("applications") or ():
        if application.get("import_path") == OUR_BUILDER:
            args = ModelArgs.parse(application.get("args"))
            options: Mapping[str, Any] = {}
            for deployment in application.get("deployments") or ():
                options = deployment.get("ray_actor_options") or {}
            yield args, *resources(args, options.get("num_cpus", 1), options.get("num_gpus", 0))


def _tell(name: str, report: CompileReport) -> bool:
    """Print what a replica will find; return whether that is in the cache."""
    spent = ", ".join(f"{what} {seconds:.1f}" for what, seconds in report.seconds.items())
    if report.cache is None:
        print(f"{name}: nothing is kept; notes: {'; '.join(report.notes) or 'none'}", file=sys.stderr)
        return False
    how = "was there already" if report.start == "warm" else "is there now"
    print(f"{name}: {report.cache} {how} ({spent} s); a replica verifies:")
    for bucket in report.buckets:
        beside = f", {bucket.stream_ms:.2f} ms on a stream" if bucket.stream_ms else ""
        print(f"  bucket {bucket.bucket}: {bucket.engine}, {bucket.ms:.2f} ms{beside}")
    return True


def main(arguments: list[str]) -> int:
    """Compile every model of the files named; return 0 where replicas will find all of them, here and at the URI."""
    parser = argparse.ArgumentParser(prog="python -m deployments.ahead", description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", default=["serve_config.yaml"])
    parser.add_argument("--anew", action="store_true", help="compile what is in the cache, too, and replace it")
    asked = parser.parse_args(arguments)
    files, now = asked.files, datetime.now(UTC).isoformat()
    if status := check(files, serving=False):
        return status
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("optim").setLevel(logging.INFO)
    try:
        for args, device, threads in (m for name in files for m in _models(yaml.safe_load(Path(name).read_text()))):
            print(f"{args.name}: {device}, {threads} threads", flush=True)
            # What compiles in the background there finds the same.
            pt2 = args.pt2.at_start()
            if asked.anew:
                pt2 = replace(pt2, cache=replace(pt2.cache, not_before=now))
            models = compile_all(args.make_model(), replace(args, pt2=pt2), device, threads)
            for name, model in models.items():
                if not _tell(f"{args.name}{name and f', {name}'}", model.report):
                    status = 1
            del models, model
            gc.collect()
    finally:  # what was made by now is made
        if not finish_offers():
            print("not all that was made has arrived at pt2.cache.uri", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
