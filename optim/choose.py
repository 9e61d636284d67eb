"""What serves each bucket: by the plan of an earlier start, by a race, or as the configuration names it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from optim.arena import NoArena, race_apart
from optim.buckets import Bucket
from optim.builder import Builder
from optim.cache import Cache, CacheUnusable, default_folder
from optim.engines import EngineJob, choose_engines
from optim.errors import describe, is_device_error
from optim.fingerprint import describe_job, hash_weights, key_of
from optim.model import Lane
from optim.plan import BadPlan, Plan
from optim.race import Event, Race, Standing, nearest, pick_probes, rank
from optim.reference import Reference
from optim.report import BucketReport, CompileReport, Refusal
from optim.share import KEY_VARIABLE, Exchange, Share, ShareUnusable, UriShare
from optim.streams import NoStreams, Streams, build_streams
from optim.trial import Trial

logger = logging.getLogger(__name__)

#: Seconds a race may take where the configuration does not say: with two cores, enough for the engines that start fast
#: and one that compiles.
RACE_BUDGET_S = 60.0
#: Seconds that the building of one engine, or the warm-up of one of its buckets, may take where no budget is given.
ENGINE_LIMIT_S = 900.0

Outcome = tuple[dict[Bucket, Lane], Streams | None]


def choose(
    job: EngineJob,
    reference: Reference,
    report: CompileReport,
    streams: int,
    shares: Sequence[Share] = (),
    *,
    streams_must_pay: bool,
) -> Outcome:
    """Return what serves each bucket, and what serves it on streams; a kept plan is verified, else engines compete.

    A plan that is not kept here may come from another machine, over one of the shares.
    """
    report.buckets = [BucketReport(b.batch_size, b.length or None) for b in sorted(job.samples)]
    choice = choose_engines(job)
    report.notes += choice.notes
    report.candidates = list(choice.names)
    chooser = _Chooser(job, reference, report, streams, must_pay=streams_must_pay, race=choice.race)
    if reference.obstacle:
        report.refusals += [Refusal(name, "preflight", None, None, reference.obstacle) for name in choice.names]
        return chooser.start_cold((), Path())
    cache, made_for = None, None
    if choice.names and job.config.cache.enable:
        with clock(report, "cache"):
            cache, made_for = _open_cache(job, report), _describe(job, streams, report)
    if cache is None or made_for is None:
        with _folder() as folder:
            return chooser.start_cold(choice.names, folder)
    key = key_of(made_for)
    exchange = Exchange(cache, key, [*shares, *_open_uri(job, report)], report)
    for attempt in range(2):  # once more after a plan was set aside; then whoever is first makes a new one
        with ExitStack() as stack:
            with clock(report, "cache"):
                path = stack.enter_context(cache.hold(key))
            if path is None and attempt == 0:
                with clock(report, "share"):
                    path = exchange.adopt()
            if path is None:
                with _turn(cache, job, report), _folder() as folder:
                    outcome = chooser.start_cold(choice.names, folder)
                    path = _keep(cache, key, folder, Plan.of(report, made_for), report)
                exchange.offer(path)
                break
            try:
                outcome = chooser.start_warm(Plan.load(path, made_for), path)
                exchange.offer(path)
                break
            except BadPlan as reason:
                cache.reject(key, str(reason))
                chooser.begin_again()
    else:
        with _turn(cache, job, report), _folder() as folder:
            outcome = chooser.start_cold(choice.names, folder)
    report.notes += cache.rejections
    return outcome


def _open_cache(job: EngineJob, report: CompileReport) -> Cache | None:
    asked = job.config.cache
    try:
        folder = Path(asked.folder).expanduser() if asked.folder else default_folder()
        return Cache(folder, int(asked.max_gb * 1e9))
    except (CacheUnusable, RuntimeError) as reason:  # the second: `~` of a user without a home
        _no_cache(report, str(reason))
        return None


def _open_uri(job: EngineJob, report: CompileReport) -> list[Share]:
    uri = job.config.cache.uri
    if uri is None:
        return []
    try:
        return [UriShare(uri, os.environ.get(KEY_VARIABLE))]
    except ShareUnusable as reason:
        report.notes.append(f"pt2.cache.uri: {uri} is not used: {reason}")
        logger.warning(report.notes[-1])
        return []


def _describe(job: EngineJob, streams: int, report: CompileReport) -> dict[str, Any] | None:
    """Return what decides the result, or None with a note for a module that cannot be described."""
    try:
        return {**describe_job(job, streams), "weights": hash_weights(job.module)}
    except Exception as error:  # modules and tensors of all kinds
        if is_device_error(error):
            raise
        _no_cache(report, "the module cannot be described: {}: {}".format(*describe(error, 300)))
        return None


def _no_cache(report: CompileReport, reason: str) -> None:
    report.notes.append(f"no compile cache: {reason}")
    logger.warning(report.notes[-1])


@contextmanager
def _turn(cache: Cache, job: EngineJob, report: CompileReport) -> Iterator[None]:
    """Let models that start on one CPU race one after the other; GPUs are not shared."""
    with ExitStack() as stack:
        if job.info.device.type == "cpu":
            with clock(report, "turn"):
                stack.enter_context(cache.turn())
        yield


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pt2-build-") as folder:
        yield Path(folder)


def _keep(cache: Cache, key: str, folder: Path, plan: Plan, report: CompileReport) -> Path | None:
    """Store what was found and made, unless a bucket is eager for a reason that may not be there next time."""
    for bucket in report.buckets:
        lasting = {"time", "preflight", "verify"}
        failed = [r for r in [*report.refusals, *bucket.refusals] if r.stage not in lasting]
        if bucket.engine == "eager" and failed:
            report.notes.append(f"no plan is kept: bucket {bucket.bucket} is eager, and {failed[0]}")
            return None

    def fill(target: Path) -> None:
        shutil.copytree(folder, target, dirs_exist_ok=True)
        plan.save(target)

    try:
        path = cache.store(key, fill)
    except OSError as error:
        report.notes.append(f"no plan is kept: {error.strerror} ({error.filename})")
        logger.warning(report.notes[-1])
        return None
    report.cache = str(path)
    return path


class _Chooser:
    """One compilation, cold or warm."""

    def __init__(
        self,
        job: EngineJob,
        reference: Reference,
        report: CompileReport,
        streams: int,
        *,
        must_pay: bool,
        race: bool,
    ) -> None:
        self._job, self._reference, self._report = job, reference, report
        self._streams, self._must_pay, self._race = streams, must_pay, race

    def begin_again(self) -> None:
        """Forget what a start that was given up wrote into the report's rows."""
        self._report.buckets = [BucketReport(row.batch_size, row.length) for row in self._report.buckets]
        self._report.start, self._report.cache, self._report.streams = "cold", None, 1

    def start_cold(self, names: tuple[str, ...], folder: Path) -> Outcome:
        """Let the engines named compete, or build the one; what they leave for the next start goes to a folder."""
        job, report = replace(self._job, kept=folder), self._report
        ranking: Mapping[Bucket, list[str]] = {bucket: list(names) for bucket in job.samples}
        limit_s = job.config.tune.budget_s or ENGINE_LIMIT_S
        trials: dict[str, Trial] = {}
        if names and self._race:
            with clock(report, "race"):
                standing, trials = _race(job, self._reference, names, job.config.tune.budget_s or RACE_BUDGET_S, report)
            _take_down(standing, report)
            only_if_faster = job.config.compile.only_if_faster
            raced = {
                b: [n for n in order if n != "eager"] if order[0] != "eager" else []
                for b, order in rank(standing.rounds, keep_eager=only_if_faster).items()
            }
            # A bucket that no engine had time for goes by its neighbours too: each is timed against eager once more.
            tried = {r.bucket for r in standing.rounds if len(r.ms) > 1} or set(raced)
            ranking = {bucket: raced[nearest(bucket, tried)] for bucket in job.samples}
            # What took the race's whole budget there is not to be waited for any longer here.
            limit_s = ENGINE_LIMIT_S
        with clock(report, "build"):
            lanes = Builder(job, self._reference, report, limit_s, trials).build(ranking)
        return lanes, self._build_streams(job, lanes)

    def start_warm(self, plan: Plan, folder: Path) -> Outcome:
        """Build what a plan says and verify it; BadPlan where it does not hold any more."""
        job, report = replace(self._job, kept=folder), self._report
        if set(plan.rows) != set(job.samples):
            raise BadPlan("its plan has other buckets")
        report.start, report.cache = "warm", str(folder)
        ranking = {bucket: [row["engine"]] if row["engine"] != "eager" else [] for bucket, row in plan.rows.items()}
        with clock(report, "build"):
            lanes = Builder(job, self._reference, report, ENGINE_LIMIT_S, {}, plan).build(ranking)
        for row in report.buckets:
            if row.engine != plan.rows[row.bucket]["engine"]:
                why = [*report.refusals, *row.refusals]
                raise BadPlan(f"its plan does not hold any more: {why[-1] if why else row.engine}")
        plan.fill(report)
        if plan.streams == 1:
            if self._streams > 1:
                report.notes.append("one run at a time, as the plan says")
            return lanes, None
        beside = self._build_streams(job, lanes, plan)
        if beside is None:
            raise BadPlan(f"its plan does not hold any more: {report.notes.pop()}")
        return lanes, beside

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
            self._report.notes.append(f"one run at a time: {reason}")
            return None
        self._report.streams = found.count
        return found


def _race(
    job: EngineJob, reference: Reference, names: tuple[str, ...], budget_s: float, report: CompileReport
) -> tuple[Standing, dict[str, Trial]]:
    """Hold the race in a process of its own; on a GPU, or with a module that cannot be carried there, in this one."""
    buckets = pick_probes(job.samples)
    if job.info.device.type == "cpu":
        try:
            return race_apart(job, reference, names, buckets, budget_s, _tell), {}
        except NoArena as reason:
            report.notes.append(f"the race was held in this process: {reason}")
            logger.info("the race is held in this process: %s", reason)
    race = Race(job, reference, names, time.monotonic() + budget_s, _tell, buckets=buckets)
    return race.run(), race.trials


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
