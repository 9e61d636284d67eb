"""`Served`: what every kind of model is to the protocols: its name, its limits, whether it can answer."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

from deployments.admission import Admission, Held
from deployments.args import LimitsArgs, ModelArgs
from deployments.errors import ModelNotFound, NotReady, VersionNotFound
from deployments.tensor_info import TensorInfo

T = TypeVar("T")
#: Bytes of JSON that are read sooner (1 ms) than another thread takes over. Python's reader of JSON lets no thread run
#: beside it, but what is done with its lists does.
_SMALL = 64 * 1024


class Served(ABC):
    """A model as the protocols see it; all methods belong to the event loop, host work goes to a pool."""

    #: What the tensor protocols may ask it for.
    inputs: Sequence[TensorInfo] = ()
    outputs: Sequence[TensorInfo] = ()

    def __init__(
        self,
        args: ModelArgs,
        host_pool: Executor,
        admission: Admission,
        failure: Callable[[], str | None] = lambda: None,
        count: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.args = args
        self.name = args.name or ""
        self.version = args.version
        #: When it was made, in seconds since 1970.
        self.started = int(time.time())
        self.admission = admission
        #: What a request may ask for; replaced as a whole by a hot change.
        self.limits: LimitsArgs = args.limits
        #: Says why the model cannot answer any more, or None.
        self.failure = failure
        self._pool = host_pool
        self._count = count

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Return the compile report of the replica that answers."""

    @abstractmethod
    async def predict(self, payload: Any, timeout_s: float | None = None, held: Held | None = None) -> Any:
        """Answer one request in the model's own terms: payload in, reply out; DeadlineExceeded after `timeout_s`.

        `held` are the bytes that are counted for it already.
        """

    def change(self, args: ModelArgs) -> None:
        """Take over changed settings: new requests meet them, those under way keep what they met."""
        self.args, self.limits = args, args.limits

    def check_model(self, name: str, version: str | None = None) -> None:
        """Raise ModelNotFound or VersionNotFound where this is not the model asked for."""
        if name != self.name:
            raise ModelNotFound(f"Model not found: {name}")
        if version is not None and version != self.version:
            raise VersionNotFound(f"Model version: {version} does not exist for model: {name}")

    def check_ready(self) -> None:
        """Raise NotReady where the model cannot answer any more."""
        failure = self.failure()
        if failure is not None:
            raise NotReady(failure)

    async def aside(self, size: int, work: Callable[..., T], *given: Any) -> T:
        """Return what host work on `size` bytes gives: on the pool where they are many, to leave the loop free."""
        if size <= _SMALL:
            return work(*given)
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *given))

    def _seconds(self, timeout_s: float | None) -> float | None:
        """Return the time of a request: the caller's, else the configured one."""
        return self.limits.timeout_s if timeout_s is None else timeout_s

    def _held(self, held: Held | None) -> AbstractContextManager[Held]:
        """Return the bytes of a request for a block: those that its caller holds, else some of its own."""
        return self.admission.hold_bytes() if held is None else nullcontext(held)
