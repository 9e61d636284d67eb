"""`Replica`: what a replica of any kind of model is to Ray Serve: how it starts, changes, is watched, and ends."""

from __future__ import annotations

import asyncio
import logging
import os
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import aclosing, nullcontext
from typing import Any

import ray
from ray import serve

from deployments.admission import Admission
from deployments.args import ModelArgs
from deployments.asgi_call import Headers, Parts, call_app, call_app_in_parts
from deployments.compile import resources
from deployments.grpc_calls import InferenceServicer
from deployments.host_pool import make_host_pool
from deployments.http import make_app
from deployments.http_host import find_http_host
from deployments.keys import Keys
from deployments.metrics import LateCount, ModelMetrics
from deployments.model_thread import ModelThread
from deployments.outage import comes_first
from deployments.priority import bring_forward_what_serves, last_in_line
from deployments.serve_log import set_log_level, share_serve_log
from deployments.served import Served
from deployments.sharing import ClusterShare
from optim.errors import ConfigError
from optim.report import CompileReport

logger = logging.getLogger(__name__)
#: Places of a replica that arriving bodies leave, where there are enough: for those whose body is there, and for health
#: checks.
_SPARE_PLACES = 32


class Replica(InferenceServicer):
    """One replica: one model, compiled for this replica's device, on one thread; the event loop never touches it.

    Over a handle: `predict`, `report`, and what its kind of model adds.
    """

    _service: Served

    async def __init__(self, args: ModelArgs) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Load, compile and warm up; the replica takes traffic when this returns."""
        share_serve_log()
        # Ray Serve takes the one of the configuration file for derived ones; before anything costs time.
        most = _max_ongoing_requests(args)
        args.check_max_ongoing_requests(most)
        self._args = args
        self._keys = Keys(args.auth, await asyncio.to_thread(find_http_host), os.environ)
        self._metrics = ModelMetrics(args.name or "")
        self._make_model()
        device, threads = own_resources(args)
        self._host_pool = make_host_pool(max(2, threads))
        self._share = ClusterShare()
        self._looking_around: asyncio.Task[None] | None = None
        self._late_count = LateCount(self._metrics.record_batch, self._host_pool)
        self._thread = ModelThread(args.name or "", self._late_count.add)
        first = await asyncio.to_thread(comes_first)
        with nullcontext(False) if first else last_in_line() as waits:
            if first:
                logger.info("the start comes first: nothing serves this model now")
            else:
                logger.info("the start %s other processes", "gives way to" if waits else "does not give way to")
            await asyncio.wrap_future(self._thread.call(lambda: self._load(device, threads)))
        await asyncio.to_thread(bring_forward_what_serves)
        self._record_reports()
        self._admission = Admission(
            args.batching.max_queue,
            args.limits.bytes_in_flight,
            self._seconds_to_drain,
            lambda: self._metrics.count("rejected"),
            max_arriving=max(args.batching.max_queue, most - _SPARE_PLACES),
        )
        self._service = self._make_service()
        self._app = make_app(self._service, self._keys)

    @abstractmethod
    def _make_model(self) -> None:
        """Make what `args` name, without loading it."""

    @abstractmethod
    def _load(self, device: str, threads: int) -> None:
        """Load and compile; runs on the model thread."""

    @abstractmethod
    def _make_service(self) -> Served:
        """Return the service of what was loaded."""

    @abstractmethod
    def _seconds_to_drain(self, rows: int) -> int:
        """Return whole seconds until so many rows, or requests, will have run."""

    @abstractmethod
    def _reports(self) -> Mapping[str, CompileReport]:
        """Return the compile report of each thing that was compiled, by name."""

    def _change(self, args: ModelArgs) -> None:
        """Take over changed settings that a kind of model has of its own."""

    def _record_reports(self) -> None:
        for name, report in self._reports().items():
            self._metrics.record_report(report, name)

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
        self._change(changed)
        set_log_level(log_level)
        logger.info("user_config is in force: %s", user_config)

    async def predict(self, payload: Any, timeout_s: float | None = None) -> Any:
        """Answer one request in the model's own terms: payload in, reply out; DeadlineExceeded after `timeout_s`."""
        return await self._service.predict(payload, timeout_s)

    async def answer(self, method: str, path: str, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
        """Answer an HTTP request that another application hands over; status, headers and body."""
        return await call_app(self._app, method, path, headers, body)

    async def answer_in_parts(self, method: str, path: str, headers: Headers, body: bytes) -> Parts:
        """Answer as `answer` does, as the reply comes: status and headers, and then its body, piece by piece."""
        async with aclosing(call_app_in_parts(self._app, method, path, headers, body)) as parts:
            async for part in parts:
                yield part

    async def report(self) -> dict[str, Any]:
        """Return this replica's compile report."""
        return self._service.report()

    async def check_health(self) -> None:
        """Fail where the model thread is dead or its device broken: Ray then replaces the replica."""
        reports = self._reports()
        self._metrics.record_after_ready([report.after_ready for report in reports.values()])
        if any(report.background in ("compiling", "moving") for report in reports.values()):
            self._record_reports()
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
        thread = getattr(self, "_thread", None)
        if thread is not None:
            await asyncio.to_thread(thread.close)
            self._late_count.close()
        pool = getattr(self, "_host_pool", None)
        if pool is not None:
            pool.shutdown(wait=False)


def own_resources(args: ModelArgs) -> tuple[str, int]:
    """Return the device and the CPU threads that Ray gave this replica."""
    assigned = ray.get_runtime_context().get_assigned_resources()
    return resources(args, assigned.get("CPU", 1), assigned.get("GPU", 0))


def _max_ongoing_requests(args: ModelArgs) -> int:
    """Return the limit that Ray Serve holds this replica to (`serve.batch` reads it from the same place)."""
    try:
        return int(serve.get_replica_context()._deployment_config.max_ongoing_requests)
    except AttributeError as error:  # it is private: another Ray Serve may have another name for it
        logger.warning("max_ongoing_requests cannot be read, the derived one is assumed: %r", error)
        return args.max_ongoing_requests
