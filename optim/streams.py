"""Streams: several runs at a time, each on its share of the threads; what a CPU does most work with under load.

One run on two threads is the fastest answer, but small matrices do not keep two cores busy: of 200 GFLOP/s that two
cores have, a linear layer of MiniLM on 128 tokens gets 140 on two threads, and two such layers on one thread each all
of it. So the same code is built once more for fewer threads, and how long its runs take beside each other is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from optim.buckets import Bucket
from optim.device import is_room_for, set_threads
from optim.engines import EagerEngine, EngineJob, make_engine
from optim.engines.base import Engine, keep
from optim.errors import ConfigError
from optim.model import Lane
from optim.plan import Plan
from optim.reference import Reference
from optim.report import CompileReport
from optim.timing import time_streams
from optim.trial import Trial

#: More of them are not tried unless asked for: beyond that, one run takes long and memory is shared by too many.
MOST = 4
#: Streams are kept where some bucket does this much of the work on them. So little is asked of a quiet machine since
#: under load, when a run on all threads waits for each of them, they gain 1.2 to 1.4 (issue 4).
WORTH_IT = 0.87
#: How much a machine's speed may drift between the two times that a run on all threads is timed. More than this is
#: other processes': beside three busy ones on two cores such a run waits for the thread that has no core, and took 200
#: times as long as a run on one thread, which then seemed to cost nothing and stayed so in the plan (issue 5).
_MOST_DRIFT = 2.0


class NoStreams(Exception):
    """There are none; the message is the reason."""


class NoRoom(NoStreams):
    """Memory is short, which another start need not find."""


@dataclass(frozen=True)
class Streams:
    """What serves each bucket on a stream, the ms of a run while all streams run, and the threads of each."""

    count: int
    threads: int
    lanes: Mapping[Bucket, Lane]
    costs: Mapping[Bucket, float]


def check_streams(count: int | None, threads: int) -> int:
    """Return how many streams to try on so many threads; ConfigError for a number they are too few for."""
    if count is None:
        divisors = [n for n in range(1, MOST + 1) if threads % n == 0]
        return max(divisors) if threads <= MOST or max(divisors) > 1 else 2
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= threads:
        raise ConfigError("streams", count, f"use 1 to {threads}, the model's threads, or leave it out")
    return count


def build_streams(
    job: EngineJob,
    reference: Reference,
    report: CompileReport,
    lanes: Mapping[Bucket, Lane],
    count: int,
    limit_s: float,
    *,
    must_pay: bool,
    plan: Plan | None = None,
) -> Streams:
    """Build what serves each bucket once more, for the threads of a stream, hold it against eager, and time it.

    NoStreams is raised where an engine's code takes one call at a time, where memory is short, and, with `must_pay`,
    where no bucket does more work on streams. Writes figures into the report's rows; those of a plan are not measured
    again.
    """
    compiled = {lane.engine.name: lane.engine for lane in lanes.values() if lane.engine.name != "eager"}
    if not compiled:
        raise NoStreams("the model is served eager, and a module is never called twice at a time")
    alone = [name for name, engine in compiled.items() if not engine.takes_calls_at_once]
    if alone:
        raise NoStreams(f"code of {alone[0]} takes one call at a time")
    number = len({lane.engine.name if _is_one(lane.engine) else bucket for bucket, lane in lanes.items()})
    if not is_room_for(job.weight_bytes * number):
        copies = f"{number} more copies of {job.weight_bytes >> 20} MiB"
        raise NoRoom(f"{copies} might not leave half of the free memory")
    threads = torch.get_num_threads() // count
    with _threads(threads):
        # With a plan, the whole of what is built was held against eager more than once, on other threads.
        several = replace(job, streams=count)
        built = _build(several, reference, lanes, compiled, limit_s, report.notes, is_thorough=plan is None)
    engines = {lane.engine for lane in built.values()}
    if plan is not None:
        costs = {bucket: row["stream_ms"] for bucket, row in plan.rows.items()}
    else:
        costs = _measure(job, report, lanes, built, count, threads)
        best = max(row.stream_gain or 0.0 for row in report.buckets)
        if must_pay and best < WORTH_IT:
            for engine in engines:
                engine.close()
            raise NoStreams(f"{count} runs at a time do no more than {best:.2f} times the work of one after the other")
        for engine in engines:
            if engine.keeps_by_threads:
                keep(engine, report.notes)
    for engine in engines:
        engine.finish()
    return Streams(count, threads, built, costs)


def _measure(
    job: EngineJob,
    report: CompileReport,
    lanes: Mapping[Bucket, Lane],
    built: Mapping[Bucket, Lane],
    count: int,
    threads: int,
) -> dict[Bucket, float]:
    """Return the ms of a run of each bucket while all streams run, and write them into the report's rows."""
    costs: dict[Bucket, float] = {}
    for bucket, lane in sorted(built.items()):
        whole, beside = time_streams(lanes[bucket].run, lane.run, job.samples[bucket], count, threads)
        row = next(row for row in report.buckets if row.bucket == bucket)
        ms = row.ms or whole
        whole = min(whole, ms * _MOST_DRIFT)
        # On the scale of the row's own figure, so that the drift of the machine since then cancels.
        costs[bucket] = ms * beside / whole
        row.stream_ms, row.stream_gain = round(costs[bucket], 3), round(count * whole / beside, 3)
    return costs


def _build(
    job: EngineJob,
    reference: Reference,
    lanes: Mapping[Bucket, Lane],
    compiled: Mapping[str, Engine],
    limit_s: float,
    notes: list[str],
    *,
    is_thorough: bool,
) -> dict[Bucket, Lane]:
    """Return the same engines' code for as many threads as torch has now, proven right."""
    found: dict[Bucket, Lane] = {b: Lane(EagerEngine(job), job.module) for b in lanes}
    for name in sorted(compiled):
        engine = make_engine(name, job)
        engine.begin_from(compiled[name])
        if engine.takes_any_size and not compiled[name].takes_any_size:
            engine.fix_sizes()
        trial = Trial(engine, reference, limit_s, is_thorough)
        refusal = trial.prepare()
        for bucket in [b for b in sorted(lanes, reverse=True) if lanes[b].engine.name == name]:
            refusal = refusal or trial.prove(bucket).get(bucket)
            if refusal is not None:
                trial.engine.close()
                raise (NoRoom if refusal.stage == "memory" else NoStreams)(str(refusal))
            found[bucket] = Lane(trial.engine, trial.proven[bucket].run)
        notes += [f"on streams: {note}" for note in trial.notes()]
    return found


def _is_one(engine: Engine) -> bool:
    return engine.takes_any_size or engine.holds_weights_once


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Give torch so many threads for a while; what is built meanwhile is built for them."""
    before = torch.get_num_threads()
    set_threads(count)
    try:
        yield
    finally:
        set_threads(before)
