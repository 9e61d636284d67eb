"""Which SDPA kernels a phase of a model may use, and how precise matrix products are, in compiled code.

The math kernel lets Inductor fuse attention and helps compiled decode (gpt-fast's choice); it materialises every score,
so it is for decode only, and eager never gets it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from optim.config import Pt2Config
from optim.errors import ConfigError

#: What a model does when it is called: a whole forward pass, the prefill of a prompt, or one token of decoding.
PHASES = ("forward", "prefill", "decode")

_KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def check_phase(phase: str) -> str:
    """Return the phase; ConfigError where there is none of this name."""
    if phase not in PHASES:
        raise ConfigError("phase", phase, f"use one of {', '.join(PHASES)}")
    return phase


def kernel_of(config: Pt2Config, phase: str) -> str | None:
    """Return the kernel that the phase is restricted to, or None where PyTorch chooses."""
    kernel: str | None = getattr(config.attention, phase)
    return kernel


def attention(config: Pt2Config, phase: str) -> AbstractContextManager[Any]:
    """Return the context in which a phase is traced: the choice of kernel is baked into the code made in it."""
    kernel = kernel_of(config, phase)
    return nullcontext() if kernel is None else sdpa_kernel([_KERNELS[kernel]])


class _Precision:
    """torch's precision of float32 matrix products, which all threads of a process share.

    The runs of two streams begin and end in any order: what was there before comes back when the last one ends. Models
    of different precisions that run at the same time get the one that was asked for last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._askers = 0
        self._before = ""

    def ask_for(self, precision: str) -> None:
        with self._lock:
            if not self._askers:
                self._before = torch.get_float32_matmul_precision()
            self._askers += 1
            torch.set_float32_matmul_precision(precision)

    def give_back(self) -> None:
        with self._lock:
            self._askers -= 1
            if not self._askers:
                torch.set_float32_matmul_precision(self._before)


_precision = _Precision()


@contextmanager
def matmul_precision(config: Pt2Config) -> Iterator[None]:
    """Let float32 matrix products use TF32 or bf16 inside, as configured, and as before outside."""
    if config.matmul_precision is None:
        yield
        return
    _precision.ask_for(config.matmul_precision)
    try:
        yield
    finally:
        _precision.give_back()


def with_precision(config: Pt2Config, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return the callable under the configured matmul precision; itself where none is configured."""
    if config.matmul_precision is None:
        return run

    def precise(*inputs: torch.Tensor) -> Any:
        with matmul_precision(config):
            return run(*inputs)

    return precise
