"""`compile_model`: eager as the reference, and for every bucket what was proven best against it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from optim import pages
from optim.attention import check_phase, kernel_of
from optim.background import Background
from optim.buckets import make_grid
from optim.choose import choose
from optim.config import Pt2Config
from optim.device import ensure_cache_folder, give_memory_back, pick_device, spare_compile_workers
from optim.engines import EngineJob
from optim.errors import CompileError
from optim.model import CompiledModel
from optim.reference import Reference
from optim.report import CompileReport, announce
from optim.shapes import Example
from optim.share import Share
from optim.start import clock
from optim.streams import check_streams

logger = logging.getLogger(__name__)


def compile_model(
    module: nn.Module,
    example: Example,
    config: Pt2Config | Any = None,
    *,
    batch_sizes: Iterable[int] = (1, 2, 4, 8),
    lengths: Iterable[int] | None = None,
    token_budget: int | None = None,
    device: str | torch.device | None = None,
    phase: str = "forward",
    streams: int | None = 1,
    state: Sequence[str] = (),
    shares: Sequence[Share] = (),
) -> CompiledModel:
    """Compile a module for declared shapes and return a callable that is right, and never slower than eager.

    `example(batch_size, length)` returns the positional inputs as a request would make them (a tuple of tensors, or
    one tensor; `length` is None without `lengths`). Buckets of more than `token_budget` tokens (rows times length) are
    left out, but for the smallest batch size. `config` is a Pt2Config or any form that `Pt2Config.parse` reads.
    `device` is where the model shall run; default CUDA where there is one. `phase` says what a call is (`forward`,
    `prefill`, `decode`), for the attention kernels. On a CPU, `streams` is how many calls may be made at a time,
    each on its share of the threads (`CompiledModel.streams`); None is as many as were measured to pay. `state` names
    buffers that calls change, such as a static cache, which is left filled with zeros: a second call with the same
    inputs must change nothing more, and there are no streams, and nothing is put off. `shares` are
    where plans of other machines are found, beside `pt2.cache.uri`. The module is moved to the device and put in eval
    mode. With `compile.when: background` the model answers eager until `CompiledModel.background` has run. Call from
    the thread that will run the model, with its thread count set.

    Raises ConfigError for wrong arguments, ModelError where the module fails in eager mode, CompileError where it
    cannot be compiled and `fallback` is `fail` (or `strict` is set), and device and memory errors as they come.
    """
    config = Pt2Config.parse(config)
    grid = make_grid(batch_sizes, lengths, token_budget)
    where = pick_device(device)
    check_phase(phase)
    stream_count = check_streams(streams, torch.get_num_threads()) if where.type == "cpu" and not state else 1
    started = time.perf_counter()
    report = CompileReport(torch.__version__, {}, config.to_dict(), phase=phase, attention=kernel_of(config, phase))
    if note := ensure_cache_folder():
        report.notes.append(note)
    spare_compile_workers(where)
    module = _unwrap(module, report).to(where)
    if module.training:
        _put_in_eval_mode(module, report)
    with torch.no_grad():
        reference = Reference(module, example, grid, where, state)
        job = EngineJob.of(module, config, reference, where, phase)
        report.device = job.info.to_dict()
        report.padding = reference.rows_are_independent
        report.seconds["eager"] = round(time.perf_counter() - started, 3)
        if job.wants_huge_pages:
            with clock(report, "pages"):
                pages.collapse()  # eager is timed as well
        found = choose(job, reference, report, stream_count, shares, streams_must_pay=streams is None)
        report.notes += reference.notes  # now, since verification adds to them
    reference.state.clear()
    give_memory_back(where)
    if job.wants_huge_pages:
        with clock(report, "pages"):
            pages.collapse()  # what is left of what was built, once the rest was given back
    report.seconds["total"] = round(time.perf_counter() - started, 3)
    model = CompiledModel(
        module,
        where,
        found.lanes,
        reference.input_specs,
        reference.output_specs,
        report,
        reference.samples,
        reference.output_names,
        strict=config.strict,
    )
    beside = found.streams
    if beside is not None:
        model.add_streams(beside.lanes, beside.costs, beside.count, beside.threads)
    if found.put_off is not None:
        model.background = Background(model, found.put_off)
    announce(report)
    if config.must_compile:
        _raise_failures(report)
    return model


def _unwrap(module: nn.Module, report: CompileReport) -> nn.Module:
    """Return the module that torch.compile was given, where the caller has compiled it: eager has to be eager."""
    original = getattr(module, "_orig_mod", None)
    if isinstance(original, nn.Module):
        report.notes.append("the module was compiled already; what is served and compared with is its original")
        return original
    if getattr(module, "_compiled_call_impl", None) is not None:
        module._compiled_call_impl = None
        report.notes.append("the module was compiled in place; its compiled call was removed")
    return module


def _put_in_eval_mode(module: nn.Module, report: CompileReport) -> None:
    try:
        module.eval()
    except NotImplementedError:
        # What torch.export returns says it is in training mode, and has no other: the mode was fixed at export.
        return
    report.notes.append("the module was in training mode and was put in eval mode")


def _raise_failures(report: CompileReport) -> None:
    """Raise CompileError where a bucket is eager for another reason than speed."""
    if not report.candidates:
        return
    for bucket in report.buckets:
        if bucket.engine == "eager" and not bucket.eager_won:
            reasons = "; ".join(map(str, [*report.refusals, *bucket.refusals]))
            why = "strict is set" if report.config["strict"] else "fallback is 'fail'"
            raise CompileError(f"bucket {bucket.bucket} could not be compiled and {why}: {reasons}")
