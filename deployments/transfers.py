"""Numbers to a GPU and back without waiting for what it does meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of Python's numbers on the device; pinned first, else the copy waits for all that is queued."""
    made = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


class ToHost:
    """Tensors of one device on their way to the CPU: copied behind what a GPU has queued now, and nothing later."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # into pinned memory
        self._done: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[torch.Tensor]:
        """Return the copies."""
        if self._done is not None:
            self._done.synchronize()
        return self._copies
