"""What Inductor leaves for the next start: its graphs, the libraries that they load, and the CPU's instruction sets."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

_GRAPHS, _LIBRARIES, _SETS = "graphs.bin", "libraries", "instruction_sets.json"


def loaded_libraries() -> frozenset[Path]:
    """Return what this process has loaded of the libraries that Inductor built, relative to its cache folder."""
    folder = _cache_folder()
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    paths = [Path(file) for file in files if isinstance(file, str) and file.endswith(".so")]
    return frozenset(path.relative_to(folder) for path in paths if path.is_relative_to(folder))


def save(folder: Path, before: Set[Path], *, for_cpu: bool) -> None:
    """Save what this process has compiled into a folder, of libraries those that were not loaded `before`.

    torch's own form has the graphs alone, by what decides them (and on a GPU Triton's kernels), not the libraries of a
    CPU's; it has no graphs with frozen weights, whose libraries are still worth a compiler's time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = torch.compiler.save_cache_artifacts()
    if found is not None:
        (folder / _GRAPHS).write_bytes(found[0])
    if not for_cpu:
        return
    for name in loaded_libraries() - before:
        (folder / _LIBRARIES / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_cache_folder() / name, folder / _LIBRARIES / name)
    from torch._inductor import cpu_vec_isa

    (folder / _SETS).write_text(json.dumps([str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()]))


def restore(folder: Path) -> None:
    """Put what was saved where torch looks for it, but for what is there already."""
    if (folder / _GRAPHS).is_file():
        torch.compiler.load_cache_artifacts((folder / _GRAPHS).read_bytes())
    for source in (folder / _LIBRARIES).rglob("*.so"):
        target = _cache_folder() / source.relative_to(folder / _LIBRARIES)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as beside:  # another process may load it meanwhile
                os.replace(shutil.copyfile(source, Path(beside) / source.name), target)


@contextmanager
def known_sets(folder: Path | None) -> Iterator[None]:
    """Spare Inductor the trying of each instruction set, which is a process that imports torch, where it is known.

    Five seconds in every process, on a CPU with AMX and two cores. Code for a set that does not work here after all
    is refused as everything is that does not compile or run.
    """
    from torch._inductor import cpu_vec_isa

    names = None if folder is None or not (folder / _SETS).is_file() else json.loads((folder / _SETS).read_text())
    if not isinstance(names, list) or (any("amx" in name for name in names) and not torch.cpu._init_amx()):
        yield
        return
    known = [isa for isa in cpu_vec_isa.supported_vec_isa_list if str(isa) in names]
    with ExitStack() as stack:
        stack.enter_context(patch.object(cpu_vec_isa, "valid_vec_isa_list", lambda: known))
        for isa in known:  # an instance's truth is whether it can be built for, which is tried too
            stack.enter_context(patch.object(type(isa), "__bool__", lambda isa: True))
        yield


def _cache_folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())
