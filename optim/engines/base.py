"""What every engine is given, and what it must do."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optim import pages
from optim.buckets import Bucket
from optim.config import Pt2Config
from optim.device import DeviceInfo, inspect_device
from optim.errors import describe, is_device_error
from optim.reference import Reference
from optim.shapes import Inputs, TensorSpec
from optim.tree import Rebuild, tensors_of

logger = logging.getLogger(__name__)

Runner = Callable[..., Any]


class Unavailable(Exception):
    """The engine cannot work on this device or for this module; the message is the reason."""


@dataclass(frozen=True)
class EngineJob:
    """One module to be compiled: eager on its device and in eval mode, with an example for every bucket."""

    module: nn.Module
    config: Pt2Config
    info: DeviceInfo
    samples: Mapping[Bucket, Inputs]
    input_specs: tuple[TensorSpec, ...]
    output_dtypes: tuple[torch.dtype, ...]
    rebuild: Rebuild
    """Puts a flat list of output tensors into the structure that the module returns."""
    value_reads: tuple[str, ...] = ()
    """The operators by which the module looks at tensor values in Python."""
    phase: str = "forward"
    """What a call of the module is: `forward`, `prefill` or `decode`; decides its attention kernels."""
    kept: Path | None = None
    """Where `Engine.save` of an earlier build of the same module may have left something, by the engine's name."""
    state: tuple[str, ...] = ()
    """The buffers that calls change."""
    streams: int = 1
    """How many calls are made at a time, each on as many threads as torch has while code is built."""

    @classmethod
    def of(
        cls, module: nn.Module, config: Pt2Config, reference: Reference, device: torch.device, phase: str
    ) -> EngineJob:
        """Put together what is known of a module after its eager reference was made."""
        return cls(
            module,
            config,
            inspect_device(device),
            reference.samples,
            reference.input_specs,
            reference.output_dtypes,
            reference.rebuild,
            reference.value_reads,
            phase,
            state=reference.state.names,
        )

    @property
    def weight_bytes(self) -> int:
        """The size of all parameters and buffers."""
        return sum(t.nbytes for t in [*self.module.parameters(), *self.module.buffers()])

    @property
    def has_lengths(self) -> bool:
        """Whether buckets differ in length."""
        return len({bucket.length for bucket in self.samples}) > 1

    @property
    def wants_huge_pages(self) -> bool:
        """Whether its memory shall lie in huge pages."""
        return self.info.device.type == "cpu" and pages.are_for(self.phase)

    @property
    def autocast(self) -> bool:
        """Whether the compiled engine is asked to run under bf16."""
        return self.config.autocast


