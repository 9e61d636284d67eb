"""`CompileReport`: what was tried, chosen, measured and refused, and why; plain data."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from optim.buckets import Bucket
from optim.errors import describe

logger = logging.getLogger(__name__)
_COUNTING = threading.Lock()


@dataclass(frozen=True)
class Refusal:
    """Why an engine does not serve a bucket (or any, where `bucket` is none)."""

    engine: str
    stage: str
    """`preflight`, `build`, `warm-up`, `verify`, `time`, `budget` (not tried, or not to the end), `memory` (of which
    there was too little for CUDA graphs, or for a wider reference), `stuck` (what was compiled before hangs), or
    `serving`."""
    bucket: str | None
    exception: str | None
    message: str

    @classmethod
    def of(cls, engine: str, stage: str, bucket: Bucket | None, error: BaseException) -> Refusal:
        """Describe a caught exception."""
        kind, message = describe(error)
        return cls(engine, stage, None if bucket is None else str(bucket), kind, message)

    def __str__(self) -> str:
        where = f" for bucket{'s' if ',' in self.bucket else ''} {self.bucket}" if self.bucket else ""
        kind = f"{self.exception}: " if self.exception else ""
        return f"{self.engine} was refused at {self.stage}{where}: {kind}{self.message}"


@dataclass
class BucketReport:
    """One bucket: the engine that serves it, its median ms and eager's from the same rounds, and the error found."""

    batch_size: int
    length: int | None
    engine: str = "eager"
    ms: float | None = None
    eager_ms: float | None = None
    speedup: float | None = None
    tolerance: float | None = None
    """The error that was allowed, relative to the value plus the RMS."""
    max_abs_error: float | None = None
    relative_error: float | None = None
    stream_ms: float | None = None
    """Median ms of a run on a stream, while all streams run; on the scale of `ms`."""
    stream_gain: float | None = None
    """How much more work the streams do than one run after the other on all threads."""
    graph_bytes: int | None = None
    """GPU memory that capturing this bucket's CUDA graph took."""
    race: list[dict[str, float]] = field(default_factory=list)
    """Median ms by engine, one mapping for every round of the race: the engines of a round were timed in turn.

    Of engines that do not pad it is that of a request's average length; `ms` is the bucket's own.
    """
    eager_won: bool = False
    """Whether eager serves because it was fastest: in this bucket's race, in its nearest neighbour's, or at last."""
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def bucket(self) -> Bucket:
        """The bucket that this row is about."""
        return Bucket(self.batch_size, self.length or 0)


@dataclass
class AfterReady:
    """What happened since the model was built; every figure but `calls` should stay 0."""

    calls: int = 0
    """Counted, like all figures, by several threads where there are streams; so change them by `add`."""
    compilations: int = 0
    """Graphs compiled during a call."""
    graph_recordings: int = 0
    """CUDA graphs recorded during a call."""
    refused_compilations: int = 0
    """Calls that would have compiled, and ran eager instead."""
    shapes_without_bucket: int = 0
    """Calls whose shape or dtype no bucket holds, and that ran eager."""
    failed_runs: int = 0
    """Compiled runs that raised where eager then answered."""

    def add(self, figure: str, count: int = 1) -> int:
        """Add to a figure and return it; may be called by several threads."""
        with _COUNTING:
            total: int = getattr(self, figure) + count
            setattr(self, figure, total)
        return total


@dataclass
class CompileReport:
    """The whole story of one `compile_model`."""

    torch_version: str
    device: dict[str, Any]
    config: dict[str, Any]
    phase: str = "forward"
    """What a call of the module is."""
    attention: str | None = None
    """The SDPA kernel that compiled code is restricted to."""
    candidates: list[str] = field(default_factory=list)
    """Engines in the order they were to be tried."""
    buckets: list[BucketReport] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    """Refusals that concern an engine as a whole."""
    notes: list[str] = field(default_factory=list)
    """Decisions worth knowing that are not refusals."""
    start: str = "cold"
    """`warm` where a kept plan was verified instead of racing, `eager` where compiling was left to the background."""
    background: str | None = None
    """What became of that: `compiling` (in another process), `moving` (bucket by bucket), `done` or `failed`."""
    cache: str | None = None
    """The folder of the compile cache that holds what the next start needs, if one does."""
    streams: int = 1
    """How many calls may be made at a time; each then has its share of the threads."""
    padding: bool = True
    """Whether rows were found independent of their neighbours, so that batches may be padded and split."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where construction time went, by stage."""
    after_ready: AfterReady = field(default_factory=AfterReady)

    def engines(self) -> dict[str, str]:
        """Return the engine of every bucket, by the bucket's name."""
        return {str(b.bucket): b.engine for b in self.buckets}

    def all_refusals(self) -> list[Refusal]:
        """Return every refusal, those of single buckets included."""
        return [*self.refusals, *(refusal for bucket in self.buckets for refusal in bucket.refusals)]

    def warn(self, note: str) -> None:
        """Note something that is not as it was asked for, and log it."""
        self.notes.append(note)
        logger.warning(note)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, ready for JSON."""
        return asdict(self)


def announce(report: CompileReport) -> None:
    """Log what serves each bucket, and one warning for those left to eager although they were to be compiled."""
    logger.info("engines by bucket: %s", report.engines())
    eager = [b for b in report.buckets if b.engine == "eager"]
    if report.background == "compiling":
        logger.info("answering eager, until what is compiled in the background moves over")
    elif eager and report.candidates:
        reasons = [*report.refusals, *(refusal for b in eager for refusal in b.refusals)]
        names = ", ".join(str(b.bucket) for b in eager)
        failed = report.background == "failed"
        default = "compiling in the background failed" if failed else "no engine was more than 5 % faster"
        why = "; ".join(group_refusals(reasons)) or default
        logger.warning("buckets %s are served eager: %s", names, why)
    elif report.all_refusals():
        logger.info("refused on the way: %s", "; ".join(group_refusals(report.all_refusals())))


def group_refusals(refusals: Iterable[Refusal]) -> list[str]:
    """Say each reason once, with the buckets that it holds for."""
    buckets: dict[Refusal, list[str]] = {}
    for refusal in refusals:
        buckets.setdefault(replace(refusal, bucket=None), []).append(refusal.bucket or "")
    return [str(replace(reason, bucket=", ".join(filter(None, names)) or None)) for reason, names in buckets.items()]
