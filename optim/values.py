"""Seeing whether a module looks at tensor values in Python, where no tracer sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optim.shapes import Inputs

#: Operators by which Python gets at a tensor's values: `.item()`, `bool(t)`, `.tolist()`, `torch.equal`.
_VALUE_READERS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")


class _ValueReads(TorchDispatchMode):
    """Records the operators that hand a tensor's values to Python."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name()
        if name.split(".")[0] in _VALUE_READERS and name not in self.found:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def reads_values(module: nn.Module, inputs: Inputs) -> list[str]:
    """Return the operators by which the module looks at tensor values in Python; a trace would bake those in.

    Run in eager mode, where shapes are plain integers: so asking for a shape is not counted. The module is told that
    it is being traced: transformers' models look at their masks' values only where they are not.
    """
    # Under a dispatch mode Dynamo gives a function up for good; what the caller compiled himself is not ours to spoil.
    eager = torch.compiler.set_stance("force_eager")
    jit = getattr(torch, "jit", None)  # deprecated: a torch without it cannot be asked by anybody
    traced = mock.patch.object(jit, "is_tracing", lambda: True) if hasattr(jit, "is_tracing") else nullcontext()
    with eager, traced, _ValueReads() as reads, torch.no_grad():
        module(*inputs)
    found: list[str] = reads.found
    return found
