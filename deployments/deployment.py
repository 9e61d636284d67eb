"""The Ray Serve deployments: of a servable, which batches with `@serve.batch`, and of a model that generates text."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ray import serve

from deployments.args import ModelArgs, find_model
from deployments.compile import compile_servable
from deployments.generate import TextGenerator
from deployments.generator_replica import GeneratorReplica
from deployments.model_thread import fail
from deployments.priority import thread_last_in_line
from deployments.queue import Work
from deployments.replica import Replica
from deployments.service import ModelService
from optim import CompiledModel
from optim.report import CompileReport
from optim.shapes import Inputs

logger = logging.getLogger(__name__)


@serve.ingress()
class ModelReplica(Replica):
    """A replica of a servable. Over a handle: `predict`, `infer`, `report`."""

    _service: ModelService
    _model: CompiledModel

    async def __init__(self, args: ModelArgs) -> None:  # type: ignore[misc]  # as the base's
        """Load, compile and warm up, and begin to batch."""
        await Replica.__init__(self, args)
        # Made here and not as a decorator: its figures come from the configuration, and it cannot be shared.
        self._enter_batch = serve.batch(
            max_batch_size=max(args.batching.batch_sizes),
            batch_wait_timeout_s=args.batching.wait_ms / 1e3,
            # A batch holds its permit only until it is handed to the model thread, where those that wait merge.
            max_concurrent_batches=2,
        )(self._run_batch)
        if self._model.background is not None:
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._compile_later, args=[loop], name="background", daemon=True).start()

    def _compile_later(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do what a start that answers eager has left; runs on a thread of its own."""
        background = self._model.background
        assert background is not None

        def between_runs(change: Callable[[], None]) -> None:
            def job() -> None:
                change()
                self._thread.look_again()

            self._thread.call(job).result()
            tell()

        def tell() -> None:
            loop.call_soon_threadsafe(self._record_reports)

        try:
            background.run(between_runs, thread_last_in_line)
            tell()
        except Exception:  # the replica is stopping, or its device broke: the model thread says so itself
            logger.exception("compiling in the background has ended")

    def _make_model(self) -> None:
        self._servable = self._args.make_servable()

    def _load(self, device: str, threads: int) -> None:
        self._model = compile_servable(self._servable, self._args, device, threads, [self._share])
        self._thread.serve(self._model)

    def _make_service(self) -> ModelService:
        return ModelService(
            self._args,
            self._servable,
            self._model,
            self._run,
            self._host_pool,
            self._admission,
            lambda: self._thread.failure,
            self._metrics.count,
            lambda: self._thread.is_idle,
        )

    def _reports(self) -> Mapping[str, CompileReport]:
        return {"": self._model.report}

    async def _run(self, inputs: Inputs, rows: int, deadline: float | None) -> Any:
        """Run one request; a caller that goes away takes it out of the queue."""
        work = Work(inputs, rows, deadline)
        try:
            if not self._service.args.batching.wait_ms and self._thread.is_idle:
                # There is nobody to be put together with, and a batch of one costs 0.3 ms (issue 4).
                self._thread.submit(work)
            else:
                await self._enter_batch(work)
            return await work.wait()
        finally:
            work.future.cancel()

    async def _run_batch(self, works: list[Work]) -> list[None]:
        """Hand what arrived together to the model thread; each request then waits for its own outcome."""
        for work in works:
            try:
                self._thread.submit(work)
            except Exception as error:  # one refusal must not fail the batch
                fail(work.future, error)
        return [None] * len(works)

    def _seconds_to_drain(self, rows: int) -> int:
        """Return whole seconds until so many rows will have run, by the measured cost of the largest bucket."""
        largest = max(self._model.report.buckets, key=lambda row: row.batch_size * (row.length or 1))
        per_row_ms = (largest.ms or 0.0) / largest.batch_size
        return max(1, math.ceil(rows * per_row_ms / 1e3))

    def _change(self, args: ModelArgs) -> None:
        self._enter_batch.set_batch_wait_timeout_s(args.batching.wait_ms / 1e3)  # type: ignore[attr-defined]

    async def infer(self, tensors: dict[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """Run tensors with a batch dimension through the model; arrays by name in and out."""
        return await self._service.infer(tensors, timeout_s)

    async def __del__(self) -> None:
        """End what compiles in the background first."""
        model = getattr(self, "_model", None)
        if model is not None and model.background is not None:
            model.background.stop()
        await Replica.__del__(self)


def make_deployment(args: ModelArgs) -> serve.Deployment:
    """Return the deployment of a model, with the options that its batching implies."""
    decorate = serve.deployment(
        name=str(args.name),
        max_ongoing_requests=args.max_ongoing_requests,
        health_check_period_s=5,
    )
    return decorate(GeneratorReplica if issubclass(find_model(args.model), TextGenerator) else ModelReplica)
