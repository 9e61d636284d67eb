"""What serves each bucket: by the plan of an earlier start, by a race, or as the configuration names it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optim.background import PutOff, put_off
from optim.buckets import Bucket
from optim.cache import Busy, Cache, CacheUnusable, default_folder
from optim.child import NotCarried
from optim.engines import EngineJob, choose_engines
from optim.errors import describe, is_device_error
from optim.fingerprint import describe_job, hash_weights, key_of
from optim.model import Lane
from optim.plan import BadPlan, Plan
from optim.reference import Reference
from optim.report import BucketReport, CompileReport, Refusal
from optim.share import KEY_VARIABLE, Exchange, Share, ShareUnusable, UriShare
from optim.start import Built, Start, clock
from optim.streams import Streams

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What serves each bucket, what serves it on streams if anything does, and what is yet to be done."""

    lanes: Mapping[Bucket, Lane]
    streams: Streams | None = None
    put_off: PutOff | None = None


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

    A plan that is not kept here may come from another machine, over one of the shares. With `compile.when: background`
    nothing competes here: eager serves each bucket, and the rest is put off.
    """
    report.buckets = [BucketReport(b.batch_size, b.length or None) for b in sorted(job.samples)]
    choice = choose_engines(job)
    report.notes += choice.notes
    report.candidates = list(choice.names)
    start = Start(job, reference, report, streams, must_pay=streams_must_pay, race=choice.race)
    if reference.obstacle:
        report.refusals += [Refusal(name, "preflight", None, None, reference.obstacle) for name in choice.names]
        return Outcome(*start.start_cold((), Path()))
    cache, made_for = None, None
    if choice.names and job.config.cache.enable:
        with clock(report, "cache"):
            cache, made_for = _open_cache(job, report), _describe(job, streams, report)
    if cache is None or made_for is None:
        with _folder() as folder:
            return Outcome(*start.start_cold(choice.names, folder))
    key = key_of(made_for)
    exchange = Exchange(cache, key, [*shares, *_open_uri(job, report)], report)
    todo = PutOff(cache, key, made_for, exchange, streams, streams_must_pay)
    if job.config.compile.when == "background":
        if job.state:
            outcome = None
            _not_put_off(report, "another process would not have its state")
        elif job.info.device.type == "cpu":
            outcome = _start_at_once(start, todo, job, reference, report)
        else:
            outcome = None
            _not_put_off(report, "on a GPU another process would need memory of its own")
        if outcome is not None:
            report.notes += cache.rejections
            return outcome
    for attempt in range(2):  # once more after a plan was set aside; then whoever is first makes a new one
        with ExitStack() as stack:
            with clock(report, "cache"):
                path = stack.enter_context(cache.hold(key))
            if path is None and attempt == 0:
                with clock(report, "share"):
                    path = exchange.adopt()
            if path is None:
                built, path = _race(start, choice.names, cache, key, made_for, job, report)
                exchange.offer(path)
                break
            kept = _start_by_plan(start, todo, path)
            if kept is not None:
                built = kept
                break
    else:
        with _turn(cache, job, report), _folder() as folder:
            built = start.start_cold(choice.names, folder)
    report.notes += cache.rejections
    return Outcome(*built)


def _start_at_once(
    start: Start, todo: PutOff, job: EngineJob, reference: Reference, report: CompileReport
) -> Outcome | None:
    """Start warm where the plan is at hand, else eager, the rest put off; None, with a note, where it cannot be."""
    try:
        with todo.cache.hold(todo.key, wait=False) as path:
            if path is None:
                with clock(report, "share"):
                    path = todo.exchange.adopt()
            built = None if path is None else _start_by_plan(start, todo, path)
            if built is not None:
                return Outcome(*built)
    except Busy:  # then it is waited for in the background
        logger.info("another process compiles the same")
    try:
        todo = put_off(todo, job, reference, report.candidates)
    except NotCarried as reason:
        _not_put_off(report, str(reason))
        return None
    return Outcome(start.stay_eager(), None, todo)


def _start_by_plan(start: Start, todo: PutOff, path: Path) -> Built | None:
    """Start as the plan of an entry says and offer it on; None where it does not hold, which sets it aside."""
    try:
        built = start.start_warm(Plan.load(path, todo.made_for), path)
    except BadPlan as reason:
        todo.cache.reject(todo.key, str(reason))
        todo.exchange.replace(reason)
        start.begin_again()
        return None
    todo.exchange.offer(path)
    return built


def _race(
    start: Start,
    names: tuple[str, ...],
    cache: Cache,
    key: str,
    made_for: Mapping[str, Any],
    job: EngineJob,
    report: CompileReport,
) -> tuple[Built, Path | None]:
    """Let engines compete in their turn; return what they built, and the entry where the plan is kept, if it is."""
    with _turn(cache, job, report), _folder() as folder:
        built = start.start_cold(names, folder)
        must_compile = job.config.must_compile
        return built, _keep(cache, key, folder, Plan.of(report, made_for), report, must_compile=must_compile)


def _not_put_off(report: CompileReport, reason: str) -> None:
    report.notes.append(f"not compiled in the background but before it was ready: {reason}")
    logger.warning(report.notes[-1])


def fill_cache(
    job: EngineJob,
    reference: Reference,
    report: CompileReport,
    made_for: Mapping[str, Any],
    streams: int,
    *,
    streams_must_pay: bool,
) -> Path | None:
    """Let engines compete and keep the plan under the key of `made_for`, unless it is there; None where none is kept.

    A process that makes the same is waited for.
    """
    report.buckets = [BucketReport(b.batch_size, b.length or None) for b in sorted(job.samples)]
    choice = choose_engines(job)
    report.candidates = list(choice.names)
    cache = _open_cache(job, report)
    if cache is None:
        return None
    key = key_of(made_for)
    with cache.hold(key) as path:
        if path is None:
            start = Start(job, reference, report, streams, must_pay=streams_must_pay, race=choice.race)
            _, path = _race(start, choice.names, cache, key, made_for, job, report)
    report.notes += cache.rejections
    return path


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
        return {**describe_job(job, streams), "weights": hash_weights(job.module, job.state)}
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


def _keep(
    cache: Cache, key: str, folder: Path, plan: Plan, report: CompileReport, *, must_compile: bool
) -> Path | None:
    """Store what was found and made, unless a bucket is eager for a reason that may not be there next time.

    Where eager won, that other engines had no time is no such reason: beside a load they would have none next time
    either, and every start would be cold. Nor is a plan kept with which the next start would fail.
    """
    lasting = {"time", "preflight", "verify"}
    for row in report.buckets:
        if row.engine != "eager":
            continue
        known = lasting | {"budget"} if row.eager_won else set() if must_compile else lasting
        failed = [r for r in [*report.refusals, *row.refusals] if r.stage not in known]
        if failed:
            report.notes.append(f"no plan is kept: bucket {row.bucket} is eager, and {failed[0]}")
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
