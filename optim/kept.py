"""Kept plans: where they are, what they are of, how a start goes by one, and which are kept for later starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from optim.background import PutOff
from optim.cache import Cache, CacheUnusable, default_folder
from optim.engines import EngineJob
from optim.errors import describe, is_device_error
from optim.fingerprint import TOOLS, describe_job, hash_weights
from optim.locks import Busy
from optim.plan import BadPlan, Plan, as_kept
from optim.report import CompileReport
from optim.share import KEY_VARIABLE, OPEN_S, Share, ShareUnusable, UriShare, within
from optim.start import Built, Start, clock


def open_cache(job: EngineJob, report: CompileReport) -> Cache | None:
    """Return the cache that the configuration asks for, or None with a note where it cannot be used."""
    asked = job.config.cache
    try:
        folder = Path(asked.folder).expanduser() if asked.folder else default_folder()
        return Cache(folder, int(asked.max_gb * 1e9))
    except (CacheUnusable, RuntimeError) as reason:  # the second: `~` of a user without a home
        report.warn(f"no compile cache: {reason}")
        return None


def open_uri(job: EngineJob, report: CompileReport) -> list[Share]:
    """Return what is shared through `pt2.cache.uri`: one share, or none, with a note where it cannot be used."""
    uri = job.config.cache.uri
    if uri is None:
        return []
    try:
        return [within(OPEN_S, partial(UriShare, uri, os.environ.get(KEY_VARIABLE)))]
    except (ShareUnusable, TimeoutError, RuntimeError) as reason:  # the last: there can be no more threads
        report.warn(f"pt2.cache.uri: {uri} is not used: {reason}")
        return []


def describe_subject(job: EngineJob, streams: int, report: CompileReport) -> dict[str, Any] | None:
    """Return what decides the result, or None with a note for a module that cannot be described."""
    try:
        return {**describe_job(job, streams), "weights": hash_weights(job.module, job.state)}
    except Exception as error:  # modules and tensors of all kinds
        if is_device_error(error):
            raise
        report.warn("no compile cache: the module cannot be described: {}: {}".format(*describe(error, 300)))
        return None


@contextmanager
def find_plan(todo: PutOff, report: CompileReport, *, at_once: bool = False) -> Iterator[Path | None]:
    """Hold the entry to be made: its folder, if it was made here or a share has it.

    It is waited for, unless it is to be found `at_once`: then Busy is raised where another process makes it.
    """
    with ExitStack() as stack:
        with clock(report, "cache"):
            path = stack.enter_context(todo.cache.hold(todo.key, wait=not at_once))
        if path is None:
            with clock(report, "share"):
                path = todo.exchange.adopt(quickly=at_once)
        yield path


def start_by_plan(start: Start, todo: PutOff, path: Path, oldest: float) -> Built | None:
    """Start as the plan of an entry says and offer it on; None where it does not hold, which sets it aside."""
    built = None
    try:
        built = start.start_warm(Plan.load(path, todo.made_for, oldest), path)
    except BadPlan as reason:
        todo.give_up(reason)
    if built is None:
        start.begin_again()  # not in the handler: the error holds what was built
    else:
        todo.exchange.offer(path)
    return built


def start_without_compiler(start: Start, todo: PutOff, job: EngineJob, report: CompileReport) -> Built | None:
    """Start by a plan that was made with a C++ compiler, on a machine that has none; None where none holds.

    As in the container of an image whose compiler stayed behind in the stage that filled the cache. What was made here
    comes first.
    """
    if job.info.capabilities["cxx"].available or todo.cache.folder_of(todo.key).exists():
        return None
    ours = as_kept({**todo.made_for, TOOLS: None})
    for name in todo.cache.names():
        made_for = Plan.subject(todo.cache.folder_of(name))
        if made_for is None or {**made_for, TOOLS: None} != ours:
            continue
        try:
            with todo.cache.hold(name, wait=False) as path:
                if path is not None:
                    built = start.start_warm(Plan.load(path, made_for, job.config.cache.oldest()), path)
                    report.notes.append("the plan was made with a C++ compiler, which this machine does not have")
                    return built
        except (BadPlan, Busy) as reason:  # it stays for those who have one
            report.notes.append(f"a plan that was made with a C++ compiler is not used: {reason}")
        start.begin_again()
    return None


def keep_plan(job: EngineJob, cache: Cache, key: str, folder: Path, plan: Plan, report: CompileReport) -> Path | None:
    """Store what was found and made, unless a bucket is eager for a reason that may not be there next time.

    Where eager won, that other engines had no time is no such reason: beside a load they would have none next time
    either, and every start would be cold. Nor is a plan kept with which the next start would fail.
    """
    lasting = {"time", "preflight", "verify"}
    for row in report.buckets:
        if row.engine != "eager":
            continue
        known = lasting | {"budget"} if row.eager_won else set() if job.config.must_compile else lasting
        failed = [r for r in [*report.refusals, *row.refusals] if r.stage not in known]
        if failed:
            report.notes.append(f"no plan is kept: bucket {row.bucket} is eager, and {failed[0]}")
            return None

    def fill(target: Path) -> None:
        shutil.copytree(folder, target, dirs_exist_ok=True)
        plan.save(target)

    try:
        path = cache.store(key, fill)
    except OSError as error:  # of several files together (shutil.Error), too
        report.warn("no plan is kept: {}: {}".format(*describe(error, 300)))
        return None
    report.cache = str(path)
    return path
