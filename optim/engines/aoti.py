"""What AOTInductor made for a CPU, called without Python's lock and by several threads at a time."""

from __future__ import annotations

import ctypes
import shutil
import weakref
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from optim.engines import native

_NAME, _FILE = "aoti", "aoti.so"
#: The ending of the empty file that says that a library holds its constants.
WITH_CONSTANTS = ".constants"


class AotModel:
    """A library that AOTInductor made, loaded for so many calls at a time.

    `constants` are values by the names that the exported module has for them; they are used where they lie. Others have
    to be in the library, which says so by a file beside it.
    torch's own loader keeps Python's lock for as long as a run takes: two streams took turns, and no request was read
    or answered meanwhile. It also unpacks a package into a folder of /tmp, which a process that is killed leaves there.
    RuntimeError where it cannot be loaded, or a run fails.
    """

    def __init__(self, path: Path, calls: int, constants: Mapping[str, torch.Tensor], kept: Path | None = None) -> None:
        self._library = native.load(_NAME, kept and kept / _FILE, with_torch=True)
        functions: Any = self._library.functions
        taken = (ctypes.c_char_p, ctypes.c_int64, ctypes.py_object, ctypes.c_bool)
        functions.load.argtypes, functions.load.restype = taken, ctypes.c_void_p
        functions.unload.argtypes, functions.unload.restype = (ctypes.c_void_p,), None
        functions.run.argtypes, functions.run.restype = (ctypes.c_void_p, ctypes.py_object), ctypes.py_object
        self._run = functions.run
        has_others = path.with_suffix(WITH_CONSTANTS).exists()
        self._model = functions.load(str(path).encode(), calls, dict(constants), has_others)
        weakref.finalize(self, functions.unload, self._model).atexit = False

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs."""
        found: list[torch.Tensor] = self._run(self._model, inputs)
        return found

    def keep(self, folder: Path) -> None:
        """Leave what loading would have to compile elsewhere."""
        self._library.keep(folder / _FILE)


def unpack(package: Path, library: Path) -> None:
    """Put the library that a package holds, and beside it what it says of the operators it calls, into files."""
    with zipfile.ZipFile(package) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        described = f"{name.removesuffix('.so')}.json"
        for member, path in ((name, library), (described, library.with_suffix(".json"))):
            with archive.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
