"""The process that compiles in the background: `python -m optim.filler <folder> <pipe>`, started by `background.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch

from optim.child import be_a_child, unpack
from optim.choose import fill_cache
from optim.engines import EngineJob
from optim.report import CompileReport
from optim.start import RACE_BUDGET_S
from optim.timing import time_in_turn

#: How much longer than its budget a race may take on a machine that is busy answering.
_MOST_STRETCH = 10.0


def _fill(folder: Path, pipe: IO[bytes]) -> None:
    """Be the child: load the job, make the entry of the cache, and tell the report."""
    with torch.no_grad():
        given = unpack(folder)
        pipe.write(b"ready\n")
        job, more = allow_for_others(given.job, given.more["quiet_ms"]), given.more
        report = CompileReport(torch.__version__, job.info.to_dict(), job.config.to_dict(), phase=job.phase)
        path = fill_cache(
            job,
            given.reference,
            report,
            more["made_for"],
            more["streams"],
            streams_must_pay=more["streams_must_pay"],
        )
    report.cache = None if path is None else str(path)
    pipe.write(json.dumps(report.to_dict(), default=str).encode() + b"\n")


def allow_for_others(job: EngineJob, quiet_ms: float) -> EngineJob:
    """Stretch the race's budget by how much slower eager is now, beside a replica that answers, than it was before."""
    ms, *_ = time_in_turn([job.module], job.samples[min(job.samples)], job.info.device, min_rounds=3, budget_s=1.0)
    stretch = min(max(ms / quiet_ms, 1.0), _MOST_STRETCH)
    tune, races = job.config.tune, job.config.compile.backend == "auto"
    budget_s = tune.budget_s or (RACE_BUDGET_S if races else None)
    tune = replace(tune, budget_s=budget_s and budget_s * stretch)
    return replace(job, config=replace(job.config, tune=tune))


if __name__ == "__main__":
    be_a_child(_fill)
