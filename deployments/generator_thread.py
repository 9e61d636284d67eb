"""`GeneratorThread`: a model thread that steps on while requests generate."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from deployments.errors import ModelFailed, NotReady, RequestError
from deployments.generation import Generation, Slots, Step
from deployments.model_thread import ModelThread
from optim import is_device_error
from optim.errors import describe

logger = logging.getLogger(__name__)
Deliver = Callable[[Step, float], None]
"""Takes a step, and the seconds it took, to those that wait for its events; called on the model thread."""


class GeneratorThread:
    """Hands requests to slots that a model thread steps; `add` may be called from any thread.

    While requests generate the thread has one job, and closing it waits for that: what was accepted is answered.
    """

    def __init__(self, thread: ModelThread, slots: Slots, deliver: Deliver) -> None:
        self._thread = thread
        self._slots = slots
        self._deliver = deliver
        self._lock = threading.Lock()
        self._is_stepping = False

    def add(self, generation: Generation) -> None:
        """Take in a request; NotReady where the thread is ending, or its device failed."""
        with self._lock:
            job = None if self._is_stepping else self._thread.call(self._step_on)
            self._is_stepping = True
            self._slots.add(generation)
        if job is not None:  # not before: it is called at once where the job has ended already
            job.add_done_callback(self._ended)

    def _step_on(self) -> None:
        """Step until nothing is left; runs on the model thread."""
        while self._has_more():
            started = time.monotonic()
            step = self._slots.step()
            self._deliver(step, time.monotonic() - started)

    def _has_more(self) -> bool:
        with self._lock:
            self._is_stepping = len(self._slots) > 0
            return self._is_stepping

    def _ended(self, job: Future[None]) -> None:
        """Tell all that wait, where stepping has ended in an error: of the device, or a bug."""
        error = job.exception()
        if error is None:
            return
        logger.error("generating ended in an error", exc_info=error)
        text = "{}: {}".format(*describe(error))
        found: RequestError = ModelFailed(f"generating failed: {text}")
        if isinstance(error, NotReady):
            found = error
        elif is_device_error(error):
            found = NotReady(f"the device failed: {text}")
        with self._lock:
            self._is_stepping = False
            step = self._slots.fail(found)
        self._deliver(step, 0.0)
