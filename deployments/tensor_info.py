"""`TensorInfo`: a model's inputs and outputs as the tensor protocols name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deployments.errors import BadRequest
from optim.shapes import TensorSpec


@dataclass(frozen=True)
class TensorInfo:
    """A named input or output: dtype and shape, -1 for free dimensions."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def name_tensors(names: Sequence[str] | None, specs: tuple[TensorSpec, ...], kind: str) -> tuple[TensorInfo, ...]:
    """Return what tensors are called and look like; numbered ones (`input_0`) where there are not enough names."""
    given = list(names or [])
    if len(given) != len(specs):
        given = [f"{kind}_{i}" for i in range(len(specs))]
    return tuple(TensorInfo(name, spec.dtype, spec.shape) for name, spec in zip(given, specs, strict=True))


def misfit(info: TensorInfo, shape: tuple[int, ...], tensor: torch.Tensor) -> BadRequest:
    """Return the error for a tensor that is not of the input's dtype, or not of this shape."""
    expected = f"{_short(info.dtype)} {list(shape)}"
    return BadRequest(f"input {info.name}: expected {expected}, got {_short(tensor.dtype)} {list(tensor.shape)}")


def check_range(name: str, tensor: torch.Tensor, low: float, high: float) -> None:
    """Raise BadRequest where a tensor of whole numbers, on the CPU, has one below `low`, or not below `high`."""
    values = tensor.numpy()  # torch has no least and greatest of uint16 and wider
    if not values.size:
        return
    for value in (int(values.min()), int(values.max())):
        if not low <= value < high:
            raise BadRequest(f"input {name}: {value} is not allowed; use whole numbers from {low:g}, below {high:g}")


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor on the CPU as an array; bfloat16, which NumPy has not, as float32."""
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
