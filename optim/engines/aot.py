"""AOTInductor: the module exported and compiled ahead of time into a package that loads without a compiler."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from optim.buckets import Bucket
from optim.engines.base import Engine, EngineJob, FlatModule, Runner, Unavailable, require, require_precision
from optim.errors import is_device_error
from optim.scratch import Scratch
from optim.shapes import Inputs
from optim.tree import tensors_of
from optim.verify import Mismatch

_SHARED = "shared.pt2"


class AotEngine(Engine):
    """One package for all batch sizes where the module exports with a free batch dimension, else one a bucket.

    With `export.path` nothing is compiled: the package there is loaded, and held against eager like any other engine.
    """

    name = "aot"
    settles_at_once = True

    def __init__(self, job: EngineJob) -> None:
        super().__init__(job)
        self._shared: Runner | None = None
        path = job.config.export.path
        self._given = None if path is None else Path(path)
        self._folder: Path | None = None
        self._clean_up: Callable[[], Any] = lambda: None

    def preflight(self) -> None:
        """Look for what code generation needs, or for the package that was given."""
        if self._given is not None:
            if not self._given.is_file():
                raise Unavailable(f"there is no file {str(self._given)!r} (export.path)")
            made_for = _find_device(self._given)
            if made_for not in (None, self.job.info.device.type):
                message = f"the package was made for {made_for}, and this device is {self.job.info.device}"
                raise Unavailable(f"{message} (export.path)")
            return
        require_precision(self.job)
        if isinstance(self.job.module, torch.jit.ScriptModule):
            raise Unavailable("the module is TorchScript, which torch.export does not take")
        if self.kept is None:
            require(self.job.info, "cxx", "python_headers")

    def build(self) -> None:
        """Load the package given; else try one with a free batch dimension (never for lengths: each has its own)."""
        if self._given is not None:
            self._shared = self._load(self._given)
            return
        if self.kept is not None:
            self._folder = self.kept
            shared = self.kept / _SHARED
            self._shared = self._load(shared) if shared.exists() else None
            return
        folder = self._make_folder()
        sizes = {bucket.batch_size for bucket in self.job.samples}
        if len(self.job.samples) == 1 or len({bucket.length for bucket in self.job.samples}) > 1:
            return
        if any(spec.batch_dim is None for spec in self.job.input_specs):
            return
        batch = torch.export.Dim("batch", min=1, max=max(sizes))
        # The example must not have one row: export would take 1 for a constant.
        sample = self.job.samples[max(self.job.samples)]
        try:
            dynamic = tuple({s.batch_dim: batch} for s in self.job.input_specs)
            self._package(self._export(self.job.module, sample, dynamic), folder / _SHARED)
            self._shared = self._load(folder / _SHARED)
        except Exception as error:  # the module may specialise on its batch size; then every bucket gets its own
            if is_device_error(error):
                raise
            self._shared = None
            (folder / _SHARED).unlink(missing_ok=True)

    def compile(self, bucket: Bucket) -> Runner:
        """Return the shared package, or build this bucket's own."""
        if self._shared is not None:
            return self._shared
        assert self._folder is not None, "build() comes first"
        path = self._folder / f"{bucket}.pt2"
        if not path.exists():
            self._package(self._export(self.job.module, self.job.samples[bucket], None), path)
        return self._load(path)

    def _make_folder(self) -> Path:
        scratch = Scratch("aot")
        self._folder, self._clean_up = scratch.path, scratch.remove
        return self._folder

    def _export(self, module: nn.Module, sample: Inputs, dynamic: Any) -> ExportedProgram:
        """Trace a module with its outputs flat; `dynamic` has the free dimensions of each input, or is None."""
        flat = FlatModule(module, self.job).eval()
        with torch.no_grad():
            return torch.export.export(flat, sample, dynamic_shapes=None if dynamic is None else {"inputs": dynamic})

    def _package(self, exported: ExportedProgram, path: Path) -> None:
        import torch._inductor.config as inductor_config

        # Left to itself it starts a worker for each of the machine's CPUs, and keeps them; a CPU's code uses none.
        workers = 1 if self.job.info.device.type == "cpu" else inductor_config.compile_threads
        with torch.no_grad(), inductor_config.patch(compile_threads=workers):
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path))

    def save(self, folder: Path) -> None:
        """Leave the packages."""
        if self._folder is not None:
            shutil.copytree(self._folder, folder)

    def finish(self) -> None:
        """Remove the files: what was loaded is elsewhere, or mapped."""
        self._clean_up()

    def _load(self, path: Path) -> Runner:
        device = self.job.info.device
        index = -1 if device.type == "cpu" or device.index is None else device.index
        return self._runner(torch._inductor.aoti_load_package(str(path), device_index=index))

    def _runner(self, compiled: Callable[..., Any]) -> Runner:
        count, rebuild = len(self.job.output_dtypes), self.job.rebuild

        def run(*inputs: torch.Tensor) -> Any:
            # A package made of the module itself has its structure, one made here a flat one.
            tensors = tensors_of(compiled(*inputs))
            if len(tensors) != count:
                raise Mismatch(f"structure: {len(tensors)} tensors, eager gives {count}")
            return rebuild(tensors)

        return run

    def close(self) -> None:
        """Let go of the packages."""
        self._shared = None
        self.finish()


def _find_device(package: Path) -> str | None:
    """Return the type of device that a package says it is for: its code looks at no pointer that it is given."""
    try:
        with zipfile.ZipFile(package) as archive:
            for name in archive.namelist():
                # `model` is the one that is loaded of several.
                if "/aotinductor/model/" in name and name.endswith("metadata.json"):
                    found = json.loads(archive.read(name))
                    if isinstance(found, dict) and "AOTI_DEVICE_KEY" in found:
                        return str(found["AOTI_DEVICE_KEY"])
    except (OSError, ValueError, zipfile.BadZipFile):
        pass  # the loader has more to say of it
    return None
