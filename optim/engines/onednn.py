"""Inductor with float32 linear layers by oneDNN: what it does for bfloat16 ones, and ahead of time, anyway.

With weights frozen it packs float32 ones for MKL, which on CPUs that are not Intel's is slow for few rows: on an AMD
EPYC (AVX2, 2 threads) the products of an 88M decoder took 51 ms for 8 rows against oneDNN's 17 (and 18 to 14 for one).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from optim.engines.base import EngineJob, Unavailable
from optim.engines.inductor import TorchCompileEngine

#: Of a module's parameters those that must be float32 linear layers', for it to be worth an engine of its own.
_LEAST_SHARE = 0.5


class OneDnnEngine(TorchCompileEngine):
    """Compiles with Inductor, weights frozen, and oneDNN in MKL's place."""

    def __init__(self, job: EngineJob) -> None:
        super().__init__(job, name="inductor-onednn", freeze=True)

    def preflight(self) -> None:
        """Refuse modules for which the code would be Inductor's own."""
        super().preflight()
        module = self.job.module
        linear = {
            id(m.weight): m.weight.numel()
            for m in module.modules()
            if isinstance(m, nn.Linear) and m.weight.dtype == torch.float32
        }
        total = sum(parameter.numel() for parameter in module.parameters())
        if sum(linear.values()) < _LEAST_SHARE * max(total, 1):
            raise Unavailable("most of its parameters are not those of float32 linear layers, so it is `inductor`")
        if not torch.backends.mkldnn.is_available():
            raise Unavailable("this torch has no oneDNN")
        _packer()

    @contextmanager
    def building(self) -> Iterator[None]:
        """Pack as for half precision, which Inductor has oneDNN for; on this thread nothing else compiles meanwhile."""
        packer = _packer()
        pack_weight, pack = packer.pack_linear_weight, packer.pack_linear

        # Both are told whether the weight is of half precision, which decides this and nothing else.
        def pack_weight_with_onednn(self: Any, graph: Any, is_half: bool, *rest: Any) -> Any:
            return pack_weight(self, graph, True, *rest)

        def pack_with_onednn(self: Any, graph: Any, is_half: bool, *rest: Any) -> Any:
            return pack(self, graph, True, *rest)

        with (
            patch.object(packer, "pack_linear_weight", pack_weight_with_onednn),
            patch.object(packer, "pack_linear", pack_with_onednn),
            super().building(),
        ):
            yield

    def _cache_key_tag(self) -> str:
        return f"{super()._cache_key_tag()}/onednn"


def _packer() -> Any:
    """Return Inductor's class that chooses how linear layers are packed; Unavailable where this torch has none."""
    from torch._inductor.fx_passes import mkldnn_fusion

    packer = getattr(mkldnn_fusion, "CpuMkldnnDeviceOp", None)
    if not (hasattr(packer, "pack_linear_weight") and hasattr(packer, "pack_linear")):
        raise Unavailable(f"torch {torch.__version__} packs linear layers in another way")
    return packer
