"""What Inductor leaves for the next start: its graphs, the libraries that they load, and what it found of the CPU."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from optim.errors import describe
from optim.private import require_private, why_unusable

logger = logging.getLogger(__name__)

_GRAPHS, _LIBRARIES, _PASSED = "graphs.bin", "libraries", "passed_checks.json"

#: The checks of instruction sets that passed, in this process or in one whose files were restored.
_passed: set[str] = set()
_warm = threading.local()


def save(folder: Path, *, for_cpu: bool) -> None:
    """Save what this process has compiled into a folder; NotPrivate where others could have put it there.

    torch's artifacts have the graphs alone, by what decides them (and on a GPU Triton's kernels), not the libraries of
    a CPU's; there are none of graphs with frozen weights, whose libraries are still worth a compiler's time.
    """
    require_private(_cache_folder())
    is_closed = not _cache_folder().stat().st_mode & 0o011  # then nobody comes to what lies in it
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _GRAPHS).write_bytes(_graphs())
    if not for_cpu:
        return
    for name in _loaded_libraries():
        (folder / _LIBRARIES / name).parent.mkdir(parents=True, exist_ok=True)
        if not is_closed:
            require_private((_cache_folder() / name).parent)
        shutil.copyfile(_cache_folder() / name, folder / _LIBRARIES / name)
    (folder / _PASSED).write_text(json.dumps(sorted(_passed)))


def _graphs() -> bytes:
    """Return all artifacts of this process, in the form that `torch.compiler.load_cache_artifacts` takes.

    `torch.compiler.save_cache_artifacts` appends what is new at each call, and of what was appended only the last is
    loaded (torch 2.8 and 2.13): from its second model on, a process would keep what the one before had not.
    """
    from torch.compiler import _cache
    from torch.utils._appending_byte_serializer import AppendingByteSerializer

    found: dict[str, list[Any]] = {}
    for artifact in list(_cache.CacheArtifactManager._seen_artifacts):
        found.setdefault(artifact.type(), []).append(artifact)
    serializer = AppendingByteSerializer(serialize_fn=_cache._serialize_single_cache)
    serializer.extend(found.items())
    return serializer.to_bytes()


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
    if (folder / _PASSED).is_file():
        _passed.update(json.loads((folder / _PASSED).read_text()))


@contextmanager
def libraries_at_hand() -> Iterator[None]:
    """Have Inductor precompile no headers on this thread, which it does before it looks whether a library is there."""
    before = getattr(_warm, "is_on", False)
    _warm.is_on = True
    try:
        yield
    finally:
        _warm.is_on = before


@cache
def teach_inductor() -> None:
    """Have Inductor ask this module before it tries an instruction set, and before it precompiles headers; once.

    AttributeError where this torch does neither.

    To try a set is to start a process that imports torch: five seconds in every process on a CPU with AMX and two
    cores. Which sets there are, and what follows from them, stays Inductor's to say.
    """
    from torch._inductor import codecache, cpu_vec_isa

    check_build = cpu_vec_isa.VecISA.check_build
    bindings: Any = codecache.CppPythonBindingsCodeCache
    get_header = bindings._get_uncompiled_header.__func__

    def check_once(isa: Any, code: str, *more: Any, **named: Any) -> bool:
        asked = f"{isa} {isa.build_arch_flags()} {code}" + (f" {more} {named}" if more or named else "")
        name = hashlib.sha256(asked.encode()).hexdigest()
        if name not in _passed and check_build(isa, code, *more, **named):
            _passed.add(name)
        return name in _passed

    def get_header_unless_warm(cls: Any, *given: Any, **named: Any) -> Any:
        return None if getattr(_warm, "is_on", False) else get_header(cls, *given, **named)

    cpu_vec_isa.VecISA.check_build = check_once  # type: ignore[method-assign,assignment]
    bindings._get_uncompiled_header = classmethod(get_header_unless_warm)


@cache
def keep_headers_private() -> None:
    """Have Inductor keep its precompiled headers where nobody else can put theirs; once, before anything is compiled.

    They lie in its default folder, wherever its cache folder is, and end up in all that is compiled with them.
    """
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        why = why_unusable(Path(default_cache_dir()))
        if why is not None:
            from torch._inductor import codecache

            headers = _cache_folder() / "precompiled_headers"
            _ = codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR  # in another torch nobody would read them
            codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = str(headers), str(headers / "locks")
            logger.info("precompiled headers go to %s: %s", headers, why)
    except Exception as error:  # a torch that does it otherwise; many an engine has no headers
        logger.warning("where Inductor has its precompiled headers is not known: %s: %s", *describe(error, 300))


def _loaded_libraries() -> Iterator[Path]:
    """Yield what this process has loaded of the libraries that Inductor built, relative to its cache folder."""
    folder = _cache_folder()
    for module in list(sys.modules.values()):
        file = getattr(module, "__dict__", {}).get("__file__")  # an attribute of a lazy module could import it
        if isinstance(file, str) and file.endswith(".so") and Path(file).is_relative_to(folder):
            yield Path(file).relative_to(folder)


def _cache_folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()).absolute()
