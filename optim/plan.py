"""The plan: which engine won which bucket, with its figures; what a warm start verifies instead of racing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optim.buckets import Bucket
from optim.report import CompileReport

_FILE = "plan.json"
#: What of a bucket's row a later start takes over; errors and tolerances are found anew.
_FIGURES = ("ms", "eager_ms", "speedup", "stream_ms", "stream_gain", "race", "eager_won")


class BadPlan(Exception):
    """The plan cannot be used here; the message is the reason. `is_slow`: slower than eager, which load can do."""

    def __init__(self, reason: str, *, is_slow: bool = False) -> None:
        super().__init__(reason)
        self.is_slow = is_slow


@dataclass(frozen=True)
class Plan:
    """The outcome of a compilation: engines and figures by bucket, and how many streams there were."""

    made_for: Mapping[str, Any]
    """What the compilation was of (`fingerprint.describe_job`)."""
    rows: Mapping[Bucket, Mapping[str, Any]]
    streams: int

    @classmethod
    def of(cls, report: CompileReport, made_for: Mapping[str, Any]) -> Plan:
        """Take down what a report says."""
        rows = {b.bucket: {"engine": b.engine, **{name: getattr(b, name) for name in _FIGURES}} for b in report.buckets}
        return cls(made_for, rows, report.streams)

    @classmethod
    def load(cls, folder: Path, made_for: Mapping[str, Any]) -> Plan:
        """Read a plan; BadPlan where it is none, or one for something else."""
        try:
            found = json.loads((folder / _FILE).read_bytes())
            rows = {
                Bucket(int(row["batch_size"]), int(row["length"])): {
                    "engine": str(row["engine"]),
                    **{name: row[name] for name in _FIGURES},
                }
                for row in found["buckets"]
            }
            streams = int(found["streams"])
            theirs = found["made_for"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadPlan(f"its plan cannot be read ({type(error).__name__})") from error
        if theirs != json.loads(json.dumps(made_for, default=str)):
            raise BadPlan("its plan was made for something else")
        return cls(made_for, rows, streams)

    def save(self, folder: Path) -> None:
        """Write the plan into a folder."""
        buckets = [{"batch_size": b.batch_size, "length": b.length, **row} for b, row in self.rows.items()]
        found = {"made_for": self.made_for, "streams": self.streams, "buckets": buckets}
        (folder / _FILE).write_text(json.dumps(found, indent=1, default=str))

    def fill(self, report: CompileReport) -> None:
        """Take the figures over into a report whose rows are those of the plan's buckets."""
        for row in report.buckets:
            for name in _FIGURES:
                setattr(row, name, self.rows[row.bucket][name])
