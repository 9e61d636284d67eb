"""A model served in this process, without Ray: the replica's parts put together as deployments.deployment does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deployments.admission import Admission
from deployments.args import ModelArgs
from deployments.host_pool import make_host_pool
from deployments.model_thread import ModelThread
from deployments.queue import Work
from deployments.service import ModelService
from optim import CompiledModel, compile_model
from optim.shapes import Inputs


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
        yield ModelService(parsed, servable, model, run, pool, admission, lambda: thread.failure)
        thread.close()
