"""The one thread of a replica that owns the model: it loads, compiles, runs, and copies results out."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from deployments.errors import DeadlineExceeded, ModelFailed, NotReady
from optim import CompiledModel, is_device_error
from optim.errors import describe
from optim.planner import Item, Planner
from optim.shapes import Inputs, cut, measure, pad, take_rows
from optim.tree import flatten

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: The oldest requests that are planned together: a plan takes 10 us a request and should not hold the model up.
_WINDOW = 128


@dataclass(frozen=True, eq=False)
class Work:
    """One request: its inputs with their batch dimension, until when it is wanted, and where its output goes."""

    inputs: Inputs
    rows: int
    deadline: float | None = None
    """On time.monotonic's clock; None is never."""
    future: Future[Any] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, eq=False)
class _Queued:
    """A request in the queue; those with the same key may run together, one without a key runs alone.

    `item` is its size, measured once; None where its tensors have none that the model knows.
    """

    work: Work
    item: Item | None
    key: tuple[Any, ...] | None


@dataclass(frozen=True)
class BatchRecord:
    """One run of the model, for metrics."""

    rows: int
    padding: float
    """The share of what ran that was padding, 0 to 1; in tokens where there are lengths."""
    waits_s: tuple[float, ...]
    """How long each request waited for the run."""
    run_s: float


