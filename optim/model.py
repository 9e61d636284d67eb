"""`CompiledModel`: the callable that `compile_model` returns, dispatching inputs to buckets."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optim.buckets import Bucket, cover, pick_length
from optim.engines.base import Engine, Runner
from optim.engines.inductor import RECOMPILE_TEXT
from optim.errors import CompileError, causes, is_device_error
from optim.monitor import count_graphs, count_recordings
from optim.report import BucketReport, CompileReport, Refusal
from optim.shapes import Inputs, TensorSpec, cut, join, measure, normalize, pad, take_rows
from optim.tree import flatten

if TYPE_CHECKING:
    from optim.background import Background

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lane:
    """What serves one bucket."""

    engine: Engine
    run: Runner


@dataclass(frozen=True)
class StreamedModel:
    """A compiled model that `count` threads may call at once, each of which gives torch `threads` (see `streams.py`).

    The model that it is part of may not be called meanwhile.
    """

    model: CompiledModel
    count: int
    threads: int


class CompiledModel:
    """A module with an engine for every bucket; made by `compile_model`.

    Call it like the module, with any number of rows: they are covered by buckets, padded and cut as needed. It never
    compiles (though OpenVINO makes kernels at the first run of each size that it takes as it is). Calls come from one
    thread at a time, those of `streams` excepted; where CUDA graphs serve a bucket, only from the thread that built it,
    since their state belongs to that thread (pytorch issue 123177).
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        lanes: Mapping[Bucket, Lane],
        input_specs: tuple[TensorSpec, ...],
        output_specs: tuple[TensorSpec, ...],
        report: CompileReport,
        samples: Mapping[Bucket, Inputs],
        output_names: tuple[str, ...] = (),
        *,
        strict: bool = False,
        costs: Mapping[Bucket, float] | None = None,
        module_lock: threading.Lock | None = None,
    ) -> None:
        self.device = device
        #: The keys of the module's output, where it is a mapping; else none.
        self.output_names = output_names
        self.input_specs = input_specs
        self.output_specs = output_specs
        self._report = report
        self._module = module
        self._module_lock = module_lock or threading.Lock()
        self._samples = samples
        #: The same model for several calls at a time; None where that does not pay.
        self.streams: StreamedModel | None = None
        #: What moves buckets from eager to compiled code, where it was started so.
        self.background: Background | None = None
        #: Another thread compiles, so that what is compiled during a call need not be of the call.
        self.others_compile = False
        self._owner = threading.get_ident()
        self._strict = strict
        self._lengths = sorted({bucket.length for bucket in lanes})
        self._set_lanes(lanes, costs or {b.bucket: b.ms or 0.0 for b in report.buckets})

    def _set_lanes(self, lanes: Mapping[Bucket, Lane], costs: Mapping[Bucket, float]) -> None:
        self._lanes, self._ms = dict(lanes), dict(costs)
        self._bound_to_thread = any(lane.engine.reuses_outputs for lane in lanes.values())
        self._records = self._bound_to_thread and self.device.type == "cuda"
        self._compiled = any(lane.engine.name != "eager" for lane in lanes.values())
        self._plain = not (self._compiled or self._strict)
        self._takes_any_size = any(lane.engine.takes_any_size for lane in lanes.values())
        self._pads = any(not _is_unpadded(lane) for lane in lanes.values())
        self._plan = lru_cache(maxsize=1024)(self._make_plan)
        #: Inputs of exactly a bucket's shapes need no measuring, unless several runs cost less than its own.
        self._direct = {
            _shapes(inputs): bucket
            for bucket, inputs in self._samples.items()
            if not self._report.padding or self._plan(bucket.batch_size, bucket.length) == (bucket.batch_size,)
        }

    def move_over(self, lanes: Mapping[Bucket, Lane], rows: Iterable[BucketReport]) -> None:
        """Serve some buckets by other code from now on, and take its rows into the report; call between two calls."""
        changed = {row.bucket: row for row in rows}
        self._report.buckets = [changed.get(row.bucket, row) for row in self._report.buckets]
        costs = {bucket: row.ms or 0.0 for bucket, row in changed.items()}
        self._set_lanes({**self._lanes, **lanes}, {**self._ms, **costs})

    def add_streams(
        self, lanes: Mapping[Bucket, Lane], costs: Mapping[Bucket, float], count: int, threads: int
    ) -> None:
        """Take what serves each bucket where several calls are made at a time (see `streams.py`)."""
        model = CompiledModel(
            self._module,
            self.device,
            lanes,
            self.input_specs,
            self.output_specs,
            self._report,
            self._samples,
            self.output_names,
            strict=self._strict,
            costs=costs,
            module_lock=self._module_lock,
        )
        self.streams = StreamedModel(model, count, threads)
        self._report.streams = count

    @property
    def report(self) -> CompileReport:
        """What was tried, chosen, measured and refused, and what happened since."""
        return self._report

    @property
    def module(self) -> nn.Module:
        """The eager module."""
        return self._module

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The declared buckets, smallest first."""
        return tuple(sorted(self._lanes))

    @property
    def costs(self) -> Mapping[Bucket, float]:
        """The measured ms of each bucket's engine, for planning."""
        return dict(self._ms)

    def size_run(self, rows: int, length: int) -> int:
        """Return the tokens (rows, where there is no length) that a call of this size computes, padding included."""
        bucket_length = pick_length(length, self._lengths)
        if not self._compiled or not self._report.padding or bucket_length is None:
            return rows * max(length, 1)
        if self._find_whole(rows, bucket_length):
            return rows * max(length, 1)
        total, left = 0, rows
        for size in self._plan(rows, bucket_length):
            count = min(size, left)
            unpadded = _is_unpadded(self._lanes[Bucket(size, bucket_length)])
            total += count * max(length, 1) if unpadded else size * max(bucket_length, 1)
            left -= count
        return total

    @property
    def pads(self) -> bool:
        """Whether some bucket's code takes its own size alone, so that what is smaller is padded to it."""
        return self._pads

    @property
    def max_batch_size(self) -> int:
        """The largest declared number of rows; more are split over several runs."""
        return max(bucket.batch_size for bucket in self._lanes)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Return what the module returns for these inputs, on the model's device.

        Raises what the module raises for them in eager mode; with `strict` also CompileError, where eager would have
        answered in the place of compiled code, or something was compiled or recorded.
        """
        if self._bound_to_thread and threading.get_ident() != self._owner:
            raise RuntimeError("CUDA graphs belong to the thread that built this model; call it from there")
        self._report.after_ready.add("calls")
        if self._plain and not torch.is_grad_enabled() and all(t.device == self.device for t in inputs):
            # Nothing was compiled: a small module takes less than the bookkeeping below.
            return self._run_module(inputs)
        before = self._count()
        try:
            with torch.no_grad():
                return self._dispatch(tuple(normalize(t, self.device) for t in inputs))
        finally:
            self._account(before)

    def check(self, rows: int, length: int) -> None:
        """Run the example of the bucket that holds a call of this size, of the smallest where no length does.

        Raises what that raises, and is not counted as a call. To be called as the model is.
        """
        bucket, bucket_length = min(self._lanes), pick_length(length, self._lengths)
        if bucket_length is not None:
            sizes = self._sizes(bucket_length)  # more rows than the largest are split
            bucket = Bucket(min((n for n in sizes if n >= rows), default=max(sizes)), bucket_length)
        with torch.no_grad():
            self._dispatch(self._samples[bucket])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _count(self) -> tuple[int, int] | None:
        """Return what was compiled and recorded so far; None while that may be another thread's."""
        if self.others_compile:
            return None
        return count_graphs(), count_recordings(self.device) if self._records else 0

    def _account(self, before: tuple[int, int] | None) -> None:
        """Count what was compiled or recorded during a call; with `strict` that is an error."""
        after = self._count()
        if before is None or after is None:
            return
        compiled, recorded = (now - then for now, then in zip(after, before, strict=True))
        if not compiled and not recorded:
            return
        self._report.after_ready.add("compilations", compiled)
        self._report.after_ready.add("graph_recordings", recorded)
        if self._strict:
            raise CompileError(
                f"{compiled} graphs were compiled and {recorded} CUDA graphs recorded during a call (strict)"
            )

    def _dispatch(self, inputs: Inputs) -> Any:
        if not self._compiled:
            return self._run_module(inputs)
        bucket = self._direct.get(_shapes(inputs))
        if bucket is not None:
            return self._run(bucket, inputs)
        if not self._report.padding and not self._takes_any_size:
            return self._run_without_bucket(inputs)
        size = measure(self.input_specs, inputs)
        if size is None:
            return self._run_without_bucket(inputs)
        rows, length = size
        bucket_length = pick_length(length, self._lengths)
        if bucket_length is None:
            return self._run_without_bucket(inputs)
        whole = self._find_whole(rows, bucket_length)
        if whole is not None:
            return self._run(whole, inputs)
        if not self._report.padding:
            return self._run_without_bucket(inputs)
        outputs: list[Any] = []
        start = 0
        for batch_size in self._plan(rows, bucket_length):
            count = min(batch_size, rows - start)
            part = take_rows(self.input_specs, inputs, start, count)
            outputs.append(self._run_padded(Bucket(batch_size, bucket_length), part, count, length))
            start += count
        return join(self.output_specs, outputs)

    def _make_plan(self, rows: int, length: int) -> tuple[int, ...]:
        costs = {bucket.batch_size: ms for bucket, ms in self._ms.items() if bucket.length == length}
        return cover(rows, costs)

    def _run_padded(self, bucket: Bucket, part: Inputs, rows: int, length: int) -> Any:
        if _is_unpadded(self._lanes[bucket]):
            return self._run(bucket, tuple(normalize(t, self.device) for t in part))
        padded = tuple(normalize(t, self.device) for t in pad(self.input_specs, part, bucket.batch_size, bucket.length))
        output = self._run(bucket, padded)
        if (rows, length) == (bucket.batch_size, bucket.length):
            return output
        return cut(self.output_specs, output, rows, length)

    def _find_whole(self, rows: int, length: int) -> Bucket | None:
        """Return the bucket whose code takes so many rows, and any length up to this one, in one piece and unpadded."""
        if not self._takes_any_size or rows > max(self._sizes(length)):
            return None
        bucket = Bucket(min(n for n in self._sizes(length) if n >= rows), length)
        return bucket if _is_unpadded(self._lanes[bucket]) else None

    def _sizes(self, length: int) -> list[int]:
        return [bucket.batch_size for bucket in self._lanes if bucket.length == length]

    def _run_module(self, inputs: Inputs) -> Any:
        """Run eager: one call at a time, since nobody knows what the module's Python code keeps on the module."""
        with self._module_lock:
            return self._module(*inputs)

    def _run(self, bucket: Bucket, inputs: Inputs) -> Any:
        lane = self._lanes[bucket]
        if lane.engine.name == "eager":
            return self._run_module(inputs)
        try:
            with lane.engine.serving():
                output = lane.run(*inputs)
        except Exception as error:
            if is_device_error(error):
                raise
            return self._recover(bucket, lane, inputs, error)
        if lane.engine.reuses_outputs:
            # The one place where graph outputs are copied: the next replay overwrites them.
            tensors, rebuild = flatten(output)
            return rebuild([t.clone() for t in tensors])
        return output

    def _recover(self, bucket: Bucket, lane: Lane, inputs: Inputs, error: Exception) -> Any:
        """Answer eager after a compiled run raised; where eager raises as well, it is the input's own error."""
        output = self._run_module(inputs)
        if self._strict:
            raise CompileError(f"bucket {bucket} could not be served compiled (strict): {error}") from error
        refused = any(RECOMPILE_TEXT in str(e) for e in causes(error))
        if self._report.after_ready.add("refused_compilations" if refused else "failed_runs") == 1:
            refusal = Refusal.of(lane.engine.name, "serving", bucket, error)
            self._report.refusals.append(refusal)
            logger.warning("answered eager: %s", refusal)
        return output

    def _run_without_bucket(self, inputs: Inputs) -> Any:
        output = self._run_module(inputs)
        if self._report.after_ready.add("shapes_without_bucket") == 1:
            shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in inputs)
            logger.warning("answered eager: no bucket holds inputs of %s", shapes)
        return output


def _is_unpadded(lane: Lane) -> bool:
    return lane.engine.name == "eager" or lane.engine.takes_any_size


def _shapes(inputs: Inputs) -> tuple[tuple[torch.dtype, torch.Size], ...]:
    return tuple((t.dtype, t.shape) for t in inputs)
