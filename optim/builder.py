"""Building what was chosen: for every bucket the first engine of its ranking that is right and no slower than eager."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from optim.buckets import Bucket
from optim.engines import EagerEngine, EngineJob, make_engine
from optim.engines.base import Engine, Runner, keep
from optim.model import Lane
from optim.plan import Plan
from optim.reference import Reference
from optim.report import CompileReport, Refusal
from optim.timing import time_in_turn
from optim.trial import Trial, tolerance_used

logger = logging.getLogger(__name__)

#: Of eager's ms: above it a few calls do not tell which of the two is faster.
_CLEARLY = 0.9


class Builder:
    """Builds engines in this process, writing figures and reasons into the report.

    `trials` are engines already built here, by a race in this process. What ends up serving nothing is closed. With a
    `plan` only the smallest and the largest bucket are timed, to see whether it holds, and none without `timed`. What
    the engines that serve leave for the next build is saved to the job's `kept` folder.
    """

    def __init__(
        self,
        job: EngineJob,
        reference: Reference,
        report: CompileReport,
        limit_s: float,
        trials: dict[str, Trial],
        plan: Plan | None = None,
        *,
        timed: bool = True,
    ) -> None:
        self._job, self._reference, self._report = job, reference, report
        self._limit_s = limit_s
        self._plan, self._timed = plan, timed
        self._trials: dict[str, Trial | None] = {**trials}
        for trial in trials.values():
            trial.limit = limit_s  # the race's budget was for the race
        self._rows = {row.bucket: row for row in report.buckets}

    def build(
        self, ranking: Mapping[Bucket, Sequence[str]], on_lane: Callable[[Bucket, Lane], None] | None = None
    ) -> dict[Bucket, Lane]:
        """Return what serves each bucket: the first of its ranking that holds, else eager.

        `on_lane` is told of each that does not stay eager, as soon as it is proven.
        """
        eager = EagerEngine(self._job)
        lanes = {bucket: Lane(eager, self._job.module) for bucket in self._job.samples}
        waiting = {bucket: list(ranking.get(bucket, ())) for bucket in self._job.samples}
        while any(waiting.values()):
            # The engine that most buckets want next.
            name = Counter(names[0] for names in waiting.values() if names).most_common(1)[0][0]
            buckets = [bucket for bucket, names in waiting.items() if names and names[0] == name]
            built = self._build_engine(name, buckets, on_lane or (lambda bucket, lane: None))
            lanes.update(built)
            for bucket in buckets:
                waiting[bucket] = [] if bucket in built else waiting[bucket][1:]
        if self._plan is None:  # else its figures are taken over
            self._measure_eager(lanes)
        self._finish({lane.engine for lane in lanes.values()})
        return lanes

    def _build_engine(
        self, name: str, buckets: Sequence[Bucket], on_lane: Callable[[Bucket, Lane], None]
    ) -> dict[Bucket, Lane]:
        trial = self._prepare(name)
        if trial is None:
            return {}
        # With CUDA graphs, a bucket too large for the memory takes those with it that were captured before.
        whole = trial.engine.reuses_outputs
        found: dict[Bucket, Lane] = {}

        def settle(bucket: Bucket) -> None:
            if bucket in trial.proven and self._is_fast_enough(trial, bucket):
                found[bucket] = Lane(trial.engine, trial.proven[bucket].run)
                on_lane(bucket, found[bucket])

        # The largest first: with CUDA graphs, the smaller ones then share its memory.
        for done, bucket in enumerate(sorted(buckets, reverse=True), 1):
            logger.info("%s: bucket %s (%d of %d)", name, bucket, done, len(buckets))
            if bucket not in trial.proven:
                for fallen, refusal in trial.prove(bucket).items():
                    self._rows[fallen].refusals.append(refusal)
            if not whole:
                settle(bucket)
        self._report.notes += [note for note in trial.notes() if note not in self._report.notes]
        for bucket in buckets if whole else ():
            settle(bucket)
        return found

    def _prepare(self, name: str) -> Trial | None:
        """Return the engine built, or None where it cannot be; the reason is reported once."""
        if name not in self._trials:
            trial = Trial(make_engine(name, self._job), self._reference, self._limit_s)
            refusal = trial.prepare()
            if refusal is not None:
                self._report.refusals.append(refusal)
            self._trials[name] = trial if refusal is None else None
        return self._trials[name]

    def _is_fast_enough(self, trial: Trial, bucket: Bucket) -> bool:
        """Time the engine and eager in turn; write the figures down where the engine stays."""
        engine, proven, row = trial.engine, trial.proven[bucket], self._rows[bucket]
        ms, eager_ms = self._time(serving(engine, proven.run), bucket)
        row.eager_ms = round(eager_ms, 3)
        if self._job.config.compile.only_if_faster and ms > eager_ms:
            message = f"slower than eager: {ms:.3g} ms against {eager_ms:.3g} ms"
            row.refusals.append(Refusal(engine.name, "time", str(bucket), None, message))
            row.eager_won = True
            return False
        row.eager_won = False
        row.engine, row.ms, row.speedup = engine.name, round(ms, 3), round(eager_ms / ms, 3)
        row.max_abs_error, row.relative_error = proven.difference.max_abs, proven.difference.relative
        row.tolerance = tolerance_used(self._job.config, self._job.output_dtypes)
        row.graph_bytes = proven.graph_bytes
        return True

    def _time(self, run: Runner, bucket: Bucket) -> tuple[float, float]:
        """Return the ms of a run and of eager's; those of a plan for buckets between its ends."""
        inputs, device = self._reference.samples[bucket], self._job.info.device
        runs: list[Runner] = [run, self._job.module]
        if self._plan is None:
            # A few calls: enough to plan by, and what is not clearly faster than eager is timed once more.
            ms, eager_ms = time_in_turn(runs, inputs, device, min_rounds=3, budget_s=0.3)
        elif self._timed and bucket in (min(self._rows), max(self._rows)):
            ms, eager_ms = time_in_turn(runs, inputs, device, min_rounds=1, budget_s=0.1)
        else:
            known = self._plan.rows[bucket]
            return known["ms"], known["eager_ms"]
        clearly = 1.0 if self._plan else _CLEARLY
        if self._job.config.compile.only_if_faster and ms > eager_ms * clearly:
            # Beside a model under load one call takes ten times as long as the next, and what follows from this is a
            # race or eager for good: it has to be seen twice (issue 5).
            ms, eager_ms = time_in_turn(runs, inputs, device)
        return ms, eager_ms

    def _measure_eager(self, lanes: Mapping[Bucket, Lane]) -> None:
        for bucket, row in self._rows.items():
            if row.eager_ms is None:
                inputs = self._reference.samples[bucket]
                # For planning alone, so the first figures will do.
                ms, *_ = time_in_turn([self._job.module], inputs, self._job.info.device, min_rounds=2, budget_s=0.2)
                row.eager_ms = round(ms, 3)
            if lanes[bucket].engine.name == "eager":
                row.ms, row.speedup = row.eager_ms, 1.0

    def _finish(self, used: set[Engine]) -> None:
        for trial in self._trials.values():
            if trial is None:
                continue
            if trial.engine in used:
                if self._plan is None:
                    keep(trial.engine, self._report.notes)
                trial.engine.finish()
            else:
                trial.proven.clear()
                trial.engine.close()


def serving(engine: Engine, run: Runner) -> Runner:
    """Return the run as requests make it: where compiling is refused."""

    def call(*inputs: object) -> object:
        with engine.serving():
            return run(*inputs)

    return call
