"""The plan: which engine won which bucket, with figures and reasons; what a warm start verifies instead of racing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optim.buckets import Bucket
from optim.report import CompileReport, Refusal

_FILE = "plan.json"
#: What of a bucket's row a later start takes over; errors and tolerances are found anew.
_TIMES = ("ms", "eager_ms", "speedup", "stream_ms", "stream_gain")
_REASONS = ("race", "eager_won")
_KEPT = (*_TIMES, *_REASONS)


class BadPlan(Exception):
    """The plan cannot be used here; the message is the reason.

    `stage` is where it failed, as in a Refusal: at `time` it was slower than eager, which load can do, at `stuck` it
    had no chance. `old` is one that is to be made anew, whether it holds or not.
    """

    def __init__(self, reason: str, stage: str = "verify") -> None:
        super().__init__(reason)
        self.stage = stage


@dataclass(frozen=True)
class Plan:
    """The outcome of a compilation: engines, figures and refusals by bucket, and how many streams there were."""

    made_for: Mapping[str, Any]
    """What the compilation was of (`fingerprint.describe_job`)."""
    rows: Mapping[Bucket, Mapping[str, Any]]
    streams: int
    refusals: Sequence[Refusal]
    """Those of engines as a whole; a bucket's own are in its row."""
    remarks: Sequence[str]
    """What later starts should know of how it was made."""
    made_at: float
    """When, in seconds since the epoch."""

    @classmethod
    def of(cls, report: CompileReport, made_for: Mapping[str, Any], remarks: Iterable[str] = ()) -> Plan:
        """Take down what a report says."""
        rows = {
            b.bucket: {
                "engine": b.engine,
                "refusals": b.refusals,
                **{name: getattr(b, name) for name in _KEPT},
            }
            for b in report.buckets
        }
        return cls(made_for, rows, report.streams, report.refusals, list(remarks), time.time())

    @classmethod
    def load(cls, folder: Path, made_for: Mapping[str, Any], oldest: float = 0.0) -> Plan:
        """Read a plan; BadPlan where it is none, one for something else, or older than `oldest` (since the epoch)."""
        try:
            found = json.loads((folder / _FILE).read_bytes())
            rows = {
                Bucket(int(row["batch_size"]), int(row["length"])): {
                    "engine": str(row["engine"]),
                    "refusals": _refusals(row["refusals"]),
                    **{name: row[name] for name in _KEPT},
                }
                for row in found["buckets"]
            }
            streams, refusals = int(found["streams"]), _refusals(found["refusals"])
            theirs, remarks = found["made_for"], list(map(str, found["remarks"]))
            made_at = float(found["made_at"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadPlan(f"its plan cannot be read ({type(error).__name__})") from error
        if theirs != as_kept(made_for):
            raise BadPlan("its plan was made for something else")
        if made_at < oldest:
            raise BadPlan("its plan was made before pt2.cache.not_before", "old")
        return cls(made_for, rows, streams, refusals, remarks, made_at)

    @staticmethod
    def subject(folder: Path) -> dict[str, Any] | None:
        """Return what the plan in a folder says it was made for, as yet unproven; None where there is none."""
        try:
            return dict(json.loads((folder / _FILE).read_bytes())["made_for"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, folder: Path) -> None:
        """Write the plan into a folder."""
        buckets = [
            {
                "batch_size": bucket.batch_size,
                "length": bucket.length,
                **row,
                "refusals": [asdict(refusal) for refusal in row["refusals"]],
            }
            for bucket, row in self.rows.items()
        ]
        found = {
            "made_for": self.made_for,
            "streams": self.streams,
            "buckets": buckets,
            "refusals": [asdict(refusal) for refusal in self.refusals],
            "remarks": self.remarks,
            "made_at": self.made_at,
        }
        (folder / _FILE).write_text(json.dumps(found, indent=1, default=str))

    def fill(self, report: CompileReport) -> None:
        """Take the figures over into a report whose rows are those of the plan's buckets."""
        for row in report.buckets:
            for name in _TIMES:
                setattr(row, name, self.rows[row.bucket][name])

    def explain(self, report: CompileReport) -> None:
        """Take the reasons over: what raced, and why which engine lost."""
        for row in report.buckets:
            known = self.rows.get(row.bucket)
            if known is not None:
                for name in _REASONS:
                    setattr(row, name, known[name])
                row.refusals += [refusal for refusal in known["refusals"] if refusal not in row.refusals]
        report.refusals += [refusal for refusal in self.refusals if refusal not in report.refusals]
        report.notes += [remark for remark in self.remarks if remark not in report.notes]


def as_kept(made_for: Mapping[str, Any]) -> Any:
    """Return a description as a plan that was read has it."""
    return json.loads(json.dumps(made_for, default=str))


def _refusals(found: Iterable[Mapping[str, Any]]) -> list[Refusal]:
    return [Refusal(**refusal) for refusal in found]