class ModelThread:
    """Runs jobs and requests one after the other on its own thread.

    CUDA-graph state and torch's configuration belong to a thread, and torch.compile is not thread-safe, so nothing
    else may touch the model. Whenever free, the thread plans all that waits and runs the group that the oldest request
    is in, so nothing starves behind what fits better. `call`, `submit` and `close` may be called from any thread.
    """

    def __init__(self, name: str, on_batch: Callable[[BatchRecord], None] | None = None) -> None:
        self._wake = threading.Condition()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._waiting: deque[_Queued] = deque()
        self._closing = False
        self._model: CompiledModel | None = None
        self._planner: Planner | None = None
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

    def serve(self, model: CompiledModel, planner: Planner | None = None) -> None:
        """Take the model that requests are run with; call it on the thread, as the last part of a job.

        Requests are put together by `planner`, else by what the model's buckets were measured to cost.
        """
        self._planner = planner or Planner(model.costs)
        self._model = model

    def submit(self, work: Work) -> Future[Any]:
        """Queue a request; its future gets the output with the batch dimension, on the CPU, or its own error."""
        model = self._model
        queued = None if model is None else _look_at(model, work)
        with self._wake:
            if self._closing or queued is None or self.failure:
                raise NotReady(self.failure or "the replica is not ready")
            self._waiting.append(queued)
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
            if not (self._jobs or self._waiting):
                return False
            job, future = self._jobs.popleft() if self._jobs else (None, None)
            waiting = list(self._waiting)
        if job is not None and future is not None:
            _complete(future, job)
            return True
        # Planned without the lock, so that requests can be queued meanwhile; only this thread takes them out.
        group, dropped = self._choose(waiting)
        gone = set(map(id, (*group, *dropped)))
        with self._wake:
            self._waiting = deque(queued for queued in self._waiting if id(queued) not in gone)
        for future in (queued.work.future for queued in dropped):
            if not future.cancelled():
                fail(future, DeadlineExceeded("the deadline passed before the model was free"))
        self._run(group)
        return True

    def _choose(self, waiting: Iterable[_Queued]) -> tuple[list[_Queued], list[_Queued]]:
        """Return what to run now, the oldest request and those planned with it; and what nobody wants any more."""
        now = time.monotonic()
        wanted: list[_Queued] = []
        dropped: list[_Queued] = []
        for queued in waiting:
            deadline = queued.work.deadline
            over = queued.work.future.cancelled() or (deadline is not None and deadline <= now)
            (dropped if over else wanted).append(queued)
        if not wanted or wanted[0].key is None or self._planner is None:
            return wanted[:1], dropped
        peers = [queued for queued in wanted if queued.key == wanted[0].key][:_WINDOW]
        oldest, *_ = self._planner.plan([queued.item for queued in peers if queued.item])  # a key comes with a size
        return [peers[i] for i in oldest.items], dropped

    def _run(self, group: list[_Queued]) -> None:
        group = [queued for queued in group if queued.work.future.set_running_or_notify_cancel()]
        if not group:
            return
        started = time.monotonic()
        try:
            outputs = self._run_together(group)
        except Exception as error:
            self._settle_failure(group, error)
            return
        works = [queued.work for queued in group]
        for work, output in zip(works, outputs, strict=True):
            work.future.set_result(output)
        run_s = time.monotonic() - started
        if self._on_batch is not None:
            waits = tuple(started - work.queued_at for work in works)
            rows = sum(work.rows for work in works)
            try:
                self._on_batch(BatchRecord(rows, self._padding(group), waits, run_s))
            except Exception:  # a metric that cannot be written must not stop the model
                logger.exception("a run could not be counted")

    def _padding(self, group: list[_Queued]) -> float:
        """Return the share of the last run that was padding."""
        assert self._model is not None
        items = [queued.item for queued in group if queued.item]
        if len(items) < len(group):
            return 0.0
        ran = self._model.size_run(sum(item.rows for item in items), max(item.length for item in items))
        return 1 - sum(item.rows * max(item.length, 1) for item in items) / ran

    def _settle_failure(self, group: list[_Queued], error: Exception) -> None:
        """Fail one request with its own error; run several again, each alone, so that only the bad ones fail."""
        if is_device_error(error):
            self._break(error)
            for queued in group:
                fail(queued.work.future, NotReady(f"the device failed: {self.failure}"))
        elif len(group) == 1:
            kind, message = describe(error)
            logger.warning("the model failed on a request: %s: %s", kind, message)
            fail(group[0].work.future, ModelFailed(f"the model failed on this request: {kind}: {message}"))
        else:
            for queued in group:
                if self._failure is not None:
                    fail(queued.work.future, NotReady(f"the device failed: {self.failure}"))
                    continue
                try:
                    queued.work.future.set_result(self._run_together([queued])[0])
                except Exception as own:
                    self._settle_failure([queued], own)

    def _run_together(self, group: list[_Queued]) -> list[Any]:
        """Run the requests as one batch, those of other lengths padded; return each one's output, on the CPU."""
        model = self._model
        assert model is not None
        specs = model.input_specs
        works = [queued.work for queued in group]
        lengths = [queued.item.length if queued.item else 0 for queued in group]
        longest = max(lengths)
        # Copied to the device one by one: from pinned memory that goes on beside what runs there.
        inputs = _move(works[0].inputs, model.device)
        if len(works) > 1:
            same = [pad(specs, _move(w.inputs, model.device), w.rows, longest) for w in works]
            inputs = tuple(
                column[0] if spec.batch_dim is None else torch.cat(column, spec.batch_dim)
                for spec, column in zip(specs, zip(*same, strict=True), strict=True)
            )
        tensors, rebuild = flatten(model(*inputs))
        tensors = [t.cpu() for t in tensors]
        if len(works) == 1:
            return [rebuild(tensors)]
        outputs, start = [], 0
        for work, length in zip(works, lengths, strict=True):
            own = cut(model.output_specs, take_rows(model.output_specs, tensors, start, work.rows), work.rows, length)
            outputs.append(rebuild(list(own)))
            start += work.rows
        return outputs

    def _break(self, error: BaseException) -> None:
        """Stop serving for good: everything that waits is told so, and the health check will fail."""
        self._failure = error
        with self._wake:
            works, jobs = list(self._waiting), list(self._jobs)
            self._waiting.clear()
            self._jobs.clear()
        for future in [*(queued.work.future for queued in works), *(future for _, future in jobs)]:
            fail(future, NotReady(f"the replica cannot serve any more: {self.failure}"))


def _look_at(model: CompiledModel, work: Work) -> _Queued:
    """Return a request with what is needed to plan it."""
    size = measure(model.input_specs, work.inputs)
    may_join = model.report.padding and all(spec.batch_dim is not None for spec in model.input_specs)
    if size is None or not may_join:
        return _Queued(work, size and Item(*size), None)
    key = []
    for spec, tensor in zip(model.input_specs, work.inputs, strict=True):
        free = {spec.batch_dim, *spec.length_dims}
        key.append((tensor.dtype, tuple(size for dim, size in enumerate(tensor.shape) if dim not in free)))
    return _Queued(work, Item(*size), tuple(key))


def _move(inputs: Inputs, device: torch.device) -> Inputs:
    return tuple(t.to(device, non_blocking=device.type == "cuda") for t in inputs)


def _complete(future: Future[Any], job: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except BaseException as error:
        future.set_exception(error)


def fail(future: Future[Any], error: Exception) -> None:
    """Give a future its error, if anybody still waits for it."""
    try:
        future.set_exception(error)
    except InvalidStateError:
        logger.info("a caller had gone away before its request failed: %s", error)
