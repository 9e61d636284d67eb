"""IPEX: channels_last where there are convolutions, `ipex.optimize`, then traced and frozen."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optim.buckets import Bucket
from optim.device import import_ipex
from optim.engines.base import Engine, EngineJob, FlatModule, Runner, Unavailable, require, require_precision
from optim.engines.eager import has_convolutions, to_channels_last
from optim.engines.tracing import fold_padding, require_traceable


class IpexEngine(Engine):
    """Traces the optimised module once a bucket; `ipex.optimize` alone gave 1.3x on a CNN, traced and frozen 2.6x."""

    name = "ipex"
    takes_calls_at_once = True

    def __init__(self, job: EngineJob) -> None:
        super().__init__(job)
        self._optimized: nn.Module | None = None
        self._channels_last = has_convolutions(job.module)

    def preflight(self) -> None:
        """Look for IPEX, bf16 if asked for, and for Python code that a trace would freeze."""
        require(self.job.info, "ipex")
        require_precision(self.job)
        if isinstance(self.job.module, torch.jit.ScriptModule):
            raise Unavailable("the module is TorchScript already, which ipex.optimize does not take")
        require_traceable(self.job)

    def build(self) -> None:
        """Optimise a copy of the module: eager stays what it was."""
        self._optimized = FlatModule(optimize(self.job), self.job).eval()

    def compile(self, bucket: Bucket) -> Runner:
        """Trace and freeze for one bucket; the first calls run TorchScript's and oneDNN's own optimisations."""
        assert self._optimized is not None, "build() comes first"
        sample = self._convert(self.job.samples[bucket])
        with warnings.catch_warnings(), torch.no_grad():
            # Shapes read as Python numbers are right for this bucket, and values were looked for in preflight.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated, IPEX has no other way
            traced = torch.jit.trace(self._optimized, sample, check_trace=False, strict=False)
            frozen = torch.jit.freeze(traced.eval())
            fold_padding(frozen.graph)
        convert, rebuild = self._convert, self.job.rebuild

        def run(*inputs: torch.Tensor) -> Any:
            return rebuild(frozen(*convert(inputs)))

        return run

    @contextmanager
    def building(self) -> Iterator[None]:
        """Keep IPEX from warning, at each bucket's first run, that it will drop the JIT path some day."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="JIT pass will be deprecated", category=UserWarning)
            yield

    def _convert(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return to_channels_last(inputs) if self._channels_last else inputs

    def close(self) -> None:
        """Drop the optimised copy; traces go with what runs them."""
        self._optimized = None


def optimize(job: EngineJob, *, prepack: bool = True) -> nn.Module:
    """Return a copy of the module after `ipex.optimize`, channels_last where it has convolutions.

    `prepack` lays weights out for oneDNN now; IPEX's torch.compile backend does that itself.
    """
    ipex = import_ipex()
    module = copy.deepcopy(job.module)
    if has_convolutions(module):
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = torch.bfloat16 if job.autocast else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it cannot optimise, and its own deprecations
        optimized: nn.Module = ipex.optimize(module.eval(), dtype=dtype, inplace=True, weights_prepack=prepack)
    return optimized
