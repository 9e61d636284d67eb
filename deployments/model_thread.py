"""The one thread of a replica that owns the model: it loads, compiles, runs, and copies results out."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from deployments.errors import ModelFailed, NotReady
from optim import CompiledModel, is_device_error
from optim.errors import describe
from optim.shapes import Inputs, take_rows
from optim.tree import flatten

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """One request: its inputs with their batch dimension, and where its output goes."""

    inputs: Inputs
    rows: int
    future: Future[Any] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class BatchRecord:
    """One run of the model, for metrics."""

    requests: int
    rows: int
    wait_s: float
    run_s: float


class ModelThread:
    """Runs jobs and requests one after the other on its own thread.

    CUDA-graph state and torch's configuration belong to a thread, and torch.compile is not thread-safe, so nothing
    else may touch the model. Whenever free, the thread takes everything that waits, oldest first, up to the largest
    bucket. `call`, `submit` and `close` may be called from any thread.
    """

    def __init__(self, name: str, on_batch: Callable[[BatchRecord], None] | None = None) -> None:
        self._wake = threading.Condition()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._waiting: deque[Work] = deque()
        self._closing = False
        self._model: CompiledModel | None = None
        self._failure: BaseException | None = None
        self._on_batch = on_batch
        self._thread = threading.Thread(target=self._loop, name=f"model-{name}", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why the thread cannot serve any more, or None: a dead thread or a broken device."""
        if self._failure is not None:
            return "{}: {}".format(*describe(self._failure))
        if not self._thread.is_alive():
            return "the model thread is dead"
        return None

    def call(self, job: Callable[[], T]) -> Future[T]:
        """Run a function on the thread, before the requests that wait."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing or self.failure:
                raise NotReady(self.failure or "the replica is stopping")
            self._jobs.append((job, future))
            self._wake.notify()
        return future

    def serve(self, model: CompiledModel) -> None:
        """Take the model that requests are run with; call it on the thread, as the last part of a job."""
        self._model = model

    def submit(self, work: Work) -> Future[Any]:
        """Queue a request; its future gets the output with the batch dimension, on the CPU, or its own error."""
        with self._wake:
            if self._closing or self._model is None or self.failure:
                raise NotReady(self.failure or "the replica is not ready")
            self._waiting.append(work)
            self._wake.notify()
        return work.future

    def close(self) -> None:
        """Answer what was accepted, then end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _loop(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:
            self._break(error)
            logger.exception("the model thread died")

    def _step(self) -> bool:
        """Do one job or one batch; return False when closed and nothing is left."""
        with self._wake:
            while not (self._jobs or self._waiting or self._closing):
                self._wake.wait()
            if self._jobs:
                job, future = self._jobs.popleft()
                works = []
            elif self._waiting:
                works = self._take()
            else:
                return False
        if works:
            self._run(works)
        else:
            _complete(future, job)
        return True

    def _take(self) -> list[Work]:
        """Take the oldest request and those behind it that can join it; the lock is held."""
        assert self._model is not None
        first = self._waiting.popleft()
        works, rows = [first], first.rows
        limit, key = self._max_rows(self._model), self._key(self._model, first)
        kept: deque[Work] = deque()
        while self._waiting and rows < limit:
            work = self._waiting.popleft()
            if self._key(self._model, work) == key and rows + work.rows <= limit:
                works.append(work)
                rows += work.rows
            else:
                kept.append(work)
        kept.extend(self._waiting)
        self._waiting = kept
        return works

    @staticmethod
    def _max_rows(model: CompiledModel) -> int:
        """Return the rows of the largest batch; 0 where rows depend on their neighbours, so none may be joined."""
        if not model.report.padding or any(spec.batch_dim is None for spec in model.input_specs):
            return 0
        return model.max_batch_size

    @staticmethod
    def _key(model: CompiledModel, work: Work) -> tuple[Any, ...]:
        """Return what requests must share to be run together: dtypes, and shapes without the batch dimension."""
        return tuple(
            (tensor.dtype, tuple(size for dim, size in enumerate(tensor.shape) if dim != spec.batch_dim))
            for spec, tensor in zip(model.input_specs, work.inputs, strict=True)
        )

    def _run(self, works: list[Work]) -> None:
        works = [work for work in works if work.future.set_running_or_notify_cancel()]
        if not works:
            return
        started = time.perf_counter()
        try:
            outputs = self._run_together(works)
        except Exception as error:
            self._settle_failure(works, error)
            return
        for work, output in zip(works, outputs, strict=True):
            work.future.set_result(output)
        if self._on_batch is not None:
            rows = sum(work.rows for work in works)
            wait_s = started - works[0].queued_at
            self._on_batch(BatchRecord(len(works), rows, wait_s, time.perf_counter() - started))

    def _settle_failure(self, works: list[Work], error: Exception) -> None:
        """Fail one request with its own error; run several again, each alone, so that only the bad ones fail."""
        if is_device_error(error):
            self._break(error)
            for work in works:
                _fail(work.future, NotReady(f"the device failed: {self.failure}"))
        elif len(works) == 1:
            kind, message = describe(error)
            logger.warning("the model failed on a request: %s: %s", kind, message)
            _fail(works[0].future, ModelFailed(f"the model failed on this request: {kind}: {message}"))
        else:
            for work in works:
                if self._failure is not None:
                    _fail(work.future, NotReady(f"the device failed: {self.failure}"))
                    continue
                try:
                    work.future.set_result(self._run_together([work])[0])
                except Exception as own:
                    self._settle_failure([work], own)

    def _run_together(self, works: list[Work]) -> list[Any]:
        """Run the requests as one batch; return each one's output, on the CPU."""
        model = self._model
        assert model is not None
        inputs = works[0].inputs
        if len(works) > 1:
            columns = zip(*(work.inputs for work in works), strict=True)
            inputs = tuple(
                column[0] if spec.batch_dim is None else torch.cat(column, spec.batch_dim)
                for spec, column in zip(model.input_specs, columns, strict=True)
            )
        tensors, rebuild = flatten(model(*inputs))
        tensors = [t.cpu() for t in tensors]
        if len(works) == 1:
            return [rebuild(tensors)]
        outputs, start = [], 0
        for work in works:
            outputs.append(rebuild(take_rows(model.output_specs, tensors, start, work.rows)))
            start += work.rows
        return outputs

    def _break(self, error: BaseException) -> None:
        """Stop serving for good: everything that waits is told so, and the health check will fail."""
        self._failure = error
        with self._wake:
            works, jobs = list(self._waiting), list(self._jobs)
            self._waiting.clear()
            self._jobs.clear()
        for future in [*(work.future for work in works), *(future for _, future in jobs)]:
            _fail(future, NotReady(f"the replica cannot serve any more: {self.failure}"))


def _complete(future: Future[Any], job: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except BaseException as error:
        future.set_exception(error)


def _fail(future: Future[Any], error: Exception) -> None:
    try:
        future.set_exception(error)
    except InvalidStateError:
        logger.info("a caller had gone away before its request failed: %s", error)
