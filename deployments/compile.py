"""How a replica's model is compiled: one place, so that compiling ahead does exactly what a replica would."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deployments.args import ModelArgs
from deployments.decoder_functions import Function, make_functions, make_slots
from deployments.generate import TextGenerator
from deployments.generation import Slots
from deployments.servable import Model, Servable
from optim import CompiledModel, Pt2Config, compile_model
from optim.device import pick_device, set_threads
from optim.share import Share

#: Seconds that the race of one function of a decoder may take, where nothing is configured.
_BUDGET_S = 600.0


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


def compile_generator(
    generator: TextGenerator, args: ModelArgs, device: str, threads: int, shares: Sequence[Share] = ()
) -> dict[str, CompiledModel]:
    """Load a generator's decoder and compile its functions, by name; as `compile_servable`."""
    set_threads(threads)
    batching, spans = args.batching, sorted(args.batching.lengths or ())
    decoder = generator.load(pick_device(device), max(batching.batch_sizes))
    decoder.fuse_attention(args.pt2.attention.decode == "math")
    functions = make_functions(decoder, batching.batch_sizes, spans, generator.pieces)
    # Of its own accord no bucket is left out: a step costs what the weights cost, however much its rows look at.
    models = compile_functions(functions, args.pt2, device, batching.token_budget, shares)
    for model in models.values():
        model.report.notes += generator.notes
    return models


def compile_functions(
    functions: Mapping[str, Function],
    pt2: Pt2Config | Any,
    device: str,
    token_budget: int | None = None,
    shares: Sequence[Share] = (),
) -> dict[str, CompiledModel]:
    """Compile the functions of a decoder for the calling thread; all of them share weights and cache."""
    pt2 = Pt2Config.parse(pt2)
    return {
        name: compile_model(
            function.module,
            function.example,
            _for_decoders(pt2, device, function.phase),
            batch_sizes=function.batch_sizes,
            lengths=function.lengths,
            token_budget=token_budget,
            device=device,
            phase=function.phase,
            state=function.state,
            shares=shares,
        )
        for name, function in functions.items()
    }


def _for_decoders(pt2: Pt2Config, device: str, phase: str) -> Pt2Config:
    """Return the configuration with the engines and the budget that suit decoders, where it names none.

    Only Inductor keeps state. Of its variants these have no copy of the weights for each bucket, and torch's caches
    keep their code; frozen ones were no faster in any bucket. A decoder takes 20 s to compile for each of many buckets,
    so that more would use up any budget.
    """
    tune = pt2.tune
    if pt2.compile.backend != "auto":
        return pt2
    freezes = device == "cpu" and pt2.compile.freeze
    for_cpu = ["inductor-onednn", "inductor-unfrozen", *(["inductor-gemv"] if phase == "decode" else [])]
    engines = tune.engines or (for_cpu if freezes else ["inductor"])
    budget_s = _BUDGET_S if tune.budget_s is None else tune.budget_s
    return replace(pt2, tune=replace(tune, engines=engines, budget_s=budget_s))


def slots_of(models: Mapping[str, CompiledModel], generator: TextGenerator, args: ModelArgs) -> Slots:
    """Return the slots that run what `compile_generator` returned."""
    spans = sorted(args.batching.lengths or ())
    device, slots = models["decode"].device, max(args.batching.batch_sizes)
    return make_slots(models, slots, spans, generator.pieces, device, reuse=generator.reuse)


def compile_all(
    model: Model, args: ModelArgs, device: str, threads: int, shares: Sequence[Share] = ()
) -> dict[str, CompiledModel]:
    """Compile what a model of any kind consists of; by name, which is empty where there is one thing only."""
    if isinstance(model, TextGenerator):
        return compile_generator(model, args, device, threads, shares)
    assert isinstance(model, Servable)
    return {"": compile_servable(model, args, device, threads, shares)}


def resources(args: ModelArgs, cpus: float, gpus: float) -> tuple[str, int]:
    """Return the device and the CPU threads of a replica that Ray gives so many CPUs and GPUs."""
    return "cuda" if gpus > 0 else "cpu", args.threads or max(1, math.floor(cpus))
