"""What tracing cannot see, and what it leaves to be tidied up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

    Run in plain eager mode, where shapes are plain integers: so asking for a shape is not counted.
    """
    with _ValueReads() as reads, torch.no_grad():
        module(*inputs)
    found: list[str] = reads.found
    return found


def fold_padding(graph: torch.Graph) -> int:
    """Move symmetric zero padding before a 2-d convolution into the convolution; return how many were moved.

    A pad is a copy of its whole input, which TorchScript and IPEX leave in place: "same" padding written as
    ZeroPad2d costs EfficientNet-Lite0 12 of them a call.
    """
    folded = 0
    for conv in [n for n in graph.nodes() if n.kind() in ("aten::_convolution", "aten::conv2d")]:
        transposed: Any = conv.inputsAt(6).toIValue()
        if conv.kind() == "aten::_convolution" and transposed is not False:
            continue  # transposed: there, padding takes away
        pad = conv.inputsAt(0).node()
        if pad.kind() not in ("aten::constant_pad_nd", "aten::pad"):
            continue
        amounts: Any = pad.inputsAt(1).toIValue()
        mode: Any
        value: Any
        if pad.kind() == "aten::pad":
            mode, value = pad.inputsAt(2).toIValue(), pad.inputsAt(3).toIValue()
        else:
            mode, value = "constant", pad.inputsAt(2).toIValue()
        own: Any = conv.inputsAt(4).toIValue()
        if mode != "constant" or value not in (None, 0, 0.0) or not isinstance(amounts, list) or len(amounts) != 4:
            continue
        left, right, top, bottom = amounts
        # aten::conv2d.padding takes a string ("same"); only plain numbers can be added to.
        if left != right or top != bottom or min(amounts) < 0 or not isinstance(own, list) or len(own) != 2:
            continue
        with graph.insert_point_guard(conv):
            total = graph.insertConstant([own[0] + top, own[1] + left])  # type: ignore[attr-defined]
        conv.replaceInput(4, total)
        conv.replaceInput(0, pad.inputsAt(0))
        folded += 1
    if folded:
        torch._C._jit_pass_dce(graph)
        torch._C._jit_pass_lint(graph)
    return folded
