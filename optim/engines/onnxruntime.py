"""ONNX Runtime: exported with torch.export, then one session a bucket, its shapes fixed."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from optim.buckets import Bucket
from optim.engines.base import Engine, EngineJob, FlatModule, Runner, Unavailable, require
from optim.engines.tracing import require_traceable
from optim.errors import is_device_error
from optim.scratch import Scratch

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
    """Exports the module once, with free sizes where it exports so, and opens a session for every bucket; CPU only.

    torch.compile's own `onnxrt` backend fails with today's onnxscript, so this goes through torch.onnx.export.
    """

    name = "onnxruntime"
    takes_calls_at_once = True
    settles_at_once = True

    def __init__(self, job: EngineJob) -> None:
        super().__init__(job)
        self._folder: Path | None = None
        self._shared = True
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
            self._folder, self._shared = self.kept, (self.kept / "shared.onnx").exists()
            return
        scratch = Scratch("onnx")
        self._folder, self._clean_up = scratch.path, scratch.remove
        shapes = self._free_sizes()
        if shapes is None:
            self._shared = False
            return
        try:
            program = self._export(self.job.samples[max(self.job.samples)], shapes, self._path("shared"))
            # Where it cannot keep a size free, the exporter may fix it without a word.
            found = [value.shape for value in program.model.graph.inputs]
            free = all(
                not isinstance(shape[dim], int)
                for shape, dims in zip(found, shapes["inputs"], strict=True)
                for dim in dims
            )
            self._shared = free
        except Exception as error:  # sizes that the module fixes, in whatever words the exporter has for it
            if is_device_error(error):
                raise
            self._shared = False
        if not self._shared:  # a later build would take it for one with free sizes
            for left in self._folder.glob("shared.onnx*"):
                left.unlink()

    def compile(self, bucket: Bucket) -> Runner:
        """Open a session on the threads that torch has, the bucket's sizes given so that they can be folded."""
        import onnxruntime

        sample = self.job.samples[bucket]
        name = "shared" if self._shared else str(bucket)
        if not self._path(name).exists():
            self._export(sample, None, self._path(name))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # its warnings are about its own optimisations
        # Its threads spin for work while a run is on (tried, two threads, MiniLM at 1 x 16: 3.5 ms against 4.7 where
        # they may not), and not after it, where they would keep cores from everything else on the machine.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._shared:
            options.add_free_dimension_override_by_name("rows", bucket.batch_size)
            if bucket.length:
                options.add_free_dimension_override_by_name("length", bucket.length)
        session = onnxruntime.InferenceSession(str(self._path(name)), options, providers=["CPUExecutionProvider"])
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
            shutil.copytree(self._folder, folder)

    def finish(self) -> None:
        """Remove the exported files: sessions hold what they need of them."""
        self._clean_up()

    def _path(self, name: str) -> Path:
        assert self._folder is not None, "build() comes first"
        return self._folder / f"{name}.onnx"

    def _free_sizes(self) -> dict[str, tuple[dict[int, Any], ...]] | None:
        """Return the names of the free dimensions by input, or None where all buckets have one shape."""
        specs = self.job.input_specs
        several = len({bucket.batch_size for bucket in self.job.samples}) > 1
        lengths = {bucket.length for bucket in self.job.samples}
        if not several and len(lengths) == 1:
            return None
        # From 2: a size of 1 is guarded against wherever code asks for it (attention does), and the exporter then tries
        # two further ways, which took 34 s instead of 6 to come to the same for MiniLM. What is proven is proven for 1.
        rows = torch.export.Dim("rows", min=2, max=max(3, *(b.batch_size for b in self.job.samples)))
        length = torch.export.Dim("length", min=2, max=max(3, *lengths))
        free: list[dict[int, Any]] = []
        for spec in specs:
            dims: dict[int, Any] = {}
            if several and spec.batch_dim is not None:
                dims[spec.batch_dim] = rows
            if len(lengths) > 1:
                dims.update(dict.fromkeys(spec.length_dims, length))
            free.append(dims)
        return {"inputs": tuple(free)}

    def _export(self, sample: tuple[torch.Tensor, ...], shapes: Any, path: Path) -> Any:
        flat = FlatModule(self.job.module, self.job, autocast=False).eval()
        # The exporter prints its progress, logs every constant that it folds, and warns of its own dependencies.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad(), _quiet_exporter():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(flat, sample, dynamo=True, dynamic_shapes=shapes, verbose=False)
        assert program is not None
        program.save(str(path), external_data=True)
        return program


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