class Engine:
    """Builds and runs one module; all calls come from the thread that owns the model.

    `preflight` raises Unavailable before anything costs time; `build` prepares what all buckets share;
    `compile` returns the callable of one bucket, whose first call may still compile.
    """

    name = "engine"
    #: The outputs lie in memory that the next call overwrites (CUDA graphs), so the caller must copy them.
    reuses_outputs = False
    #: Compiling takes Dynamo's lock.
    needs_dynamo = False
    #: Buckets take any number of rows and any length up to their own, without padding.
    takes_any_size = False
    #: Such code raises for a size that it was not made for. Else sizes are proven before it may take any (`fix_sizes`).
    guards_sizes = True
    #: What `compile` returns may be called by several threads at a time.
    takes_calls_at_once = False
    #: What is saved serves as many threads as torch had when it was built; others are saved beside it.
    keeps_by_threads = False
    #: The weights are in memory once, however many buckets there are.
    holds_weights_once = False
    #: What is saved serves another process as well as what it would build itself, and takes no more memory there.
    hands_over = False
    #: A bucket's first call is like all later ones. (Not of torch.compile: what a call leaves on the module, the last
    #: size in an attribute for one, may be guarded, so that the second call compiles once more.)
    settles_at_once = False
    #: The module's declared state is read and written where it lies.
    keeps_state = False

    def __init__(self, job: EngineJob) -> None:
        self.job = job

    def preflight(self) -> None:
        """Raise Unavailable with the reason where the engine cannot work here."""

    def begin_from(self, other: Engine) -> None:
        """Take over what `build` of an engine of the same kind and module made, where it serves any number of threads.

        Called before `build`, if at all.
        """

    def build(self) -> None:
        """Prepare what all buckets share."""

    def check_bucket(self, bucket: Bucket) -> None:
        """Raise Unavailable with the reason where the engine is not for a bucket."""

    def compile(self, bucket: Bucket) -> Runner:
        """Return the callable of one bucket."""
        raise NotImplementedError

    def mark(self, inputs: Inputs) -> None:
        """Prepare warm-up inputs so that code for any size comes of them."""

    def building(self) -> AbstractContextManager[Any]:
        """Return the context in which warm-up calls run."""
        return nullcontext()

    def serving(self) -> AbstractContextManager[Any]:
        """Return the context in which calls after warm-up run: none of them may compile."""
        return nullcontext()

    def fix_sizes(self) -> None:
        """Take the buckets' own sizes alone from now on: that others are answered as eager does could not be shown."""
        self.takes_any_size = False

    def check_warm(self, bucket: Bucket) -> None:
        """Raise where warm-up ended in something else than compiled code (a silent fallback)."""

    def save(self, folder: Path) -> None:
        """Leave in a new folder what spares the next build of the same module time; call before `finish`."""

    @property
    def kept(self) -> Path | None:
        """The folder that an earlier build saved to, if there is one."""
        folder = None if self.job.kept is None else self.job.kept / self.name
        return folder if folder is not None and folder.is_dir() else None

    def finish(self) -> None:
        """Let go of what only building needed: every bucket that this engine serves is built."""

    def close(self) -> None:
        """Let go of everything that was built: the engine serves nothing."""
        self.finish()

    def notes(self) -> list[str]:
        """Return what is worth knowing about the code once all buckets are done."""
        return []


def keep(engine: Engine, notes: list[str]) -> None:
    """Have an engine save itself to its job's `kept` folder, if there is one; a note says so where it cannot."""
    if engine.job.kept is None or (engine.kept is not None and not engine.keeps_by_threads):
        return  # or it was made of what is there
    folder = engine.job.kept / engine.name
    before = set(folder.iterdir()) if folder.is_dir() else set()
    try:
        engine.save(folder)
    except Exception as error:  # a full disk, or a package that saves in another way now, is no reason not to serve
        if is_device_error(error):
            raise
        why = "{}: {}".format(*describe(error, 300))
        notes.append(f"{engine.name}: nothing is kept for the next start: {why}")
        logger.warning(notes[-1])
        if before:  # for other numbers of threads, and whole
            for path in set(folder.iterdir()) - before:
                path.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)


class FlatModule(nn.Module):
    """The module with its outputs as a flat tuple of tensors in eager's dtypes, under bf16 autocast if asked.

    Tracing and export want plain tuples; `EngineJob.rebuild` gives the structure back.
    """

    def __init__(self, module: nn.Module, job: EngineJob, *, autocast: bool | None = None) -> None:
        super().__init__()
        self.module = module
        self._dtypes = job.output_dtypes
        self._device_type = job.info.device.type
        self._autocast = job.autocast if autocast is None else autocast

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the flat outputs."""
        if self._autocast:
            with torch.autocast(self._device_type, torch.bfloat16):
                outputs = tensors_of(self.module(*inputs))
        else:
            outputs = tensors_of(self.module(*inputs))
        return tuple(t.to(dtype) for t, dtype in zip(outputs, self._dtypes, strict=True))


def require(info: DeviceInfo, *names: str) -> None:
    """Raise Unavailable with the recorded reason for the first capability that is missing."""
    for name in names:
        capability = info.capabilities[name]
        if not capability.available:
            raise Unavailable(capability.detail)


def require_precision(job: EngineJob) -> None:
    """Raise Unavailable where bf16 is asked for and the device would emulate it."""
    if job.autocast:
        capability = job.info.capabilities["bfloat16"]
        if not capability.available:
            raise Unavailable(f"autocast to bfloat16 is not there: {capability.detail}")
