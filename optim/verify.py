"""Compiled against eager: dtype, shape, finiteness, and error within a tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optim.tree import flatten

#: Allowed error by dtype, relative to the value plus the tensor's RMS: the figures of torch's own benchmark
#: suite (benchmarks/dynamo/common.py: 1e-3 for float32, 1e-2 for half), half widened for whole networks.
TOLERANCES = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 2e-2,
}
#: How much larger than eager's own the error against a wider dtype may be (torch/_dynamo/utils.py, same()).
RMSE_FACTOR = {torch.float32: 2.0, torch.float16: 3.0, torch.bfloat16: 3.0}
#: Values that are compared at a time; 32 MiB in float64.
_PIECE = 1 << 22


@dataclass(frozen=True)
class Difference:
    """How far an output is from the reference: the largest absolute error, and its RMS over the reference's RMS."""

    max_abs: float = 0.0
    relative: float = 0.0

    def worst(self, other: Difference) -> Difference:
        """Return the larger of the two in each figure."""
        return Difference(max(self.max_abs, other.max_abs), max(self.relative, other.relative))


class Mismatch(Exception):
    """The output is not the reference's; the message says in what.

    It is `undecided` where a wider reference might have shown that eager is as far from the truth, and there was none.
    """

    def __init__(self, message: str, *, undecided: bool = False) -> None:
        super().__init__(message)
        self.undecided = undecided


def compare(
    output: Any,
    reference: Any,
    tolerance: float | None = None,
    exact_reference: Callable[[], Any] | None = None,
) -> Difference:
    """Hold an output against eager's and return the difference found; Mismatch where it is too large.

    `tolerance` replaces the dtype's own. `exact_reference` computes the same outputs in a wider dtype (or None
    where the module cannot), and is called only where the tolerance is exceeded: then the RMSE against it may be up to
    RMSE_FACTOR times eager's own.
    """
    got, _ = flatten(output)
    want, _ = flatten(reference)
    if type(output) is not type(reference) or len(got) != len(want):
        raise Mismatch(
            f"structure: {type(output).__name__} of {len(got)} tensors, eager gives "
            f"{type(reference).__name__} of {len(want)}"
        )
    found = Difference()
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        where = f"output {index}" if len(want) > 1 else "output"
        found = found.worst(_compare_tensor(where, g, w, tolerance, index, exact_reference))
    return found


def _compare_tensor(
    where: str,
    got: torch.Tensor,
    want: torch.Tensor,
    tolerance: float | None,
    index: int,
    exact_reference: Callable[[], Any] | None,
) -> Difference:
    if got.dtype != want.dtype:
        raise Mismatch(f"{where}: dtype {got.dtype}, eager gives {want.dtype}")
    if got.shape != want.shape:
        raise Mismatch(f"{where}: shape {tuple(got.shape)}, eager gives {tuple(want.shape)}")
    if got.numel() == 0:
        return Difference()
    if not want.dtype.is_floating_point and not want.dtype.is_complex:
        wrong = int((got != want).sum())
        if wrong:
            raise Mismatch(f"{where}: {wrong} of {want.numel()} {want.dtype} values differ from eager's")
        return Difference()
    squares, count = 0.0, 0
    for _, w in _finite_pieces(where, got, want):
        squares, count = squares + float(w.abs().square().sum()), count + w.numel()
    if count == 0:
        return Difference()
    rms = math.sqrt(squares / count)
    allowed = tolerance if tolerance is not None else TOLERANCES.get(want.dtype, 1e-3)
    largest, squares, within = 0.0, 0.0, True
    for g, w in _finite_pieces(where, got, want):
        error = (g - w).abs()
        largest, squares = max(largest, float(error.max())), squares + float(error.square().sum())
        limit = allowed * (w.abs() + rms) + torch.finfo(want.dtype).tiny
        within = within and bool((error <= limit).all())
    found = Difference(largest, math.sqrt(squares / count) / max(rms, 1e-30))
    if within:
        return found
    undecided = False
    if exact_reference is not None and want.dtype in RMSE_FACTOR:
        exact = exact_reference()
        undecided = exact is None
        if exact is not None:
            ours = eagers = 0.0
            for g, w, truth in _finite_pieces(where, got, want, flatten(exact)[0][index]):
                ours += float((g - truth).square().sum())
                eagers += float((w - truth).square().sum())
            if math.sqrt(ours) <= RMSE_FACTOR[want.dtype] * math.sqrt(eagers):
                return found
    raise Mismatch(
        f"{where}: error {found.max_abs:.3g} (RMS {found.relative:.3g} of eager's) is over the tolerance {allowed:g}",
        undecided=undecided,
    )


def _pieces(*tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Yield the tensors piece by piece in the widest dtype: whole, they would take twenty times an output's memory."""
    wide = torch.complex128 if tensors[0].dtype.is_complex else torch.float64
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _PIECE):
        yield [tensor[start : start + _PIECE].to(wide) for tensor in flat]


def _finite_pieces(
    where: str, got: torch.Tensor, want: torch.Tensor, *more: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """Yield their pieces where both are finite.

    Mismatch is raised unless what is not finite in either is the same value (NaN, or inf of the same sign) in both.
    """
    for parts in _pieces(got, want, *more):
        g, w = parts[:2]
        odd = ~(torch.isfinite(g) & torch.isfinite(w))
        if bool(odd.any()):
            if not torch.equal(torch.nan_to_num(g[odd], nan=0.5), torch.nan_to_num(w[odd], nan=0.5)):
                counts = [sum(int((~torch.isfinite(p)).sum()) for (p,) in _pieces(tensor)) for tensor in (got, want)]
                raise Mismatch(f"{where}: {counts[0]} values are not finite where eager has {counts[1]}")
            if not torch.equal(torch.isnan(g), torch.isnan(w)):
                raise Mismatch(f"{where}: NaN in other places than eager's")
            parts = [part[~odd] for part in parts]
        if parts[0].numel():
            yield parts


def other_data(inputs: Sequence[torch.Tensor], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return inputs of the same shapes with different values, each value one that the input could have held.

    A second replay with different data finds stale buffers and values baked in by tracing. Numbers are scaled and
    shuffled, whole numbers and booleans shuffled, so their range stays what the example showed.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(_shuffle(tensor, generator) for tensor in inputs)


def _shuffle(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    flat = tensor.detach().reshape(-1)
    # torch has no index of these; their bits are moved as those of signed ones.
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}.get(tensor.dtype)
    mixed = (flat[order] if signed is None else flat.view(signed)[order].view(tensor.dtype)).reshape(tensor.shape)
    if tensor.dtype.is_floating_point:
        scale = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
        noise = 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        return (mixed * scale.to(mixed) + noise.to(mixed)).to(tensor.dtype)
    return mixed
