"""One run of the model: the requests of a group in, each one's output out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deployments.queue import Queued
from optim import CompiledModel
from optim.shapes import Inputs, cut, pad, take_rows
from optim.tree import flatten


@dataclass(frozen=True)
class BatchRecord:
    """One run of the model, for metrics."""

    rows: int
    tokens: int
    """What was asked for: tokens, or rows where there is no length."""
    tokens_run: int
    """What ran: the same and the padding."""
    waits_s: tuple[float, ...]
    """How long each request waited for the run."""
    run_s: float
    on_stream: bool = False
    """Whether it ran on a share of the threads, others beside it."""

    @property
    def padding(self) -> float:
        """The share of what ran that was padding, 0 to 1."""
        return 1 - self.tokens / self.tokens_run


def run_together(group: Sequence[Queued], model: CompiledModel) -> list[Any]:
    """Run the requests as one batch, those of other lengths padded; return each one's output, on the CPU."""
    specs = model.input_specs
    works = [queued.work for queued in group]
    lengths = [queued.item.length if queued.item else 0 for queued in group]
    longest = max(lengths)
    # Copied to the device one by one: from pinned memory that goes on beside what runs there.
    inputs = _move(works[0].inputs, model.device)
    if len(works) > 1:
        same = [pad(specs, _move(w.inputs, model.device), w.rows, longest) for w in works]
        inputs = tuple(
            column[0] if spec.batch_dim is None else torch.cat(column, spec.batch_dim)
            for spec, column in zip(specs, zip(*same, strict=True), strict=True)
        )
    tensors, rebuild = flatten(model(*inputs))
    tensors = [t.cpu() for t in tensors]
    if len(works) == 1:
        return [rebuild(tensors)]
    outputs, start = [], 0
    for work, length in zip(works, lengths, strict=True):
        own = cut(model.output_specs, take_rows(model.output_specs, tensors, start, work.rows), work.rows, length)
        outputs.append(rebuild(list(own)))
        start += work.rows
    return outputs


def count_tokens(group: Sequence[Queued], model: CompiledModel) -> tuple[int, int]:
    """Return the tokens of a run that were asked for, and those that ran; rows where there is no length."""
    items = [queued.item for queued in group if queued.item]
    if len(items) < len(group):  # of no size that the model knows: run as they are
        rows = sum(queued.work.rows for queued in group)
        return rows, rows
    asked = sum(item.rows * max(item.length, 1) for item in items)
    return asked, model.size_run(sum(item.rows for item in items), max(item.length for item in items))


def _move(inputs: Inputs, device: torch.device) -> Inputs:
    return tuple(t.to(device, non_blocking=device.type == "cuda") for t in inputs)
