"""A model served in this process, without Ray: the replica's parts put together as deployments.deployment does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deployments.admission import Admission
from deployments.args import ModelArgs
from deployments.compile import compile_generator, slots_of
from deployments.generate import TextGenerator
from deployments.generation_service import GenerationService
from deployments.generator_thread import GeneratorThread
from deployments.host_pool import make_host_pool
from deployments.model_thread import ModelThread
from deployments.queue import Work
from deployments.service import ModelService
from optim import CompiledModel, compile_model
from optim.shapes import Inputs


@contextmanager
def generate_locally(args: dict[str, Any]) -> Iterator[GenerationService]:
    """Yield the service of a model that generates; its thread runs until the end."""
    parsed = ModelArgs.parse(args)
    generator = parsed.make_model()
    assert isinstance(generator, TextGenerator)
    thread = ModelThread("local")
    models = thread.call(lambda: compile_generator(generator, parsed, "cpu", 1)).result()
    slots = slots_of(models, generator, parsed)
    admission = Admission(parsed.batching.max_queue, parsed.limits.bytes_in_flight)
    found: list[GenerationService] = []
    generating = GeneratorThread(thread, slots, lambda *what: found[0].deliver(*what))
    with make_host_pool() as pool:
        found.append(
            GenerationService(parsed, generator, models, generating.add, pool, admission, lambda: thread.failure)
        )
        found[0].slots_in_use = lambda: len(slots)  # type: ignore[attr-defined]
        found[0].running = slots  # type: ignore[attr-defined]
        yield found[0]
        thread.close()


@contextmanager
def serve_locally(args: dict[str, Any]) -> Iterator[ModelService]:
    """Yield the service of a model; its thread runs until the end."""
    parsed = ModelArgs.parse(args)
    servable = parsed.make_servable()
    thread = ModelThread("local")

    def load() -> None:
        batching = parsed.batching
        model = compile_model(
            servable.load(),
            servable.example,
            parsed.pt2,
            batch_sizes=batching.batch_sizes,
            lengths=batching.lengths,
            token_budget=batching.token_budget_on("cpu"),
            device="cpu",
        )
        thread.serve(model)
        thread.model = model  # type: ignore[attr-defined]

    async def run(inputs: Inputs, rows: int, deadline: float | None) -> Any:
        work = Work(inputs, rows, deadline)
        thread.submit(work)
        return await work.wait()

    thread.call(load).result()
    with make_host_pool() as pool:
        admission = Admission(parsed.batching.max_queue, parsed.limits.bytes_in_flight)
        model: CompiledModel = thread.model  # type: ignore[attr-defined]
        yield ModelService(
            parsed,
            servable,
            model,
            run,
            pool,
            admission,
            lambda: thread.failure,
            is_idle=lambda: thread.is_idle,
        )
        thread.close()
