"""torch.compile backends that fail in chosen ways; importing this module registers them (fast: no Inductor)."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

Compiled = Callable[..., Any]

#: What `slow` has compiled that is still there.
SLOW: weakref.WeakSet[Compiled] = weakref.WeakSet()


def _wrap(graph: fx.GraphModule, change: Callable[[torch.Tensor], torch.Tensor]) -> Compiled:
    def run(*args: Any) -> Any:
        return tuple(change(out) if isinstance(out, torch.Tensor) else out for out in graph.forward(*args))

    return run


def faithful(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    return graph.forward


def raises(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    raise RuntimeError("this backend cannot compile anything")


def raises_at_call(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    def run(*args: Any) -> Any:
        raise IndexError("this backend's code cannot run")

    return run


def raises_on_four_rows(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    if any(isinstance(t, torch.Tensor) and t.shape == (4, 8) for t in inputs):
        raise RuntimeError("four rows are too many")
    return graph.forward


def wrong(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    return _wrap(graph, lambda out: out + 0.05)


def makes_nan(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    return _wrap(graph, lambda out: torch.full_like(out, float("nan")))


def wrong_dtype(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    return _wrap(graph, lambda out: out.to(torch.float64))


def stale(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Answer the first call's output for ever, as a graph with a stale input buffer does."""
    kept: list[Any] = []

    def run(*args: Any) -> Any:
        if not kept:
            kept.append(graph.forward(*args))
        return kept[0]

    return run


def blind_to_masks(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Take every mask for a mask of ones, as a trace of a model that asks `mask.all()` does."""

    def run(*args: Any) -> Any:
        seen = [isinstance(t, torch.Tensor) and t.dtype == torch.int64 and int(t.max()) <= 1 for t in args]
        return graph.forward(*(torch.ones_like(t) if mask else t for t, mask in zip(args, seen, strict=True)))

    return run


def wrong_shape(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    return _wrap(graph, lambda out: out.unsqueeze(0))


def transposed(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Right, in memory laid out the other way round."""
    return _wrap(graph, lambda out: out.t().contiguous().t() if out.dim() == 2 else out)


def one_buffer(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Right, but every call's output lies in the same memory, as a graph's does that nobody copies."""
    kept: list[torch.Tensor] = []

    def run(*args: Any) -> Any:
        outputs = graph.forward(*args)
        if not kept:
            kept.extend(out.clone() for out in outputs)
        return tuple(buffer.copy_(out) for buffer, out in zip(kept, outputs, strict=True))

    return run


def changes_its_input(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    def run(*args: Any) -> Any:
        outputs = graph.forward(*args)
        for arg in args:
            if isinstance(arg, torch.Tensor) and not isinstance(arg, torch.nn.Parameter) and arg.is_floating_point():
                arg.zero_()
        return outputs

    return run


#: Lets what hangs in `hangs` go, so that its thread ends with its test.
let_go = threading.Event()


def hangs(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Never come back, from a call that no exception reaches."""
    let_go.wait()
    return graph.forward


def loops(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Never come back, in Python code."""
    while True:
        time.sleep(0.001)


def crashes(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    os.kill(os.getpid(), signal.SIGSEGV)
    return graph.forward


def slow(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    def run(*args: Any) -> Any:
        time.sleep(0.02)
        return graph.forward(*args)

    SLOW.add(run)
    return run


def out_of_memory(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


BACKENDS = {
    f"pt2test_{function.__name__}": function
    for function in (
        faithful,
        raises,
        raises_at_call,
        raises_on_four_rows,
        wrong,
        makes_nan,
        wrong_dtype,
        stale,
        blind_to_masks,
        slow,
        wrong_shape,
        transposed,
        one_buffer,
        changes_its_input,
        hangs,
        loops,
        crashes,
        out_of_memory,
    )
}

for _name, _function in BACKENDS.items():
    if _name not in torch.compiler.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(_function, name=_name)
