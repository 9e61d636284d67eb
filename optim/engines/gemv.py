"""Inductor with the products of one row in loops of its own, into which it fuses what is around them.

One row's products do little but read the weights. In huge pages (`optim/pages.py`) such loops read them as fast as
the memory can (a 102M decoder in float32, two threads of an Intel Xeon: 13.4 ms, by MKL 14.9); in small ones they are
slower than MKL, so they race. On a GPU Inductor does it under `coordinate_descent_tuning`, on a CPU never.
"""

from __future__ import annotations

import torch
from torch import nn

from optim.buckets import Bucket
from optim.engines.base import EngineJob, Unavailable
from optim.engines.inductor import TorchCompileEngine
from optim.engines.linear import replace_linear, require_linear

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GemvEngine(TorchCompileEngine):
    """Compiles buckets of one row with Inductor, products of one row as sums of products; nothing is frozen."""

    def __init__(self, job: EngineJob) -> None:
        super().__init__(job, name="inductor-gemv", freeze=False, prepare=_write_out)

    def preflight(self) -> None:
        """Refuse modules for which it is not worth it."""
        super().preflight()
        if self.job.autocast:
            raise Unavailable("its products are not under autocast")
        require_linear(self.job, _DTYPES, "are written out for one row")
        if all(bucket.batch_size > 1 for bucket in self.job.samples):
            raise Unavailable("products are written out for one row, and no bucket has one")

    def check_bucket(self, bucket: Bucket) -> None:
        """Refuse more rows, whose products are better left to a library."""
        if bucket.batch_size > 1:
            raise Unavailable("products are written out for one row")


class _RowLinear(nn.Module):
    """A linear layer that multiplies one row in a way that Inductor makes a loop of."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() != x.shape[-1]:
            return nn.functional.linear(x, self.weight, self.bias)
        found = (x.reshape(-1) * self.weight).sum(-1)
        return (found if self.bias is None else found + self.bias).view(*x.shape[:-1], -1)


def _write_out(job: EngineJob) -> nn.Module:
    return replace_linear(job.module, _DTYPES, _RowLinear)
