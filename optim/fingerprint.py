"""What decides the result of compiling: the key of the compile cache."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import sysconfig
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optim.device import cpuinfo
from optim.engines.base import EngineJob

#: Attributes of modules that say where they came from, not what they do: transformers keeps the checkpoint's folder.
_ABOUT = {"name_or_path"}
#: The part of a description that says what there is to build code with.
TOOLS = "tools"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def describe_job(job: EngineJob, streams: int | None) -> dict[str, Any]:
    """Return everything but the weights' values that decides which engines win, and what their code is.

    Rather too much than too little: any other version of an installed package, and any other source file of the
    packages that the module's classes are from, is another key.
    """
    config = {key: value for key, value in job.config.to_dict().items() if key != "cache"}
    del config["compile"]["when"]  # that is what it says: when
    return {
        "packages": _packages(),
        "python": platform.python_version(),
        "code": _own_code(job.module),
        "device": {
            "name": job.info.name,
            "threads": torch.get_num_threads(),
            "capability": torch.cuda.get_device_capability(job.info.device) if job.info.device.type == "cuda" else None,
            "streams": streams,
            # Libraries are built with `-march=native`: a CPU of the same name and ISA may lack what they use.
            "instructions": _instructions(),
            # They need the C library and the C++ runtime that they were linked with, or newer ones.
            "libc": platform.libc_ver(),
            "amx": job.info.capabilities["amx"].available,  # which Linux has to permit
        },
        TOOLS: {
            "compiler": _version_of(job.info.capabilities["cxx"].detail),
            "python_headers": job.info.capabilities["python_headers"].available,
        },
        "config": config,
        "package": config["export"]["path"] and _hash(Path(config["export"]["path"])),
        "phase": job.phase,
        "state": list(job.state),
        "examples": {str(b): [[str(t.dtype), list(t.shape)] for t in job.samples[b]] for b in sorted(job.samples)},
        "module": _structure(job.module),
    }


def key_of(description: Mapping[str, Any]) -> str:
    """Return the key of a description: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()[:32]


def hash_weights(module: nn.Module, state: Sequence[str] = ()) -> str:
    """Return the hash of all parameters' and buffers' values, but for those of its state."""
    found = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in state:
            continue
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


@functools.cache
def _instructions() -> str | None:
    """Return the hash of what the CPU can do, by Linux; None where it does not tell."""
    said = [*cpuinfo().get("flags", ()), *cpuinfo().get("Features", ())]
    return hashlib.sha256("\n".join(sorted(said)).encode()).hexdigest()[:32] if said else None


@functools.cache
def _version_of(compiler: str) -> str | None:
    """Return the first line that a C++ compiler says of its version; None where there is none."""
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return said.stdout.split("\n", 1)[0] or None


@functools.cache
def _packages() -> list[str]:
    return sorted({f"{found.name}=={found.version}" for found in importlib.metadata.distributions()})


def _own_code(module: nn.Module) -> dict[str, str]:
    """Return the hashes of the source files of the packages that the module's classes are from, and of ours.

    Installed ones are left out: their versions are in the key. All files of a package count, loaded or not, so that
    every process finds the same.
    """
    installed = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib"))
    found = {}
    for name in sorted({__name__.partition(".")[0], *(type(m).__module__.partition(".")[0] for m in module.modules())}):
        package = sys.modules.get(name)
        folders = [Path(folder) for folder in getattr(package, "__path__", ())]
        file = getattr(package, "__file__", None)
        sources = [path for folder in folders for kind in ("*.py", "*.cpp") for path in sorted(folder.rglob(kind))]
        files = sources or ([Path(file)] if file else [])
        if not files:  # a notebook's classes
            classes = {type(m) for m in module.modules() if type(m).__module__.partition(".")[0] == name}
            found.update({f"{name}:{c.__qualname__}": _hash_class(c) for c in classes})
        for path in files:
            if not str(path.resolve()).startswith(installed):
                found[f"{name}:{path.name if not folders else path.relative_to(folders[0])}"] = _hash(path)
    return found


def _hash_class(kind: type) -> str:
    codes = [f.__code__ for f in vars(kind).values() if isinstance(f, types.FunctionType)]
    parts = [(code.co_code, repr(code.co_consts), code.co_names) for code in codes]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _structure(module: nn.Module) -> list[Any]:
    """Return every submodule's class and plain settings, and every tensor's dtype, shape and strides."""
    parts: list[Any] = []
    for name, part in module.named_modules():
        settings = {
            key: value
            for key, value in sorted(vars(part).items())
            if not (key.startswith("_") or key in _ABOUT)
            and isinstance(value, str | int | float | bool | tuple | list | type(None))
        }
        # Functions and objects in a list are written with their addresses, which no two processes share.
        plain = _ADDRESS.sub("", str(settings))
        parts.append([name, f"{type(part).__module__}.{type(part).__qualname__}", part.extra_repr(), plain])
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [*parts, [[name, str(t.dtype), list(t.shape), _strides(t)] for name, t in tensors]]


def _strides(tensor: torch.Tensor) -> list[int] | None:
    return list(tensor.stride()) if tensor.layout is torch.strided else None
