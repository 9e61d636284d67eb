"""The threads of a replica that own the model: they load, compile, run, and copy results out."""

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

from deployments.batch import BatchRecord, count_tokens, run_together
from deployments.errors import DeadlineExceeded, ModelFailed, NotReady
from deployments.queue import Queued, RequestQueue, Work
from optim import CompiledModel, is_device_error
from optim.device import give_memory_back, set_threads
from optim.errors import describe, is_out_of_memory, let_go
from optim.planner import Item, Planner

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Turn:
    """What a thread does next: a job, a run, or to answer those who waited too long; the last one ends it."""

    job: tuple[Callable[[], Any], Future[Any]] | None = None
    group: list[Queued] = field(default_factory=list)
    dropped: list[Queued] = field(default_factory=list)
    is_last: bool = False


class ModelThread:
    """Runs jobs and requests on its own thread, and requests on streams beside each other where that is sooner.

    CUDA-graph state and torch's configuration belong to a thread, and torch.compile is not thread-safe, so nothing
    else may touch the model. Streams are for code that several threads may run (`CompiledModel.streams`); while one of
    them runs, the model thread does not. Whoever is free takes the group that the oldest request is in, planned anew
    over all that waits. `call`, `submit` and `close` may be called from any thread.
    """

    def __init__(self, name: str, on_batch: Callable[[BatchRecord], None] | None = None) -> None:
        self._name = name
        # One lock, and two conditions on it: for the model thread, and for the streams.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._wake_stream = threading.Condition(self._lock)
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._queue: RequestQueue | None = None
        self._model: CompiledModel | None = None
        self._is_running = False
        """Whether the model thread has a job or a run."""
        self._busy_streams = 0
        self._closing = False
        self._failure: BaseException | None = None
        self._on_batch = on_batch
        self._threads: list[threading.Thread] = []
        self._start(f"model-{name}", self._step)

    @property
    def failure(self) -> str | None:
        """Why the thread cannot serve any more, or None: a dead thread or a broken device."""
        if self._failure is not None:
            return "{}: {}".format(*describe(self._failure))
        if not all(thread.is_alive() for thread in self._threads):
            return "the model thread is dead"
        return None

    def call(self, job: Callable[[], T]) -> Future[T]:
        """Run a function on the thread, before the requests that wait and beside no stream."""
        future: Future[T] = Future()
        with self._lock:
            if self._closing or self.failure:
                raise NotReady(self.failure or "the replica is stopping")
            self._jobs.append((job, future))
            self._wake.notify()
        return future

    def serve(
        self, model: CompiledModel, planner: Planner | None = None, stream_planner: Planner | None = None
    ) -> None:
        """Take the model that requests are run with; call it on the thread, as the last part of a job.

        Requests are put together by the planners, else by what the model's buckets were measured to cost.
        """
        self._model = model
        self._queue = RequestQueue(model, planner, stream_planner)
        self._start_streams(model)

    def look_again(self) -> None:
        """Go by what the model costs now, and use its streams if they are new; call as `serve`."""
        model, queue = self._model, self._queue
        assert model is not None and queue is not None, "serve() comes first"
        with self._lock:
            queue.plan_anew()
        self._start_streams(model)

    def _start_streams(self, model: CompiledModel) -> None:
        streams = model.streams
        if streams is None or len(self._threads) > 1:
            return
        threads = torch.get_num_threads()
        started = threading.Barrier(streams.count + 1)

        def start() -> None:
            set_threads(streams.threads)
            started.wait()

        for number in range(streams.count):
            self._start(f"model-{self._name}-stream-{number}", self._stream_step, start)
        started.wait()
        set_threads(threads)  # threads to come begin with the number that was set last

    def submit(self, work: Work) -> Future[Any]:
        """Queue a request; its future gets the output with the batch dimension, on the CPU, or its own error."""
        queue = self._queue
        queued = None if queue is None else queue.look_at(work)
        with self._lock:
            if self._closing or queue is None or queued is None or self.failure:
                raise NotReady(self.failure or "the replica is not ready")
            queue.put(queued)
            (self._wake_stream if self._busy_streams else self._wake).notify()
        return work.future

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs at the moment."""
        with self._lock:
            return not (self._is_running or self._busy_streams or self._jobs or self._queue)

    def close(self) -> None:
        """Answer what was accepted, then end the threads."""
        with self._lock:
            self._closing = True
            self._wake_all()
        for thread in self._threads:
            thread.join()

    def _start(self, name: str, step: Callable[[], bool], first: Callable[[], None] = lambda: None) -> None:
        def loop() -> None:
            try:
                first()
                with torch.no_grad():
                    while step():
                        pass
            except BaseException as error:
                self._break(error)
                logger.exception("the model thread died")

        thread = threading.Thread(target=loop, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)  # not before: it would be taken for dead

    def _step(self) -> bool:
        """Do one job or one run on all threads; return False when closed and nothing is left."""
        with self._lock:
            self._is_running = False
            while (turn := self._turn()) is None:
                self._wake.wait()
            self._is_running = True
        self._do(turn, self._model)
        return not turn.is_last

    def _stream_step(self) -> bool:
        """Do one run on a stream; return False when closed and nothing is left."""
        assert self._model is not None and self._model.streams is not None
        with self._lock:
            while (turn := self._stream_turn()) is None:
                self._wake_stream.wait()
            if turn.group:
                self._busy_streams += 1
            if self._queue:
                self._wake_stream.notify()
        try:
            self._do(turn, self._model.streams.model)
        finally:
            with self._lock:
                if turn.group:
                    self._busy_streams -= 1
                if not self._busy_streams and (self._jobs or self._queue or self._closing):
                    self._wake.notify()
        return not turn.is_last

    def _turn(self) -> _Turn | None:
        """Return what the model thread does next, or None while that is nothing; call with the lock."""
        if self._busy_streams:
            return None
        if self._jobs:
            return _Turn(job=self._jobs.popleft())
        if not self._queue:
            if self._closing:
                self._wake_all()
            return _Turn(is_last=True) if self._closing else None
        if dropped := self._queue.drop_unwanted():
            return _Turn(dropped=dropped)
        if self._queue.prefers_streams():
            self._wake_stream.notify_all()
            return None
        return _Turn(group=self._queue.take())

    def _stream_turn(self) -> _Turn | None:
        """Return what a stream does next, or None while that is nothing; call with the lock."""
        if not self._queue:
            return _Turn(is_last=True) if self._closing else None
        if self._is_running or self._jobs:
            return None
        if dropped := self._queue.drop_unwanted():
            return _Turn(dropped=dropped)
        if not self._busy_streams and not self._queue.prefers_streams():
            self._wake.notify()
            return None
        return _Turn(group=self._queue.take(on_stream=True))

    def _wake_all(self) -> None:
        self._wake.notify_all()
        self._wake_stream.notify_all()

    def _do(self, turn: _Turn, model: CompiledModel | None) -> None:
        if turn.job is not None:
            error = _complete(turn.job[1], turn.job[0])
            if error is not None and is_device_error(error):
                self._break(error)
        for queued in turn.dropped:
            if not queued.work.future.cancelled():
                fail(queued.work.future, DeadlineExceeded("the deadline passed before the model was free"))
        if model is not None:
            self._run(turn.group, model)

    def _run(self, group: list[Queued], model: CompiledModel) -> None:
        group = [queued for queued in group if queued.work.future.set_running_or_notify_cancel()]
        if not group:
            return
        started = time.monotonic()
        outputs = _try(group, model)
        if isinstance(outputs, Exception):
            self._settle_failure(group, outputs, model)
            return
        works = [queued.work for queued in group]
        for work, output in zip(works, outputs, strict=True):
            work.future.set_result(output)
        run_s = time.monotonic() - started
        if self._on_batch is not None:
            waits = tuple(started - work.queued_at for work in works)
            rows = sum(work.rows for work in works)
            try:
                asked, ran = count_tokens(group, model)
                self._on_batch(BatchRecord(rows, asked, ran, waits, run_s, model is not self._model))
            except Exception:  # a metric that cannot be written must not stop the model
                logger.exception("a run could not be counted")

    def _settle_failure(self, group: list[Queued], error: Exception, model: CompiledModel) -> None:
        """Fail one request with its own error; run several again, each alone, so that only the bad ones fail."""
        broken = _find_broken(group, error, model)
        if broken is not None:
            self._break(broken)
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
                alone = _try([queued], model)
                if isinstance(alone, Exception):
                    self._settle_failure([queued], alone, model)
                else:
                    queued.work.future.set_result(alone[0])

    def _break(self, error: BaseException) -> None:
        """Stop serving for good: everything that waits is told so, and the health check will fail."""
        self._failure = error
        with self._lock:
            waiting, jobs = self._queue.clear() if self._queue else [], list(self._jobs)
            self._jobs.clear()
        for future in [*(queued.work.future for queued in waiting), *(future for _, future in jobs)]:
            fail(future, NotReady(f"the replica cannot serve any more: {self.failure}"))


def _try(group: list[Queued], model: CompiledModel) -> list[Any] | Exception:
    """Return the outputs of a group, or what its run raised: in a handler, the run's memory would stay."""
    try:
        return run_together(group, model)
    except Exception as error:
        return error


def _find_broken(group: list[Queued], error: Exception, model: CompiledModel) -> Exception | None:
    """Return what nothing can be served after, or None where it concerns these requests alone.

    A request may ask for more memory than there is, which says nothing of others: it is to blame as long as the model
    still answers its own example of that size.
    """
    if not is_out_of_memory(error):
        return error if is_device_error(error) else None
    let_go(error)
    items = [queued.item or Item(1) for queued in group]
    try:
        give_memory_back(model.device)
        model.check(sum(item.rows for item in items), max(item.length for item in items))
    except Exception as own:
        return own
    return None


def _complete(future: Future[Any], job: Callable[[], Any]) -> BaseException | None:
    """Run a job for its future; return what it raised, or None."""
    if not future.set_running_or_notify_cancel():
        return None
    try:
        future.set_result(job())
    except BaseException as error:
        future.set_exception(error)
        return error
    return None


def fail(future: Future[Any], error: Exception) -> None:
    """Give a future its error, if anybody still waits for it."""
    try:
        future.set_exception(error)
    except InvalidStateError:
        logger.info("a caller had gone away before its request failed: %s", error)
