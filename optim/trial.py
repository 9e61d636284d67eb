"""One engine on one bucket: build, warm up, hold against eager; every failure becomes a reason."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeVar

import torch

from optim import pages
from optim.attention import attention, with_precision
from optim.buckets import Bucket, pick_between
from optim.budget import Budget
from optim.config import Pt2Config
from optim.deadline import OutOfTime, run_within, stuck_calls
from optim.device import give_memory_back
from optim.engines.base import Engine, Runner, Unavailable
from optim.errors import describe, is_device_error, is_out_of_memory
from optim.monitor import count_compilations, count_recordings
from optim.reference import Reference
from optim.report import Refusal
from optim.shapes import Inputs, measure
from optim.verify import TOLERANCES, Difference, Mismatch, compare

T = TypeVar("T")

#: The error that a matrix product in TF32 or bf16 is allowed where `matmul_precision` admits it: ten bits of mantissa.
_FAST_MATMUL_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Proven:
    """What runs one bucket, after its outputs were found right, and how far they were from eager's."""

    run: Runner
    difference: Difference
    graph_bytes: int | None = None
    """GPU memory that capturing took, where CUDA graphs serve the bucket."""


@dataclass
class Trial:
    """Tries one engine on the thread that owns the model; `limit` bounds its build and each bucket's warm-up.

    It is in seconds for each of them, or a budget for all that is yet to come.
    """

    engine: Engine
    reference: Reference
    limit: Budget | float
    is_thorough: bool = True
    """Whether to verify on more than the example, and sizes between buckets."""
    proven: dict[Bucket, Proven] = field(default_factory=dict)
    why_fixed: str | None = None
    """Why code for any size takes those of the buckets alone."""
    unrecorded: list[Bucket] = field(default_factory=list)
    """Buckets that were to be served by CUDA graphs, of which none was recorded."""

    def prepare(self) -> Refusal | None:
        """Run preflight and build; return why the engine cannot be used at all, if so."""
        engine, stage, budget = self.engine, "preflight", Budget.of(self.limit)
        try:
            if engine.needs_dynamo and stuck_calls():  # which is over with this process: no reason that lasts
                message = f"an earlier compilation hangs and holds Dynamo's lock ({stuck_calls()[0]})"
                return Refusal(engine.name, "stuck", None, None, message)
            if engine.job.state and not engine.keeps_state:
                raise Unavailable(f"it would take the module's state for constants ({', '.join(engine.job.state[:3])})")
            engine.preflight()
            stage = "build"
            self._bounded(self._build, f"{engine.name}: build")
            if engine.takes_any_size and not engine.guards_sizes and self.is_thorough:
                self.why_fixed = self._look_between(budget.left_s)
                if self.why_fixed is not None:
                    engine.fix_sizes()
        except OutOfTime as reason:
            return Refusal(engine.name, "budget", None, None, f"{stage} {reason}")
        except Unavailable as reason:
            return Refusal(engine.name, stage, None, None, str(reason))
        except (Exception, SystemExit) as error:
            if is_device_error(error):
                raise
            return Refusal.of(engine.name, stage, None, error)
        return None

    def prove(self, bucket: Bucket) -> dict[Bucket, Refusal]:
        """Warm one bucket up and verify it; return the buckets that fell out, and why. Device errors are raised.

        Where capturing a CUDA graph runs out of memory, the largest bucket falls out and the others are captured anew.
        """
        fallen: dict[Bucket, Refusal] = {}
        waiting = [bucket]
        while waiting:
            current = waiting[0]
            kind = ""
            try:
                refusal = self._prove(current)
            except Exception as error:
                if not (self.engine.reuses_outputs and is_out_of_memory(error)):
                    raise
                kind = type(error).__name__
            if kind:  # not in the handler: the error holds the frames of the call, and they what was captured
                waiting = sorted({*self.proven, *waiting}, reverse=True)
                largest = waiting.pop(0)
                message = f"capturing ran out of memory at bucket {current}; smaller buckets are captured without it"
                fallen[largest] = Refusal(self.engine.name, "memory", str(largest), kind, message)
                try:
                    self._start_over()
                except OutOfTime as reason:
                    late = f"build {reason}"
                    return fallen | {b: Refusal(self.engine.name, "budget", str(b), None, late) for b in waiting}
                continue
            waiting.remove(current)
            if refusal is not None:
                fallen[current] = refusal
        return fallen

    def notes(self) -> list[str]:
        """Return what is worth knowing about the engine's code once all buckets are done."""
        found = self.engine.notes()
        if self.unrecorded:
            found.append(f"{self.engine.name}: no CUDA graphs were recorded for {', '.join(map(str, self.unrecorded))}")
        if self.why_fixed is not None:
            found.append(f"{self.engine.name}: what is smaller than its bucket is padded: {self.why_fixed}")
        return found

    def _start_over(self) -> None:
        """Give back all the graphs and their memory, and build the engine again."""
        self.proven.clear()
        self.unrecorded.clear()
        self.engine.close()
        give_memory_back(self.engine.job.info.device)
        self._bounded(self._build, f"{self.engine.name}: build")

    def _prove(self, bucket: Bucket) -> Refusal | None:
        engine, stage = self.engine, "preflight"
        try:
            engine.check_bucket(bucket)
            stage = "warm-up"
            skips = count_compilations().cudagraph_skips
            memory, recorded = _reserved(engine), _recorded(engine)
            run = self._bounded(lambda: self._warm_up(bucket), f"{engine.name}: bucket {bucket}")
            engine.check_warm(bucket)
            skips = count_compilations().cudagraph_skips - skips
            if skips and engine.reuses_outputs and engine.job.config.strict:
                raise Unavailable(f"{skips} graphs run without CUDA graphs, and `strict` is set")
            stage = "verify"
            with engine.serving():
                found = self._verify(run, bucket)
            # From torch 2.9 on what graphs cannot hold is cut out of them without being counted as a skip.
            if recorded is not None and _recorded(engine) == recorded and not (skips or engine.takes_any_size):
                if engine.job.config.strict:
                    raise Unavailable("no CUDA graph was recorded, and `strict` is set")
                self.unrecorded.append(bucket)
        except OutOfTime as reason:
            return Refusal(engine.name, "budget", str(bucket), None, f"{stage} {reason}")
        except (Unavailable, Mismatch) as reason:
            message = str(reason)
            if isinstance(reason, Mismatch) and reason.undecided and self.reference.is_short_of_memory:
                # It might be right: another time there is a reference to tell.
                message, stage = f"there was no memory for a wider reference, and {reason}", "memory"
            return Refusal(engine.name, stage, str(bucket), None, message)
        except (Exception, SystemExit) as error:
            if is_device_error(error):
                raise
            # The same input once more in eager: where that fails too, it was never the compiler's fault.
            self.reference.check_eager(bucket)
            return Refusal.of(engine.name, stage, bucket, error)
        self.proven[bucket] = Proven(run, found, None if memory is None else (_reserved(engine) or 0) - memory)
        return None

    def _build(self) -> None:
        with self.engine.building():
            self.engine.build()

    def _warm_up(self, bucket: Bucket) -> Runner:
        engine, config = self.engine, self.engine.job.config
        calls = config.verify.warmup_calls or (1 if engine.settles_at_once else 3)
        with engine.building(), attention(config, engine.job.phase):
            run = with_precision(config, engine.compile(bucket))
            for example in [self.reference.samples[bucket], *self._probes(bucket)[0]]:
                inputs = tuple(t.clone() for t in example)  # code that changes its inputs is found out later
                engine.mark(inputs)
                for _ in range(calls):
                    run(*inputs)
        if engine.job.wants_huge_pages:
            pages.collapse()  # what was packed for this bucket too, before it is timed
        return run

    def _probes(self, bucket: Bucket) -> tuple[list[Inputs], list[Inputs]]:
        """Return the further sizes that a bucket's code must take: to warm up with, and to check alone."""
        engine = self.engine
        return self.reference.probes(bucket) if engine.takes_any_size and engine.guards_sizes else ([], [])

    def _look_between(self, left_s: float) -> str | None:
        """Return why code that has no guards may not take every size, or None; in a part of the time that is left."""
        try:
            return run_within(max(left_s / 4, 1.0), f"{self.engine.name}: sizes", self._find_wrong_size)
        except OutOfTime as reason:
            gc.collect()  # what the interrupted call held is in a cycle with its exception
            return f"holding sizes between them against eager {reason}"

    def _find_wrong_size(self) -> str | None:
        engine, reference = self.engine, self.reference
        job, allowed = engine.job, tolerance(engine.job.config)
        run: Runner | None = None
        for size in pick_between(reference.samples):
            inputs = reference.find(size)
            if inputs is None or measure(job.input_specs, inputs) != (size.batch_size, size.length):
                return f"there is no example of size {size}"
            try:
                run = run or with_precision(job.config, engine.compile(max(reference.samples)))
                expected = reference.expect(inputs)
                with engine.serving():
                    compare(run(*inputs), expected, allowed, reference.exact(inputs))
            except Exception as error:  # of eager, which need not take it, or of the engine
                if is_device_error(error):
                    raise
                return f"size {size}: " + ": ".join(describe(error, 300))
        return None

    def _bounded(self, call: Callable[[], T], what: str) -> T:
        on_gpu = self.engine.job.info.device.type == "cuda"
        return run_within(self.limit, what, call, inline=on_gpu)

    def _verify(self, run: Runner, bucket: Bucket) -> Difference:
        """Compare with eager on the example and on other data; return the larger difference."""
        found = Difference()
        allowed = tolerance(self.engine.job.config)
        first: tuple[Any, Any, Callable[[], Any]] | None = None
        probes = ((inputs, self.reference.expect(inputs)) for group in self._probes(bucket) for inputs in group)
        data = chain(self.reference.data(bucket), probes)
        for inputs, expected in data if self.is_thorough else islice(data, 1):
            exact = self.reference.exact(inputs)
            given = [t.clone() for t in inputs]
            output = run(*given)
            found = found.worst(compare(output, expected, allowed, exact))
            found = found.worst(self.reference.check_state(inputs, allowed))
            if not all(map(torch.equal, given, inputs)):
                raise Mismatch("the compiled code changes its inputs, eager does not")
            first = first or (output, expected, exact)
        if first is not None and not self.engine.reuses_outputs:
            try:
                compare(first[0], first[1], allowed, first[2])
            except Mismatch as error:
                raise Mismatch(f"the output of one call is overwritten by the next: {error}") from error
        return found


def tolerance(config: Pt2Config) -> float | None:
    """Return the configured tolerance; without one, what the asked precision costs (none: the dtype's own)."""
    if config.verify.tolerance is not None:
        return config.verify.tolerance
    if config.autocast:
        return TOLERANCES[torch.bfloat16]
    return None if config.matmul_precision in (None, "highest") else _FAST_MATMUL_TOLERANCE


def tolerance_used(config: Pt2Config, dtypes: Iterable[torch.dtype]) -> float:
    """Return the largest error that outputs of these dtypes were allowed."""
    asked = tolerance(config)
    return asked if asked is not None else max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0)


def _reserved(engine: Engine) -> int | None:
    """Return the bytes that this process holds on the GPU, graph pools included; None where there are no graphs."""
    device = engine.job.info.device
    if not engine.reuses_outputs or device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.memory_reserved(device)


def _recorded(engine: Engine) -> int | None:
    """Return the CUDA graphs that this thread has recorded so far, where graphs are to serve the engine's buckets."""
    device = engine.job.info.device
    return count_recordings(device) if engine.reuses_outputs and device.type == "cuda" else None
