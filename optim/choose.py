"""What serves each bucket: by the plan of an earlier start, by a race, or as the configuration names it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optim.background import PutOff, put_off
from optim.buckets import Bucket
from optim.cache import Cache
from optim.child import NotCarried
from optim.engines import EngineJob, choose_engines
from optim.fingerprint import key_of
from optim.kept import (
    describe_subject,
    find_plan,
    keep_plan,
    open_cache,
    open_uri,
    start_by_plan,
    start_without_compiler,
)
from optim.locks import Busy
from optim.model import Lane
from optim.plan import Plan
from optim.reference import Reference
from optim.report import BucketReport, CompileReport, Refusal
from optim.scratch import Scratch
from optim.share import Exchange, Share
from optim.start import Built, Start, clock
from optim.streams import Streams

logger = logging.getLogger(__name__)

_AT_ONCE = "not compiled in the background but before it was ready"


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
        return Outcome(*start.start_cold((), None))
    cache, made_for = None, None
    if choice.names and job.config.cache.enable:
        with clock(report, "cache"):
            cache, made_for = open_cache(job, report), describe_subject(job, streams, report)
    if cache is None or made_for is None:
        with _build_folder(report) as folder:
            return Outcome(*start.start_cold(choice.names, folder))
    key = key_of(made_for)
    exchange = Exchange(cache, key, [*shares, *open_uri(job, report)], report)
    todo = PutOff(cache, key, made_for, exchange, streams, streams_must_pay)
    kept = start_without_compiler(start, todo, job, report)
    if kept is not None:
        report.notes += cache.notes
        return Outcome(*kept)
    if job.config.compile.when == "background":
        if job.state:
            outcome = None
            report.warn(f"{_AT_ONCE}: another process would not have its state")
        elif job.info.device.type == "cpu":
            outcome = _start_at_once(start, todo, job, reference, report)
        else:
            outcome = None
            report.warn(f"{_AT_ONCE}: on a GPU another process would need memory of its own")
        if outcome is not None:
            report.notes += cache.notes
            return outcome
    built = None
    while built is None:  # each time round a plan that did not hold is gone; then who is first makes a new one
        with find_plan(todo, report) as path:
            if path is None:
                built, path = _race(start, choice.names, cache, key, made_for, job, report)
                exchange.offer(path)
                break
            built = start_by_plan(start, todo, path, job.config.cache.oldest())
            if built is None and path.exists():  # it could not be set aside, or shall not be: nothing takes its place
                with _turn(cache, job, report), _build_folder(report) as folder:
                    built = start.start_cold(choice.names, folder)
    report.notes += cache.notes
    return Outcome(*built)


def _start_at_once(
    start: Start, todo: PutOff, job: EngineJob, reference: Reference, report: CompileReport
) -> Outcome | None:
    """Start warm where the plan is at hand, else eager, the rest put off; None, with a note, where it cannot be."""
    oldest = job.config.cache.oldest()
    try:
        while True:  # instead of one that is too old a share may have a newer one
            with find_plan(todo, report, at_once=True) as path:
                built = None if path is None else start_by_plan(start, todo, path, oldest)
                if built is not None:
                    return Outcome(*built)
                if path is None or path.exists():
                    break
    except Busy:  # then it is waited for in the background
        logger.info("another process compiles the same")
    if not todo.cache.is_writable():
        report.warn(f"{_AT_ONCE}: what another process makes could not be kept in {todo.cache.folder}")
        return None
    try:
        todo = put_off(todo, job, reference, report.candidates)
    except NotCarried as reason:
        report.warn(f"{_AT_ONCE}: {reason}")
        return None
    return Outcome(start.stay_eager(), None, todo)


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
    with _turn(cache, job, report), _build_folder(report) as folder:
        built = start.start_cold(names, folder)
        if folder is None:
            return built, None
        plan = Plan.of(report, made_for, start.remarks)
        return built, keep_plan(job, cache, key, folder, plan, report)


def _build_folder(report: CompileReport) -> AbstractContextManager[Path | None]:
    """Make a folder for what engines leave for later starts; None, with a note, where there can be none."""
    try:
        return Scratch("build")
    except OSError as error:  # a full disk: what is kept would not fit either, and a start needs none of it
        report.warn(f"nothing is left for later starts: there can be no temporary folder: {error}")
        return nullcontext()


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
    cache = open_cache(job, report)
    if cache is None:
        return None
    key = key_of(made_for)
    with cache.hold(key) as path:
        if path is None:
            start = Start(job, reference, report, streams, must_pay=streams_must_pay, race=choice.race)
            _, path = _race(start, choice.names, cache, key, made_for, job, report)
    report.notes += cache.notes
    return path


@contextmanager
def _turn(cache: Cache, job: EngineJob, report: CompileReport) -> Iterator[None]:
    """Let models that start on one CPU race one after the other; GPUs are not shared."""
    with ExitStack() as stack:
        if job.info.device.type == "cpu":
            with clock(report, "turn"):
                stack.enter_context(cache.turn())
        yield
