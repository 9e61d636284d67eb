"""Start eager, finish compiled: another process makes the plan, then each bucket moves over as soon as it is proven.

What is proven is built beside the model while that answers, of a copy of the module that shares the weights: compilers
put stand-ins into the module that they look at, and nobody knows what its Python code keeps on it.
"""

from __future__ import annotations

import copy
import json
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optim.buckets import Bucket
from optim.cache import Cache
from optim.child import Child, NotCarried, make_folder, pack
from optim.device import set_threads
from optim.engines import EngineJob
from optim.errors import describe, is_device_error
from optim.model import CompiledModel, Lane
from optim.plan import BadPlan, Plan
from optim.reference import Reference
from optim.report import BucketReport, CompileReport, Refusal, announce
from optim.scratch import Scratch
from optim.share import Exchange
from optim.start import Start, clock
from optim.verify import Mismatch, compare

logger = logging.getLogger(__name__)

#: How much nicer the other process is: a core that both want is then shared 28 to 1 (Linux's weights, sched(7)). At 19
#: it would never get done beside an eager model that is busy all the time; at 10, requests waited for it now and then.
_NICER = 15
#: What the other process may need to start on a machine that is busy answering, seconds.
_START_S = 900.0

Change = Callable[[], None]
Carried = tuple[EngineJob, Reference, Scratch]


@dataclass(frozen=True)
class PutOff:
    """A compilation that is yet to be done: the entry of the cache that it makes, and what it is made from."""

    cache: Cache
    key: str
    made_for: Mapping[str, Any]
    exchange: Exchange
    streams: int
    streams_must_pay: bool
    carried: Carried | None = None
    """A job of its own, and the folder in which the other process finds it."""

    def give_up(self, reason: BadPlan) -> None:
        """Set the entry aside, whose plan does not hold, unless it had no chance to."""
        if reason.stage == "stuck":
            self.cache.tell(f"the plan is not used: {reason}")
        else:
            self.cache.reject(self.key, str(reason))
        self.exchange.replace(reason)


def put_off(todo: PutOff, job: EngineJob, reference: Reference, names: list[str]) -> PutOff:
    """Return it with all that is needed to do it later; NotCarried where the module cannot be copied or carried."""
    twin = _share_weights(job.module)
    smallest = job.samples[min(job.samples)]
    try:
        compare(twin(*smallest), reference.run(smallest))
    except Mismatch as error:
        raise NotCarried(f"a copy of the module answers differently ({error})") from error
    folder = make_folder("background")
    given = {
        "made_for": todo.made_for,
        "streams": todo.streams,
        "streams_must_pay": todo.streams_must_pay,
    }
    pack(folder.path, replace(job, config=job.config.at_start()), reference, names, **given)
    return replace(
        todo,
        carried=(replace(job, module=twin), reference.of_copy(twin, probes=bool(job.config.compile.dynamic)), folder),
    )


def _share_weights(module: nn.Module) -> nn.Module:
    memo = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # whatever the module's own classes raise
        if is_device_error(error):
            raise
        raise NotCarried("the module cannot be copied: {}: {}".format(*describe(error, 300))) from error


class _Stopped(Exception):
    """The replica is about to end."""


