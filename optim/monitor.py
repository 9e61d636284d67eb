"""Counting compilations: the end of silent fallbacks."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch


def _counters() -> Any:
    """Return Dynamo's counters; importing Dynamo takes a second and touches the disk, so not with this module."""
    from torch._dynamo.utils import counters

    return counters


@dataclass(frozen=True)
class CompileCounts:
    """Dynamo's process-wide counts at one moment; subtract two to see what happened between them."""

    graphs: int
    graph_breaks: int
    cudagraph_skips: int

    def __sub__(self, earlier: CompileCounts) -> CompileCounts:
        return CompileCounts(
            self.graphs - earlier.graphs,
            self.graph_breaks - earlier.graph_breaks,
            self.cudagraph_skips - earlier.cudagraph_skips,
        )


def count_graphs() -> int:
    """Return the graphs compiled since the process started; two dictionary look-ups, so cheap enough for every call."""
    return int(_counters()["stats"]["unique_graphs"])


def prepare_thread() -> None:
    """Give this thread a state for CUDA graphs of its own, where it has none.

    torch 2.8 has one only in the thread that first imported the module (pytorch issue 123177); later releases do this
    themselves.
    """
    from torch._inductor import cudagraph_trees as trees

    name = "tree_manager_containers"
    if hasattr(trees.local, name) or torch._C._is_key_in_tls(name):
        return
    # Not stashed in torch's own thread-local storage as well, which is for the threads of backward passes.
    trees.local.tree_manager_containers = {}
    trees.local.tree_manager_locks = defaultdict(threading.Lock)


def count_recordings(device: torch.device) -> int:
    """Return the CUDA graphs that this thread has recorded on a device; 0 where it has none."""
    from torch._inductor import cudagraph_trees

    index = device.index if device.index is not None else torch.cuda.current_device()
    manager = cudagraph_trees.get_container(index).tree_manager
    # An itertools.count: only its repr tells where it stands without moving it.
    return 0 if manager is None else int(repr(manager.graph_counter)[len("count(") : -1])


def count_compilations() -> CompileCounts:
    """Read all the counters."""
    counters = _counters()
    return CompileCounts(
        count_graphs(),
        sum(counters["graph_break"].values()),
        counters["inductor"]["cudagraph_skips"],
    )


def graph_break_reasons(limit: int = 3) -> list[str]:
    """Return the first lines of the most frequent graph-break reasons since the process started."""
    return [reason.strip().splitlines()[0] for reason, _ in _counters()["graph_break"].most_common(limit)]
