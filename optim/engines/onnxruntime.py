"""ONNX Runtime: exported with torch.export, and one session for all buckets where sizes stay free."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from optim.buckets import Bucket
from optim.engines.base import Engine, EngineJob, FlatModule, Runner, Unavailable, require
from optim.engines.tracing import require_traceable
from optim.errors import describe, is_device_error
from optim.scratch import Scratch
from optim.shapes import Inputs, changed

#: torch's dtypes that numpy has too; ONNX Runtime's Python API takes and gives numpy arrays.
_DTYPES = {
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
}


class OnnxRuntimeEngine(Engine):
    """Exports the module with free sizes and opens one session, else one for each bucket; CPU only.

    A session packs the weights for itself, and Python has no way to have two share them: 44 MB each for MiniLM, 17 for
    EfficientNet-Lite0. Nor does fixing the sizes make one faster (MiniLM, eight buckets: 0.98 to 1.01 of the free
    session's time; EfficientNet-Lite0, four: 0.99 to 1.00; issue 5). Where there are several lengths nothing is padded:
    unpadded, MiniLM took 27.3 ms on average where padded to its bucket it took 29.5 (two threads, 5 to 200 tokens).

    torch.compile's own `onnxrt` backend fails with today's onnxscript, so this goes through torch.onnx.export.
    """

    name = "onnxruntime"
    takes_calls_at_once = True
    settles_at_once = True
    guards_sizes = False
    hands_over = True

    def __init__(self, job: EngineJob) -> None:
        super().__init__(job)
        self._folder: Path | None = None
        self._session: Any = None
        self._why_fixed: str | None = None
        self.takes_any_size = job.has_lengths
        self.holds_weights_once = True
        self._clean_up: Callable[[], Any] = lambda: None

    def preflight(self) -> None:
        """Look for the packages, a CPU, dtypes that numpy has, and what an export would bake in."""
        require(self.job.info, "onnxruntime")
        if self.job.info.device.type != "cpu":
            raise Unavailable(f"this engine serves CPUs, and this device is {self.job.info.device}")
        if self.job.autocast:
            raise Unavailable("autocast to bfloat16 is not there: numpy has no bfloat16")
        if isinstance(self.job.module, torch.jit.ScriptModule):
            raise Unavailable("the module is TorchScript, which torch.export does not take")
        dtypes = [spec.dtype for spec in self.job.input_specs] + list(self.job.output_dtypes)
        odd = [dtype for dtype in dtypes if dtype not in _DTYPES]
        if odd:
            raise Unavailable(f"the module takes or returns {odd[0]}, which numpy cannot carry")
        require_traceable(self.job)

    def build(self) -> None:
        """Export with free sizes; a module that has its sizes in its code is exported bucket by bucket instead."""
        if self.kept is not None:
            self._folder = self.kept
            self._why_fixed = None if self._path("shared").exists() else "so it was when it was exported"
        else:
            scratch = Scratch("onnx")
            self._folder, self._clean_up = scratch.path, scratch.remove
            self._why_fixed = self._export_free()
        if self._why_fixed is not None:
            self.holds_weights_once = False
            self.hands_over = len(self.job.samples) == 1  # else what it has is of buckets that others may serve
            self.fix_sizes()

    def compile(self, bucket: Bucket) -> Runner:
        """Return the session that all buckets share, or open one for this bucket, on the threads that torch has."""
        sample = self.job.samples[bucket]
        if self.holds_weights_once:
            self._session = self._session or _open(self._path("shared"))
            session = self._session
        else:
            path = self._path(str(bucket))
            if not path.exists():
                self._export(sample, None, path)
            session = _open(path)
        names = [found.name for found in session.get_inputs()]
        if len(names) != len(sample):
            raise Unavailable(f"the exported model has {len(names)} inputs, the module {len(sample)}")
        rebuild, dtypes = self.job.rebuild, self.job.output_dtypes

        def run(*inputs: torch.Tensor) -> Any:
            found = session.run(None, {name: t.numpy() for name, t in zip(names, inputs, strict=True)})
            return rebuild([torch.from_numpy(array).to(d) for array, d in zip(found, dtypes, strict=True)])

        return run

    def save(self, folder: Path) -> None:
        """Leave the exported files."""
        if self._folder is not None:
            shutil.copytree(self._folder, folder, copy_function=_link)

    def finish(self) -> None:
        """Remove the exported files: sessions hold what they need of them."""
        self._clean_up()

    def close(self) -> None:
        """Drop the session, too; each goes with the last that runs it."""
        super().close()
        self._session = None

    def notes(self) -> list[str]:
        """Say where each bucket has an export, and a session, of its own."""
        if self._why_fixed is None or len(self.job.samples) == 1:
            return []
        return [f"onnxruntime: each bucket is exported for itself: {self._why_fixed}"]

    def _path(self, name: str) -> Path:
        assert self._folder is not None, "build() comes first"
        return self._folder / f"{name}.onnx"

    def _export_free(self) -> str | None:
        """Export for all buckets; return why the sizes by which they differ did not stay free, if so."""
        shapes = self._free_sizes()
        if shapes is None:
            return "there is one bucket"
        largest = self.job.samples[max(self.job.samples)]
        path = self._path("shared")
        try:
            for sample in self.job.samples.values():
                for i, (tensor, other, dims) in enumerate(zip(sample, largest, shapes["inputs"], strict=True)):
                    if not dims.keys() >= set(changed(tensor, other)):
                        return f"input {i} differs in more sizes than its examples showed to be free"
            program = self._export(largest, shapes, path)
            # Where it cannot keep a size free, the exporter may fix it without a word.
            found = [value.shape for value in program.model.graph.inputs]
            fixed = [
                f"dimension {dim} of input {i}"
                for i, (shape, dims) in enumerate(zip(found, shapes["inputs"], strict=True))
                for dim in dims
                if isinstance(shape[dim], int)
            ]
            why = f"the exporter fixed {fixed[0]}" if fixed else None
        except Exception as error:  # sizes that the module fixes, in whatever words the exporter has for it
            if is_device_error(error):
                raise
            why = ": ".join(describe(error, 300))
        if why is not None:  # a later build would take it for one with free sizes
            for left in path.parent.glob("shared.onnx*"):
                left.unlink()
        return why

    def _free_sizes(self) -> dict[str, tuple[dict[int, Any], ...]] | None:
        """Return the names of the free dimensions by input, or None where all buckets have one shape."""
        several = len({bucket.batch_size for bucket in self.job.samples}) > 1
        lengths = {bucket.length for bucket in self.job.samples}
        if not several and len(lengths) == 1:
            return None
        # From 2: a size of 1 is guarded against wherever code asks for it (attention does), and the exporter then tries
        # other ways, which took 34 s instead of 6 to come to the same for MiniLM. What is proven is proven for 1.
        rows = torch.export.Dim("rows", min=2, max=max(3, *(b.batch_size for b in self.job.samples)))
        length = torch.export.Dim("length", min=2, max=max(3, *lengths))
        free: list[dict[int, Any]] = []
        for spec in self.job.input_specs:
            dims: dict[int, Any] = {}
            if several and spec.batch_dim is not None:
                dims[spec.batch_dim] = rows
            if len(lengths) > 1:
                dims.update(dict.fromkeys(spec.length_dims, length))
            free.append(dims)
        return {"inputs": tuple(free)}

    def _export(self, sample: Inputs, shapes: Any, path: Path) -> Any:
        flat = FlatModule(self.job.module, self.job, autocast=False).eval()
        # The exporter prints its progress, logs every constant that it folds, and warns of its own dependencies.
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            torch.no_grad(),
            _quiet_exporter(),
            _no_drafts(),
        ):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(flat, sample, dynamo=True, dynamic_shapes=shapes, verbose=False)
        assert program is not None
        program.save(str(path), external_data=True)
        return program


def _open(path: Path) -> Any:
    """Return a session of an exported file, on the threads that torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its warnings are about its own optimisations
    # Its threads spin for work while a run is on (tried, two threads, MiniLM at 1 x 16: 3.5 ms against 4.7 where they
    # may not), and not after it, where they would keep cores from everything else on the machine.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _link(source: str, target: str) -> None:
    """Give a file that nobody writes to any more a second name; copy it where there can be none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def _no_drafts() -> Iterator[None]:
    """Take away torch 2.8's last resort, as later torch did: it assumes what it cannot know, and takes a while.

    It also leaves files in /tmp/export_root, whoever's that is.
    """
    try:
        from torch.onnx._internal.exporter import _capture_strategies as ways

        known: tuple[type, ...] = ways.CAPTURE_STRATEGIES
    except (ImportError, AttributeError):  # private, so that it may be elsewhere one day
        yield
        return
    vars(ways)["CAPTURE_STRATEGIES"] = tuple(way for way in known if "Draft" not in way.__name__)
    try:
        yield
    finally:
        vars(ways)["CAPTURE_STRATEGIES"] = known


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    missing = "torch.onnx._internal.exporter._registration"  # that torchvision is not there, operator by operator
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "onnx", missing)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