class Background:
    """The rest of a start that answers eager; `CompiledModel.report.background` says how far it is.

    `run` does it, once, on a thread of its own; `stop` ends it.
    """

    def __init__(self, model: CompiledModel, todo: PutOff) -> None:
        assert todo.carried is not None
        self._model, self._todo = model, todo
        self._job, self._reference, self._folder = todo.carried
        self._threads = torch.get_num_threads()
        self._child: Child | None = None
        self._stopped = threading.Event()
        self._between_runs: Callable[[Change], None] = lambda change: change()
        model.report.background = "compiling"

    def run(
        self,
        between_runs: Callable[[Change], None],
        aside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Compile in another process, then build and prove on this thread what serves each bucket, and move it over.

        `between_runs(change)` has to call `change` on the thread that calls the model, between two calls of it, and
        return when that is done. `aside()` is entered where this thread competes with the model's. Whatever fails
        leaves eager where it is, with the reason in the report; device errors are raised.
        """
        self._between_runs, report = between_runs, self._model.report
        set_threads(self._threads)
        try:
            with torch.no_grad(), self._folder:
                with clock(report, "background compile"):
                    failure = self._compile()
                if failure is None and not self._stopped.is_set():
                    report.background = "moving"
                    with clock(report, "background move"), aside():
                        failure = self._move_over()
        except _Stopped:
            failure = "it was stopped"
        except Exception as error:  # compilers raise anything
            if is_device_error(error):
                raise
            failure = "{}: {}".format(*describe(error, 300))
            logger.exception("compiling in the background failed")
        if self._stopped.is_set():
            failure = "it was stopped"
        report.background = "done" if failure is None else "failed"
        if failure is not None:
            report.warn(f"compiling in the background failed, and what has not moved over stays eager: {failure}")
        announce(report)
        del self._job, self._reference  # a copy of the module, and more where a wider dtype was asked for

    def stop(self) -> None:
        """End the other process and let `run` return soon; may be called from any thread."""
        self._stopped.set()
        child = self._child
        if child is not None:
            child.kill()

    def _compile(self) -> str | None:
        """Let another process make the entry; return why there is none, if so."""
        logger.info("compiling in the background, in a process of its own")
        self._child = child = Child("optim.filler", self._folder.path, _NICER)
        if self._stopped.is_set():
            child.kill()
        try:
            told = [json.loads(line) for line in child.lines(None, _START_S)]
        finally:
            self._child = None  # `stop` has nothing to end: the process's number may be another's soon
            child.stop()
        if not told:
            return f"its process {child.end}"
        found, report = told[-1], self._model.report
        report.refusals += [Refusal(**refusal) for refusal in found["refusals"]]
        report.notes += [note for note in found["notes"] if note not in report.notes]
        report.seconds.update({f"background {name}": seconds for name, seconds in found["seconds"].items()})
        rows = {row.bucket: row for row in report.buckets}
        for row in found["buckets"]:
            ours = rows[Bucket(row["batch_size"], row["length"] or 0)]
            ours.refusals += [Refusal(**refusal) for refusal in row["refusals"]]
            ours.race, ours.eager_won = row["race"], row["eager_won"]
        return None if found["cache"] else "no plan was kept"

    def _move_over(self) -> str | None:
        """Build what the plan says, handing over bucket by bucket; return what does not hold, if something does not."""
        todo, model = self._todo, self._model
        with todo.cache.hold(todo.key) as path:
            if path is None:
                return "the entry of the cache is gone, or cannot be locked"
            scratch = CompileReport(torch.__version__, model.report.device, model.report.config)
            scratch.buckets = [BucketReport(row.batch_size, row.length) for row in model.report.buckets]
            model.others_compile = True
            try:
                plan = Plan.load(path, todo.made_for)
                plan.explain(model.report)  # another process may have made it
                self._build(plan, path, scratch)
            except BadPlan as reason:
                todo.give_up(reason)
                return str(reason)
            finally:
                self._between_runs(self._end_compiling)
                known = model.report.notes
                notes = [*scratch.notes, *self._reference.notes, *todo.cache.notes]
                known += [note for note in notes if note not in known]
            model.report.cache = str(path)
            todo.exchange.offer(path)
        return None

    def _end_compiling(self) -> None:
        self._model.others_compile = False

    def _build(self, plan: Plan, path: Path, scratch: CompileReport) -> None:
        kept_back: dict[Bucket, Lane] = {}

        def settle(bucket: Bucket, lane: Lane) -> None:
            if self._stopped.is_set():
                raise _Stopped
            if lane.engine.needs_dynamo:
                # Such code runs where compiling is refused, in all threads: not before everything is compiled.
                kept_back[bucket] = lane
            else:
                self._hand_over({bucket: lane}, plan, scratch)

        todo = self._todo
        start = Start(self._job, self._reference, scratch, todo.streams, must_pay=todo.streams_must_pay, on_lane=settle)
        try:
            _, beside = start.start_warm(plan, path, timed=False)
        finally:
            self._hand_over(kept_back, plan, scratch)
        if beside is not None:
            costs = {bucket: ms * self._scale(plan, bucket) for bucket, ms in beside.costs.items()}

            def add_streams() -> None:
                self._model.add_streams(beside.lanes, costs, beside.count, beside.threads)
                for row in self._model.report.buckets:
                    if row.bucket in costs:
                        row.stream_ms = round(costs[row.bucket], 3)
                        row.stream_gain = plan.rows[row.bucket]["stream_gain"]

            self._between_runs(add_streams)

    def _hand_over(self, lanes: Mapping[Bucket, Lane], plan: Plan, scratch: CompileReport) -> None:
        rows = {row.bucket: row for row in self._model.report.buckets}
        changed = []
        for found in [row for row in scratch.buckets if row.bucket in lanes]:
            mine, known, scale = rows[found.bucket], plan.rows[found.bucket], self._scale(plan, found.bucket)
            changed.append(
                replace(
                    found,
                    # On the scale of what eager took here: the plan was made beside a replica that answered.
                    ms=round(known["ms"] * scale, 3),
                    eager_ms=mine.eager_ms,
                    speedup=known["speedup"],
                    stream_ms=None,  # until there are streams
                    stream_gain=None,
                    race=mine.race,
                    refusals=[*mine.refusals, *(r for r in found.refusals if r not in mine.refusals)],
                )
            )
        if changed:
            self._between_runs(lambda: self._model.move_over(lanes, changed))
            logger.info("moved over: %s", ", ".join(f"{row.bucket} to {row.engine}" for row in changed))

    def _scale(self, plan: Plan, bucket: Bucket) -> float:
        """Return how much longer eager took here than where the plan was made."""
        mine = next(row.eager_ms for row in self._model.report.buckets if row.bucket == bucket)
        theirs = plan.rows[bucket]["eager_ms"]
        return mine / theirs if mine and theirs else 1.0
