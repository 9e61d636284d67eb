"""`compile_model`: preflight, build, warm up, verify, time and choose, bucket by bucket."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optim.buckets import Bucket, make_grid
from optim.config import Pt2Config
from optim.device import inspect_device, pick_device
from optim.engines import EagerEngine, Engine, EngineJob, Unavailable, choose_engines
from optim.engines.base import Runner
from optim.errors import CompileError, is_device_error
from optim.model import CompiledModel, Lane
from optim.reference import Reference
from optim.report import BucketReport, CompileReport, Refusal
from optim.shapes import Example
from optim.timing import time_in_turn
from optim.verify import TOLERANCES, Difference, Mismatch, compare

logger = logging.getLogger(__name__)


def compile_model(
    module: nn.Module,
    example: Example,
    config: Pt2Config | Any = None,
    *,
    batch_sizes: Iterable[int] = (1, 2, 4, 8),
    lengths: Iterable[int] | None = None,
    device: str | torch.device | None = None,
) -> CompiledModel:
    """Compile a module for declared shapes and return a callable that is right, and never slower than eager.

    `example(batch_size, length)` returns the positional inputs as a request would make them (a tuple of tensors, or
    one tensor; `length` is None without `lengths`). `config` is a Pt2Config or any form that `Pt2Config.parse` reads.
    `device` is where the model shall run; default CUDA where there is one. The module is moved there and put in
    eval mode. Call from the thread that will run the model, with its thread count set.

    Raises ConfigError for wrong arguments, ModelError where the module fails in eager mode, CompileError where it
    cannot be compiled and `fallback` is `fail`, and device and memory errors as they come.
    """
    config = Pt2Config.parse(config)
    grid = make_grid(batch_sizes, lengths)
    where = pick_device(device)
    started = time.perf_counter()
    info = inspect_device(where)
    report = CompileReport(torch.__version__, info.to_dict(), config.to_dict())
    module = module.to(where)
    if module.training:
        _put_in_eval_mode(module, report)
    with torch.no_grad():
        reference = Reference(module, example, grid, where)
        report.padding = reference.rows_are_independent
        job = EngineJob(
            module, config, info, reference.samples, reference.input_specs, reference.output_dtypes, reference.rebuild
        )
        report.seconds["eager"] = round(time.perf_counter() - started, 3)
        lanes = _race(job, reference, report)
        report.notes += reference.notes  # now, since verification adds to them
    report.seconds["total"] = round(time.perf_counter() - started, 3)
    _announce(report)
    if config.fallback == "fail":
        _raise_failures(report)
    return CompiledModel(
        module,
        where,
        lanes,
        reference.input_specs,
        reference.output_specs,
        report,
        reference.samples,
        reference.output_names,
    )


def _race(job: EngineJob, reference: Reference, report: CompileReport) -> dict[Bucket, Lane]:
    """Try the engines in their order; each bucket keeps the first that is right and no slower than eager."""
    eager = EagerEngine(job)
    lanes = {bucket: Lane(eager, job.module) for bucket in job.samples}
    rows = {b: BucketReport(b.batch_size, b.length or None) for b in sorted(job.samples)}
    report.buckets = list(rows.values())
    engines, notes = choose_engines(job)
    report.notes += notes
    report.candidates = [engine.name for engine in engines]
    if engines and reference.obstacle:
        report.refusals += [Refusal(e.name, "preflight", None, None, reference.obstacle) for e in engines]
        engines = []
    for engine in engines:
        waiting = [bucket for bucket in lanes if lanes[bucket].engine is eager]
        if not waiting:
            break
        with _clock(report, engine.name):
            if _prepare(engine, report):
                # The largest first: with CUDA graphs, the smaller ones then share its memory.
                for done, bucket in enumerate(sorted(waiting, reverse=True), 1):
                    logger.info("%s: bucket %s (%d of %d)", engine.name, bucket, done, len(waiting))
                    run = _try_bucket(engine, bucket, reference, rows[bucket])
                    if run is not None:
                        lanes[bucket] = Lane(engine, run)
                report.notes += engine.notes()
    for bucket, row in rows.items():
        if row.eager_ms is None:
            row.eager_ms = time_in_turn([job.module], job.samples[bucket], job.info.device)[0]
        if lanes[bucket].engine is eager:
            row.ms, row.speedup = row.eager_ms, 1.0
    return lanes


def _put_in_eval_mode(module: nn.Module, report: CompileReport) -> None:
    try:
        module.eval()
    except NotImplementedError:
        # What torch.export returns says it is in training mode, and has no other: the mode was fixed at export.
        return
    report.notes.append("the module was in training mode and was put in eval mode")


@contextmanager
def _clock(report: CompileReport, name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        report.seconds[name] = round(time.perf_counter() - started, 3)


def _prepare(engine: Engine, report: CompileReport) -> bool:
    """Run preflight and build; a failure becomes a refusal of the whole engine."""
    stage = "preflight"
    try:
        engine.preflight()
        stage = "build"
        with engine.building():
            engine.build()
    except Unavailable as reason:
        report.refusals.append(Refusal(engine.name, stage, None, None, str(reason)))
        return False
    except (Exception, SystemExit) as error:
        if is_device_error(error):
            raise
        report.refusals.append(Refusal.of(engine.name, stage, None, error))
        return False
    return True


def _try_bucket(engine: Engine, bucket: Bucket, reference: Reference, row: BucketReport) -> Runner | None:
    """Warm up, verify and time one bucket; return what runs it, or None with the reason in the report."""
    asked = engine.job.config
    stage = "warm-up"
    try:
        with engine.building():
            run = engine.compile(bucket)
            for _ in range(asked.verify.warmup_calls):
                run(*reference.samples[bucket])
        engine.check_warm(bucket)
        stage = "verify"
        with engine.serving():
            found = _verify(run, bucket, reference, _tolerance(asked))
            stage = "time"
            ms, eager_ms = time_in_turn([run, engine.job.module], reference.samples[bucket], engine.job.info.device)
    except (Unavailable, Mismatch) as reason:
        row.refusals.append(Refusal(engine.name, stage, str(bucket), None, str(reason)))
        return None
    except (Exception, SystemExit) as error:
        if is_device_error(error):
            raise
        # The same input once more in eager: where that fails too, it was never the compiler's fault.
        reference.check_eager(bucket)
        row.refusals.append(Refusal.of(engine.name, stage, bucket, error))
        return None
    row.eager_ms = round(eager_ms, 3)
    if asked.compile.only_if_faster and ms > eager_ms:
        message = f"slower than eager: {ms:.3g} ms against {eager_ms:.3g} ms"
        row.refusals.append(Refusal(engine.name, "time", str(bucket), None, message))
        return None
    row.engine, row.ms, row.speedup = engine.name, round(ms, 3), round(eager_ms / ms, 3)
    row.max_abs_error, row.relative_error = found.max_abs, found.relative
    return run


def _tolerance(config: Pt2Config) -> float | None:
    """Return the configured tolerance; without one, bf16's own where the engine computes in it (else the dtype's)."""
    if config.verify.tolerance is None and config.precision == "bfloat16":
        return TOLERANCES[torch.bfloat16]
    return config.verify.tolerance


def _verify(run: Runner, bucket: Bucket, reference: Reference, tolerance: float | None) -> Difference:
    """Compare with eager on the example and on other data; return the larger difference."""
    found = Difference()
    for inputs, expected in reference.data(bucket):
        exact = reference.exact(inputs)
        found = found.worst(compare(run(*inputs), expected, tolerance, exact))
    return found


def _announce(report: CompileReport) -> None:
    """Log what serves each bucket, and one warning for those left to eager although they were to be compiled."""
    logger.info("engines by bucket: %s", report.engines())
    eager = [b for b in report.buckets if b.engine == "eager"]
    if eager and report.candidates:
        reasons = [*report.refusals, *(refusal for b in eager for refusal in b.refusals)]
        names = ", ".join(str(Bucket(b.batch_size, b.length or 0)) for b in eager)
        logger.warning("buckets %s are served eager: %s", names, "; ".join(_group(reasons)))
    elif report.all_refusals():
        logger.info("refused on the way: %s", "; ".join(_group(report.all_refusals())))


def _group(refusals: Iterable[Refusal]) -> list[str]:
    """Say each reason once, with the buckets that it holds for."""
    buckets: dict[Refusal, list[str]] = {}
    for refusal in refusals:
        buckets.setdefault(replace(refusal, bucket=None), []).append(refusal.bucket or "")
    return [str(replace(reason, bucket=", ".join(filter(None, names)) or None)) for reason, names in buckets.items()]


def _raise_failures(report: CompileReport) -> None:
    """Raise CompileError where a bucket is eager for another reason than speed."""
    if not report.candidates:
        return
    for bucket in report.buckets:
        too_slow = any(refusal.stage == "time" for refusal in bucket.refusals)
        if bucket.engine == "eager" and not too_slow:
            reasons = "; ".join(map(str, [*report.refusals, *bucket.refusals]))
            name = Bucket(bucket.batch_size, bucket.length or 0)
            raise CompileError(f"bucket {name} could not be compiled and fallback is 'fail': {reasons}")
