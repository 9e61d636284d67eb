"""What tracing cannot see, and what it leaves to be tidied up."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optim.engines.base import EngineJob, Unavailable


def require_traceable(job: EngineJob) -> None:
    """Raise Unavailable where a trace of the module would bake in values of its example."""
    if job.value_reads:
        what = ", ".join(job.value_reads)
        raise Unavailable(f"the module reads tensor values in Python ({what}), which a trace would bake in")


def fold_padding(graph: torch.Graph) -> int:
    """Move zero padding before a 2-d convolution into the convolution; return how many were moved.

    A pad is a copy of its whole input, which TorchScript and IPEX leave in place: "same" padding written as
    ZeroPad2d costs EfficientNet-Lite0 17 of them a call. Padding that differs from side to side (strides of 2) is made
    symmetric by zeros in the kernel, for depthwise convolutions only: there the larger kernel costs less than the copy.
    The graph must be frozen, so that weights are constants.
    """
    folded = 0
    for conv in [n for n in graph.nodes() if n.kind() in ("aten::_convolution", "aten::conv2d")]:
        pad = conv.inputsAt(0).node()
        amounts = _zero_padding(pad)
        own: Any = conv.inputsAt(4).toIValue()
        transposed: Any = conv.inputsAt(6).toIValue()
        if conv.kind() == "aten::_convolution" and transposed is not False:
            continue  # there, padding takes away
        # aten::conv2d.padding takes a string ("same"); only plain numbers can be added to.
        if amounts is None or not isinstance(own, list) or len(own) != 2:
            continue
        left, right, top, bottom = amounts
        height, width = max(top, bottom), max(left, right)
        with graph.insert_point_guard(conv):
            if left != right or top != bottom:
                weight = _depthwise_weight(conv)
                if weight is None:
                    continue
                # Kernel [C, 1, kh, kw], extended on the sides that were padded less.
                wide = nn.functional.pad(weight, (width - left, width - right, height - top, height - bottom))
                conv.replaceInput(1, graph.insertConstant(wide))  # type: ignore[attr-defined]
            total = graph.insertConstant([own[0] + height, own[1] + width])  # type: ignore[attr-defined]
        conv.replaceInput(4, total)
        conv.replaceInput(0, pad.inputsAt(0))
        folded += 1
    if folded:
        torch._C._jit_pass_dce(graph)
        torch._C._jit_pass_lint(graph)
    return folded


def _zero_padding(node: torch.Node) -> list[int] | None:
    """Return (left, right, top, bottom) of a node that pads an image with zeros, else None."""
    if node.kind() not in ("aten::constant_pad_nd", "aten::pad"):
        return None
    amounts: Any = node.inputsAt(1).toIValue()
    mode: Any = "constant"
    value: Any = node.inputsAt(2).toIValue()
    if node.kind() == "aten::pad":
        mode, value = value, node.inputsAt(3).toIValue()
    fits = mode == "constant" and value in (None, 0, 0.0) and isinstance(amounts, list) and len(amounts) == 4
    return amounts if fits and min(amounts) >= 0 else None


def _depthwise_weight(conv: torch.Node) -> torch.Tensor | None:
    """Return the constant weight of an undilated depthwise convolution, else None."""
    weight: Any = conv.inputsAt(1).toIValue()
    dilation: Any = conv.inputsAt(5).toIValue()
    groups: Any = conv.inputsAt(8 if conv.kind() == "aten::_convolution" else 6).toIValue()
    if not isinstance(weight, torch.Tensor) or dilation != [1, 1] or groups == 1 or weight.shape[1] != 1:
        return None
    return weight.detach()
