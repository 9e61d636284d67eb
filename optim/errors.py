"""The errors `optim` raises, and the rule that tells a compiler's failure from a broken device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class ConfigError(ValueError):
    """A configuration value that cannot be used; names the key, the value and what is allowed."""

    def __init__(self, key: str, value: Any, allowed: str) -> None:
        super().__init__(key, value, allowed)
        self.key, self.value, self.allowed = key, value, allowed

    def __str__(self) -> str:
        shown = repr(self.value)
        return f"{self.key}: {shown if len(shown) <= 200 else shown[:197] + '...'} is not allowed; {self.allowed}"


class ModelError(RuntimeError):
    """The module itself fails in eager mode, so no compiler is to blame."""


class CompileError(RuntimeError):
    """A compile failure made fatal by `fallback: fail`."""


# Errors after which the device's context or the process' memory cannot be trusted. torch raises many
# of them as plain RuntimeError, so the text has to tell (torch.AcceleratorError only exists since 2.8).
_FATAL_TYPES: tuple[type[BaseException], ...] = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)
# The first is of torch's allocator, the second the driver's own: a graph that is instantiated, pinned memory.
_MEMORY_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_FATAL_TEXTS = ("CUDA error:", "device-side assert", "illegal memory access", *_MEMORY_TEXTS)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and everything it wraps: `__cause__`, `__context__` and Inductor's `inner_exception`."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [getattr(current, "inner_exception", None), current.__cause__, current.__context__]


def is_device_error(error: BaseException) -> bool:
    """Say whether the error means memory or the device is gone: never to be taken for a compile failure."""
    return any(map(_is_fatal, causes(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out, the device's or the process's, and nothing worse: less may fit."""
    fatal = [e for e in causes(error) if _is_fatal(e)]
    # A capture that it happens in fails for that reason, in words of its own.
    return any(map(_is_of_memory, fatal)) and all(_is_of_memory(e) or "captur" in str(e) for e in fatal)


def let_go(error: BaseException) -> None:
    """Drop the frames that an error holds, and with them the tensors of the call that ran out of memory."""
    for e in causes(error):
        e.__traceback__ = None


def _is_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in _MEMORY_TEXTS)


def _is_fatal(error: BaseException) -> bool:
    return isinstance(error, _FATAL_TYPES) or any(text in str(error) for text in _FATAL_TEXTS)


def describe(error: BaseException, limit: int = 2000) -> tuple[str, str]:
    """Return the type name and message of an error, the innermost cause appended, cut to `limit` characters."""
    chain = list(causes(error))
    # Dynamo ends every message with the same advice on environment variables.
    message = str(error).partition("\n\nSet TORCHDYNAMO_VERBOSE")[0].strip()
    root = chain[-1]
    if root is not error and str(root).strip() and str(root).strip() not in message:
        message = f"{message} (caused by {type(root).__name__}: {str(root).strip()})"
    return type(error).__name__, message if len(message) <= limit else message[: limit - 3] + "..."
