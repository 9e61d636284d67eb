"""Which dimension of which tensor is the batch and which the length, and padding and cutting along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optim.tree import flatten

Inputs = tuple[torch.Tensor, ...]
Example = Callable[[int, int | None], Any]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output tensor: dtype, sizes (-1 where they vary), and the dimensions of batch and length."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    batch_dim: int | None
    length_dims: tuple[int, ...] = ()

    def row_shape(self) -> tuple[int, ...]:
        """Return the shape of one row: without the batch dimension, -1 for the length."""
        return tuple(size for dim, size in enumerate(self.shape) if dim != self.batch_dim)

    def fits(self, tensor: torch.Tensor) -> bool:
        """Say whether a tensor has this dtype and shape, any size taken for the free dimensions."""
        shape = tensor.shape
        if tensor.dtype != self.dtype or len(shape) != len(self.shape):
            return False
        # Several times a request, where all() would take twice as long.
        for want, size in zip(self.shape, shape, strict=True):  # noqa: SIM110
            if want not in (-1, size):
                return False
        return True


def make_specs(
    small: Sequence[torch.Tensor],
    more_rows: Sequence[torch.Tensor] | None,
    longer: Sequence[torch.Tensor] | None,
) -> tuple[TensorSpec, ...]:
    """Find the free dimensions by comparing three examples: a small one, one with more rows, a longer one.

    Raises ValueError where more than one dimension of a tensor follows the number of rows.
    """
    specs = []
    for index, tensor in enumerate(small):
        batch = changed(tensor, more_rows[index]) if more_rows is not None else ()
        length = changed(tensor, longer[index]) if longer is not None else ()
        if len(batch) > 1:
            raise ValueError(f"tensor {index}: dimensions {batch} all change with the batch size; only one may")
        free = {*batch, *length}
        shape = tuple(-1 if dim in free else size for dim, size in enumerate(tensor.shape))
        specs.append(TensorSpec(tensor.dtype, shape, batch[0] if batch else None, length))
    return tuple(specs)


def changed(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    """Return the dimensions in which two tensors differ in size; ValueError where they have not as many."""
    if a.dim() != b.dim():
        raise ValueError(f"a tensor has {a.dim()} dimensions in one example and {b.dim()} in another")
    return tuple(dim for dim in range(a.dim()) if a.shape[dim] != b.shape[dim])


def measure(specs: Sequence[TensorSpec], inputs: Sequence[torch.Tensor]) -> tuple[int, int] | None:
    """Return (rows, length) of inputs that fit the specs, length 0 where there is none; None where they do not fit."""
    if len(inputs) != len(specs) or not all(spec.fits(t) for spec, t in zip(specs, inputs, strict=True)):
        return None
    rows = {t.shape[s.batch_dim] for s, t in zip(specs, inputs, strict=True) if s.batch_dim is not None}
    lengths = {t.shape[dim] for s, t in zip(specs, inputs, strict=True) for dim in s.length_dims}
    if len(rows) > 1 or len(lengths) > 1 or 0 in rows:
        return None
    return (rows.pop() if rows else 1), (lengths.pop() if lengths else 0)


def pad(specs: Sequence[TensorSpec], inputs: Sequence[torch.Tensor], rows: int, length: int) -> Inputs:
    """Bring inputs to a bucket: the last row is repeated (so no value is new to the model), lengths end in zeros."""
    padded = []
    for spec, tensor in zip(specs, inputs, strict=True):
        for dim in spec.length_dims:
            tensor = _extend(tensor, dim, length, zeros=True)
        if spec.batch_dim is not None:
            tensor = _extend(tensor, spec.batch_dim, rows, zeros=False)
        padded.append(tensor)
    return tuple(padded)


def _extend(tensor: torch.Tensor, dim: int, size: int, *, zeros: bool) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    tail = tensor.new_zeros(shape) if zeros else tensor.narrow(dim, tensor.shape[dim] - 1, 1).expand(shape)
    return torch.cat((tensor, tail), dim)


def take_rows(specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor], start: int, rows: int) -> Inputs:
    """Return the given rows of every tensor that has a batch dimension, as views."""
    return tuple(
        t if s.batch_dim is None else t.narrow(s.batch_dim, start, rows) for s, t in zip(specs, tensors, strict=True)
    )


def cut(specs: Sequence[TensorSpec], output: Any, rows: int, length: int) -> Any:
    """Cut the padding off an output: views of its first rows and its first `length` places."""
    tensors, rebuild = flatten(output)
    kept = []
    for spec, tensor in zip(specs, take_rows(specs, tensors, 0, rows), strict=True):
        for dim in spec.length_dims:
            tensor = tensor.narrow(dim, 0, length)
        kept.append(tensor)
    return rebuild(kept)


def join(specs: Sequence[TensorSpec], outputs: Sequence[Any]) -> Any:
    """Put the outputs of several runs together along the batch dimension."""
    if len(outputs) == 1:
        return outputs[0]
    parts = [flatten(output) for output in outputs]
    rebuild = parts[0][1]
    joined = []
    for index, spec in enumerate(specs):
        pieces = [tensors[index] for tensors, _ in parts]
        joined.append(pieces[0] if spec.batch_dim is None else torch.cat(pieces, spec.batch_dim))
    return rebuild(joined)


def normalize(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on the device, detached, with the strides of a contiguous tensor.

    Dynamo's guards compare strides, those of dimensions of size 1 included (where any stride is contiguous), so
    every input has to come with the strides that warm-up showed.
    """
    tensor = tensor.detach().to(device).contiguous()
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= max(size, 1)
    wanted = tuple(reversed(strides))
    return tensor if tensor.stride() == wanted else tensor.as_strided(tensor.shape, wanted)
