"""How a replica's model is compiled: one place, so that compiling ahead does exactly what a replica would."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deployments.args import ModelArgs
from deployments.servable import Servable
from optim import CompiledModel, compile_model
from optim.device import set_threads
from optim.share import Share


def compile_servable(
    servable: Servable, args: ModelArgs, device: str, threads: int, shares: Sequence[Share] = ()
) -> CompiledModel:
    """Load a servable's module and compile it for the calling thread, as `args` say; `shares` may have its plan."""
    set_threads(threads)
    return compile_model(
        servable.load(),
        servable.example,
        args.pt2,
        batch_sizes=args.batching.batch_sizes,
        lengths=args.batching.lengths,
        token_budget=args.batching.token_budget_on(device),
        device=device,
        streams=args.batching.streams,
        shares=shares,
    )


def resources(args: ModelArgs, cpus: float, gpus: float) -> tuple[str, int]:
    """Return the device and the CPU threads of a replica that Ray gives so many CPUs and GPUs."""
    return "cuda" if gpus > 0 else "cpu", args.threads or max(1, math.floor(cpus))
