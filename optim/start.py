"""One start: engines compete, a plan is verified, or eager answers for the time being."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from optim.arena import race_apart
from optim.buckets import Bucket, pick_probes
from optim.budget import Budget
from optim.builder import Builder
from optim.child import NotCarried
from optim.device import give_memory_back
from optim.engines import EngineJob
from optim.model import Lane
from optim.plan import BadPlan, Plan
from optim.race import Event, Race, Standing, nearest, rank
from optim.reference import Reference
from optim.report import BucketReport, CompileReport
from optim.streams import NoRoom, NoStreams, Streams, build_streams
from optim.trial import Trial

logger = logging.getLogger(__name__)

#: Seconds a race may take where the configuration does not say: with two cores, enough for the engines that start fast
#: and one that compiles.
RACE_BUDGET_S = 60.0
#: Seconds that the building of one engine, or the warm-up of one of its buckets, may take where no budget is given.
ENGINE_LIMIT_S = 900.0

#: A race that took this much longer, because it waited for cores, is told of: it may have other winners.
_LOADED = 1.2

Built = tuple[dict[Bucket, Lane], Streams | None]


class Start:
    """One start, which writes what it finds into the report; `on_lane` hears of each bucket as it is settled."""

    def __init__(
        self,
        job: EngineJob,
        reference: Reference,
        report: CompileReport,
        streams: int,
        *,
        must_pay: bool,
        race: bool = False,
        on_lane: Callable[[Bucket, Lane], None] | None = None,
    ) -> None:
        self._job, self._reference, self._report = job, reference, report
        self._streams, self._must_pay, self._race = streams, must_pay, race
        self._on_lane = on_lane
        #: What later starts should know of how the plan was made.
        self.remarks: list[str] = []

    def begin_again(self) -> None:
        """Forget what a start that was given up wrote into the report, and free the memory of what it closed."""
        give_memory_back(self._job.info.device)
        self._report.refusals.clear()
        self._report.buckets = [BucketReport(row.batch_size, row.length) for row in self._report.buckets]
        self._report.start, self._report.cache, self._report.streams = "cold", None, 1

    def stay_eager(self) -> dict[Bucket, Lane]:
        """Serve the module itself; its figures are measured for planning."""
        self._report.start = "eager"
        with clock(self._report, "build"):
            return Builder(self._job, self._reference, self._report, ENGINE_LIMIT_S, {}).build({})

    def start_cold(self, names: tuple[str, ...], folder: Path | None) -> Built:
        """Let the engines named compete, or build the one; what they leave for later starts goes to the folder."""
        job, report = replace(self._job, kept=folder), self._report
        ranking: Mapping[Bucket, list[str]] = {bucket: list(names) for bucket in job.samples}
        limit_s = job.config.tune.budget_s or ENGINE_LIMIT_S
        standing = Standing()
        trials: dict[str, Trial] = {}
        if names and self._race:
            with clock(report, "race"):
                standing, trials = _race(job, self._reference, names, job.config.tune.budget_s or RACE_BUDGET_S, report)
            _take_down(standing, report)
            if standing.stretch >= _LOADED:
                self._remark(
                    f"the race was held beside a load (things took {standing.stretch:.1f} times as long): figures and "
                    "winners may be others on a quiet machine"
                )
            ranking = self._rank(standing)
            # What took the race's whole budget there is not to be waited for any longer here.
            limit_s = ENGINE_LIMIT_S
        with clock(report, "build"):
            lanes = Builder(job, self._reference, report, limit_s, trials).build(ranking)
        for name in set(standing.handed_over) - {lane.engine.name for lane in lanes.values()}:
            assert folder is not None
            shutil.rmtree(folder / name, ignore_errors=True)  # a loser's: later starts have no use for it
        return lanes, self._build_streams(job, lanes)

    def start_warm(self, plan: Plan, folder: Path, *, timed: bool = True) -> Built:
        """Build what a plan says and verify it; BadPlan where it does not hold any more.

        Without `timed` it is not held against eager's time once more: it was made just now.
        """
        job, report = replace(self._job, kept=folder), self._report
        if set(plan.rows) != set(job.samples):
            raise BadPlan("its plan has other buckets")
        report.start, report.cache = "warm", str(folder)
        ranking = {bucket: [row["engine"]] if row["engine"] != "eager" else [] for bucket, row in plan.rows.items()}
        with clock(report, "build"):
            lanes = Builder(job, self._reference, report, ENGINE_LIMIT_S, {}, plan, timed=timed).build(
                ranking, self._on_lane
            )
        without_memory: list[BucketReport] = []
        for row in report.buckets:
            if row.engine != plan.rows[row.bucket]["engine"]:
                why = [*report.refusals, *row.refusals]
                if why and why[-1].stage == "memory":
                    # While versions are rolled out the old one has the memory: the plan is as good as before.
                    without_memory.append(row)
                    self._reference.check_eager(row.bucket)  # beside all that was built
                    continue
                self._give_up(lanes)
                reason = f"its plan does not hold any more: {why[-1] if why else row.engine}"
                raise BadPlan(reason, why[-1].stage if why else "verify")
        plan.fill(report)
        for row in without_memory:
            row.ms, row.speedup = row.eager_ms, 1.0
            report.warn(
                f"bucket {row.bucket} is eager, though the plan has {plan.rows[row.bucket]['engine']}: no memory"
            )
        streams = None
        if plan.streams > 1 and without_memory:
            self._do_without_streams(plan, f"bucket {without_memory[0].bucket} is eager")
        elif plan.streams > 1:
            streams = self._build_streams(job, lanes, plan)
        plan.explain(report)  # of one that does not hold nothing is to be told but that
        return lanes, streams

    def _give_up(self, lanes: Mapping[Bucket, Lane]) -> None:
        """Close what a plan that does not hold has built, unless it serves already: what is next needs the memory."""
        if self._on_lane is None:
            for engine in {lane.engine for lane in lanes.values()}:
                engine.close()

    def _remark(self, text: str) -> None:
        """Note what later starts should know, too."""
        self._report.notes.append(text)
        self.remarks.append(text)

    def _rank(self, standing: Standing) -> dict[Bucket, list[str]]:
        """Return the engines to build for each bucket, the best first; none where eager won or nothing was timed.

        A bucket that no engine had time for goes by its nearest neighbour: each is timed against eager once more.
        """
        ranked = rank(standing.rounds, keep_eager=self._job.config.compile.only_if_faster)
        timed = {found.bucket for found in standing.rounds if len(found.ms) > 1}
        ranking: dict[Bucket, list[str]] = {}
        for row in self._report.buckets:
            order = ranked[nearest(row.bucket, timed)] if timed else []
            row.eager_won = order[:1] == ["eager"]
            ranking[row.bucket] = [] if row.eager_won else [name for name in order if name != "eager"]
        return ranking

    def _build_streams(self, job: EngineJob, lanes: Mapping[Bucket, Lane], plan: Plan | None = None) -> Streams | None:
        """Build what runs beside each other, or note why there is none."""
        if self._streams == 1:
            return None
        try:
            with clock(self._report, "streams"):
                found = build_streams(
                    job,
                    self._reference,
                    self._report,
                    lanes,
                    self._streams,
                    ENGINE_LIMIT_S,
                    must_pay=self._must_pay,
                    plan=plan,
                )
        except NoStreams as reason:
            if plan is not None and not isinstance(reason, NoRoom):
                self._give_up(lanes)
                raise BadPlan(f"its plan does not hold any more: one run at a time: {reason}") from reason
            # While versions are rolled out the old one has the memory: no reason to have engines compete again.
            if plan is None:
                self._remark(f"one run at a time: {reason}")
            else:
                self._do_without_streams(plan, str(reason))
            return None
        self._report.streams = found.count
        return found

    def _do_without_streams(self, plan: Plan, reason: str) -> None:
        self._report.warn(f"one run at a time, though the plan has {plan.streams}: {reason}")
        for row in self._report.buckets:
            row.stream_ms = row.stream_gain = None


def _race(
    job: EngineJob, reference: Reference, names: tuple[str, ...], budget_s: float, report: CompileReport
) -> tuple[Standing, dict[str, Trial]]:
    """Hold the race in a process of its own; on a GPU, or with a module that cannot be carried there, in this one."""
    buckets = pick_probes(job.samples)
    if job.info.device.type == "cpu":
        try:
            return race_apart(job, reference, names, buckets, budget_s, _tell), {}
        except NotCarried as reason:
            report.notes.append(f"the race was held in this process: {reason}")
            logger.info("the race is held in this process: %s", reason)
    budget = Budget(budget_s)
    race = Race(job, reference, names, budget, _tell, buckets=buckets)
    standing = race.run()
    standing.stretch = budget.stretch
    return standing, race.trials


def _tell(event: Event) -> None:
    """Log a race as it goes."""
    logger.info("race: %s", event)


def _take_down(standing: Standing, report: CompileReport) -> None:
    """Write a race into the report."""
    rows = {row.bucket: row for row in report.buckets}
    for refusal in standing.refusals:
        row = next((row for bucket, row in rows.items() if str(bucket) == refusal.bucket), None)
        (report.refusals if row is None else row.refusals).append(refusal)
    for found in standing.rounds:
        rows[found.bucket].race.append(dict(found.ms))
    report.notes += standing.notes


@contextmanager
def clock(report: CompileReport, name: str) -> Iterator[None]:
    """Add the seconds that a block takes to the report."""
    started = time.perf_counter()
    try:
        yield
    finally:
        report.seconds[name] = round(report.seconds.get(name, 0.0) + time.perf_counter() - started, 3)
