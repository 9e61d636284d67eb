"""The process that compiles in the background: `python -m optim.filler <folder> <pipe>`, started by `background.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

import torch

from optim.child import be_a_child, unpack
from optim.choose import fill_cache
from optim.report import CompileReport


def _fill(folder: Path, pipe: IO[bytes]) -> None:
    """Be the child: load the job, make the entry of the cache, and tell the report."""
    with torch.no_grad():
        given = unpack(folder)
        pipe.write(b"ready\n")
        job, more = given.job, given.more
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


if __name__ == "__main__":
    be_a_child(_fill)
