"""C++ of our own, compiled as Inductor compiles its own, into Inductor's cache folder."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from pathlib import Path

_lock = threading.Lock()


@dataclass(frozen=True)
class Library:
    """A library with its content, which outlives the file that it was loaded from."""

    functions: ctypes.CDLL
    content: bytes

    def keep(self, path: Path) -> None:
        """Leave it for `load` to find, unless it is there."""
        if not path.exists():
            path.write_bytes(self.content)


_loaded: dict[str, Library] = {}


def load(name: str, kept: Path | None = None, *, with_torch: bool = False) -> Library:
    """Load the library of a source file beside this one, once a process; from the file `kept`, if it is there.

    Functions are called without Python's lock; `with_torch` they are called with it, and may use torch's C++.
    """
    with _lock:
        if name not in _loaded:
            path = kept if kept is not None and kept.is_file() else _compile(name, with_torch=with_torch)
            functions = ctypes.PyDLL(str(path)) if with_torch else ctypes.CDLL(str(path))
            _loaded[name] = Library(functions, path.read_bytes())
        return _loaded[name]


def _compile(name: str, *, with_torch: bool) -> Path:
    from torch._inductor.codecache import CppCodeCache

    class WithTorch(CppCodeCache):
        cpp_compile_command_flags = {"include_pytorch": True, "shared": True}  # noqa: RUF012  # as Inductor has it

    source = Path(__file__).with_name(f"{name}.cpp").read_text()
    return Path((WithTorch if with_torch else CppCodeCache).load(source)._name)
