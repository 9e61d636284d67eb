"""OpenVINO, converted directly: 4 s to start and 15 ms a call where its torch.compile backend took 24 s and 35 ms."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from optim.buckets import Bucket
from optim.device import import_openvino, is_room_for
from optim.engines.base import Engine, EngineJob, FlatModule, Runner, Unavailable, require, require_precision
from optim.engines.tracing import require_traceable

_MODEL = "model.xml"


class OpenVinoEngine(Engine):
    """Converts the module once, and compiles that once or for each bucket; CPU only.

    Where there are several lengths, all buckets share one model with free shapes, and nothing is padded. Padded to a
    bucket, such a model is as fast as one of fixed shapes in texts of random lengths, since runs of different buckets
    do not push each other's packed weights out; unpadded it is faster (MiniLM on two threads, 5 to 200 tokens: 6.1 ms
    on average against 6.9, the median 4.0 against 5.0), and twelve buckets take 670 MB less (issue 4). The first run of
    each new size takes about 2.5 ms longer: OpenVINO makes kernels for it, which it keeps (0.2 MB each).

    With one length, or where it could not be shown that sizes between the buckets are answered as eager does, the
    shapes of each bucket are fixed, which is faster for images. Where memory would run short, the rest of these buckets
    share one model too.
    """

    name = "openvino"
    takes_calls_at_once = True
    settles_at_once = True
    guards_sizes = False

    def __init__(self, job: EngineJob) -> None:
        super().__init__(job)
        self._converted: Any = None
        self._free: Any = None
        self._free_buckets: list[str] = []
        self.takes_any_size = job.has_lengths

    def preflight(self) -> None:
        """Look for the package, a CPU, and what a trace would bake in."""
        require(self.job.info, "openvino")
        require_precision(self.job)
        if self.job.info.device.type != "cpu":
            raise Unavailable(f"this engine serves CPUs, and this device is {self.job.info.device}")
        if any(dtype == torch.bfloat16 for dtype in self._dtypes()):
            raise Unavailable("the module takes or returns bfloat16, which OpenVINO's arrays cannot carry")
        require_traceable(self.job)

    def begin_from(self, other: Engine) -> None:
        """Take the converted model, whose constants all that is compiled of it shares (MiniLM: 88 MB; issue 5)."""
        assert isinstance(other, OpenVinoEngine)
        self._converted = other._converted

    def build(self) -> None:
        """Convert with free shapes; weights are shared with the module."""
        if self._converted is not None:
            return
        openvino = import_openvino()
        if self.kept is not None:
            core = openvino.Core()
            # Mapped, a file that somebody shortens would end the process.
            core.set_property({"ENABLE_MMAP": False})
            self._converted = core.read_model(self.kept / _MODEL)
            return
        # More than one row: tracing would take 1 for a constant.
        sample = self.job.samples[max(self.job.samples)]
        flat = FlatModule(self.job.module, self.job, autocast=False).eval()
        with _root_logger_as_it_was():
            self._converted = openvino.convert_model(flat, example_input=sample)

    def compile(self, bucket: Bucket) -> Runner:
        """Compile for one bucket's shapes, or for all of them, on the threads that torch has."""
        openvino = import_openvino()
        sample = self.job.samples[bucket]
        model = self._converted
        if len(model.inputs) != len(sample):
            raise Unavailable(f"the converted model has {len(model.inputs)} inputs, the module {len(sample)}")
        properties = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads() * self.job.streams,
            "NUM_STREAMS": self.job.streams,
            # Left to itself it takes bf16 where the CPU has it, whatever the model's dtype.
            "INFERENCE_PRECISION_HINT": "bf16" if self.job.autocast else "f32",
            # Pinning would put the replicas of one machine on the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        if not self.takes_any_size and is_room_for(self.job.weight_bytes):
            model = model.clone()
            model.reshape({port: list(tensor.shape) for port, tensor in zip(model.inputs, sample, strict=True)})
            compiled = openvino.Core().compile_model(model, "CPU", properties)
        else:
            self._free = self._free or openvino.Core().compile_model(model, "CPU", properties)
            if not self.takes_any_size:
                self._free_buckets.append(str(bucket))
            compiled = self._free
        ports = compiled.outputs
        rebuild, dtypes = self.job.rebuild, self.job.output_dtypes
        own = threading.local()  # a request runs one call at a time

        def run(*inputs: torch.Tensor) -> Any:
            if not hasattr(own, "request"):
                own.request = compiled.create_infer_request()
            found = own.request.infer([t.numpy() for t in inputs], share_inputs=True, share_outputs=False)
            return rebuild([torch.from_numpy(found[p]).to(d) for p, d in zip(ports, dtypes, strict=True)])

        return run

    def save(self, folder: Path) -> None:
        """Leave the converted model."""
        if self._converted is not None:
            folder.mkdir()
            import_openvino().save_model(self._converted, folder / _MODEL, compress_to_fp16=False)

    def close(self) -> None:
        """Drop the converted model; compiled ones go with what runs them."""
        self._converted = self._free = None

    def fix_sizes(self) -> None:
        """Compile each bucket for itself from now on."""
        super().fix_sizes()
        self._free = None

    def notes(self) -> list[str]:
        """Say which buckets share a model for want of memory."""
        if not self._free_buckets:
            return []
        return [f"openvino: buckets {', '.join(self._free_buckets)} share a model with free shapes for want of memory"]

    def _dtypes(self) -> list[torch.dtype]:
        return [spec.dtype for spec in self.job.input_specs] + list(self.job.output_dtypes)


@contextlib.contextmanager
def _root_logger_as_it_was() -> Iterator[None]:
    """Undo what a conversion that fails leaves behind: the root logger at ERROR, and warnings of others unheard."""
    root = logging.getLogger()
    level, filters, handlers = root.level, list(root.filters), list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers
