"""The Ray Serve deployment: compiles in `__init__` on the model thread, batches with `@serve.batch`, answers."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray import serve

from deployments.admission import Admission
from deployments.args import ModelArgs
from deployments.asgi_call import Headers, call_app
from deployments.compile import compile_servable, resources
from deployments.grpc import InferenceServicer
from deployments.host_pool import make_host_pool
from deployments.http import make_app
from deployments.http_host import find_http_host
from deployments.keys import Keys
from deployments.metrics import ModelMetrics
from deployments.model_thread import ModelThread, fail
from deployments.priority import bring_forward_what_serves, last_in_line, thread_last_in_line
from deployments.queue import Work
from deployments.service import ModelService
from deployments.sharing import ClusterShare
from optim import CompiledModel
from optim.errors import ConfigError
from optim.shapes import Inputs

logger = logging.getLogger(__name__)
_LOGGERS = ("optim", "deployments")
#: Places of a replica that arriving bodies leave, where there are enough: for those whose body is there, and for health
#: checks.
_SPARE_PLACES = 32


@serve.ingress()
class ModelReplica(InferenceServicer):
    """One replica: one model, compiled for this replica's device, on one thread.

    The event loop never touches the module. Over a handle: `predict`, `infer`, `report`.
    """

    async def __init__(self, args: ModelArgs) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Load, compile and warm up; the replica takes traffic when this returns."""
        _share_serve_log()
        # Ray Serve takes the one of the configuration file for derived ones; before anything costs time.
        args.check_max_ongoing_requests(_max_ongoing_requests())
        self._args = args
        self._keys = Keys(args.auth, await asyncio.to_thread(find_http_host), os.environ)
        self._metrics = ModelMetrics(args.name or "")
        self._servable = args.make_servable()
        self._host_pool = make_host_pool(max(2, _own_resources(args)[1]))
        self._share = ClusterShare()
        self._looking_around: asyncio.Task[None] | None = None
        self._thread = ModelThread(args.name or "", self._metrics.record_batch)
        with last_in_line() as waits:
            logger.info("the start %s other processes", "gives way to" if waits else "does not give way to")
            self._model = await asyncio.wrap_future(self._thread.call(self._load))
        await asyncio.to_thread(bring_forward_what_serves)
        self._metrics.record_report(self._model.report)
        self._admission = Admission(
            args.batching.max_queue,
            args.limits.bytes_in_flight,
            self._seconds_to_drain,
            lambda: self._metrics.count("rejected"),
            max_arriving=max(args.batching.max_queue, _max_ongoing_requests() - _SPARE_PLACES),
        )
        self._service = ModelService(
            args,
            self._servable,
            self._model,
            self._run,
            self._host_pool,
            self._admission,
            lambda: self._thread.failure,
            self._metrics.count,
        )
        self._app = make_app(self._service, self._keys)
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
            loop.call_soon_threadsafe(self._metrics.record_report, self._model.report)

        try:
            background.run(between_runs, thread_last_in_line)
            tell()
        except Exception:  # the replica is stopping, or its device broke: the model thread says so itself
            logger.exception("compiling in the background has ended")

    def _load(self) -> CompiledModel:
        """Load and compile; runs on the model thread."""
        model = compile_servable(self._servable, self._args, *_own_resources(self._args), [self._share])
        self._thread.serve(model)
        return model

    async def _run(self, inputs: Inputs, rows: int, deadline: float | None) -> Any:
        """Run one request; a caller that goes away takes it out of the queue."""
        work = Work(inputs, rows, deadline)
        try:
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

    async def reconfigure(self, user_config: Any) -> None:
        """Take over a changed `user_config`; one with a mistake is refused, and everything stays as it was.

        It never raises: Ray Serve would stop a healthy replica.
        """
        try:
            changed, log_level = self._args.with_user_config(user_config)
        except ConfigError as error:
            self._metrics.count("refused")
            logger.error("the change of user_config is refused, the settings before stay: %s", error)
            return
        self._admission.max_rows = changed.batching.max_queue
        self._admission.max_bytes = changed.limits.bytes_in_flight
        self._service.change(changed)
        self._enter_batch.set_batch_wait_timeout_s(changed.batching.wait_ms / 1e3)  # type: ignore[attr-defined]
        _set_log_level(log_level)
        logger.info("user_config is in force: %s", user_config)

    async def predict(self, payload: Any, timeout_s: float | None = None) -> Any:
        """Answer one request in the servable's own terms: payload in, reply out; DeadlineExceeded after `timeout_s`."""
        return await self._service.predict(payload, timeout_s)

    async def infer(self, tensors: dict[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """Run tensors with a batch dimension through the model; arrays by name in and out."""
        return await self._service.infer(tensors, timeout_s)

    async def answer(self, method: str, path: str, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
        """Answer an HTTP request that another application hands over; status, headers and body."""
        return await call_app(self._app, method, path, headers, body)

    async def report(self) -> dict[str, Any]:
        """Return this replica's compile report."""
        return self._model.report.to_dict()

    async def check_health(self) -> None:
        """Fail where the model thread is dead or its device broken: Ray then replaces the replica."""
        self._metrics.record_after_ready(self._model.report.after_ready)
        if self._model.report.background in ("compiling", "moving"):
            self._metrics.record_report(self._model.report)
        if self._thread.failure is not None:
            raise RuntimeError(self._thread.failure)
        # Not waited for: a keeper that does not answer must not make this replica look ill.
        if self._looking_around is None or self._looking_around.done():
            self._looking_around = asyncio.create_task(asyncio.to_thread(self._look_around))

    def _look_around(self) -> None:
        """Do what is due now and then."""
        self._keys.refresh()  # first: a key that was taken back must not wait for the others
        bring_forward_what_serves()  # those that Ray Serve has started since
        self._share.publish()

    def __serve_build_asgi_app__(self) -> Any:
        """Return the HTTP application; Ray Serve calls it when the replica is ready."""
        return self._app

    async def __del__(self) -> None:
        """Answer what was accepted, then end the threads; Ray Serve calls it once requests have drained."""
        model = getattr(self, "_model", None)
        if model is not None and model.background is not None:
            model.background.stop()
        thread = getattr(self, "_thread", None)
        if thread is not None:
            await asyncio.to_thread(thread.close)
        pool = getattr(self, "_host_pool", None)
        if pool is not None:
            pool.shutdown(wait=False)


def make_deployment(args: ModelArgs) -> serve.Deployment:
    """Return the deployment of a model, with the options that its batching implies."""
    decorate = serve.deployment(
        name=str(args.name),
        max_ongoing_requests=args.max_ongoing_requests,
        health_check_period_s=5,
    )
    return decorate(ModelReplica)


def _own_resources(args: ModelArgs) -> tuple[str, int]:
    """Return the device and the CPU threads that Ray gave this replica."""
    assigned = ray.get_runtime_context().get_assigned_resources()
    return resources(args, assigned.get("CPU", 1), assigned.get("GPU", 0))


def _max_ongoing_requests() -> int:
    """Return the limit that Ray Serve holds this replica to (`serve.batch` reads it from the same place)."""
    return int(serve.get_replica_context()._deployment_config.max_ongoing_requests)


def _set_log_level(level: str | None) -> None:
    """Set how much we log; None is Ray Serve's own level."""
    for ours in map(logging.getLogger, _LOGGERS):
        ours.setLevel(level or logging.getLogger("ray.serve").level)


def _share_serve_log() -> None:
    """Send what `optim` and `deployments` log to where Ray Serve logs."""
    serve_logger = logging.getLogger("ray.serve")
    _set_log_level(None)
    for ours in map(logging.getLogger, _LOGGERS):
        ours.propagate = False
        for handler in serve_logger.handlers:
            if handler not in ours.handlers:
                ours.addHandler(handler)
