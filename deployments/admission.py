"""`Admission`: what a replica holds at once, in rows and bytes, and the refusal of what is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch

from deployments.errors import Overloaded


class Admission:
    """Counts rows and bytes from a request's arrival to its answer; all methods belong to the event loop.

    A request that finds the replica empty is always let in: its own size is bounded elsewhere. `drain_s` says how many
    seconds a number of rows will take, for Retry-After; `on_refusal` is called for each one.
    """

    def __init__(
        self,
        max_rows: int,
        max_bytes: int,
        drain_s: Callable[[int], int] = lambda rows: 1,
        on_refusal: Callable[[], None] = lambda: None,
        max_arriving: int = 64,
    ) -> None:
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.rows = 0
        self.bytes = 0
        self._drain_s = drain_s
        self._on_refusal = on_refusal
        self._max_arriving = max_arriving
        self._arriving: list[asyncio.Timeout] = []

    def receive(self, seconds: float) -> Arrival:
        """Bound how long a block waits for a body: TimeoutError after `seconds`, or sooner where many arrive at once.

        Ray Serve has given each request that sends a body one of the replica's places already, before any code of
        ours has seen it. So that slow senders cannot hold them all, the one that has been sending longest is cut off
        when another comes and `max_arriving` are.
        """
        return Arrival(self._arriving, self._max_arriving, seconds)

    @contextmanager
    def hold_rows(self, rows: int) -> Iterator[None]:
        """Count rows until the end of the block; Overloaded where they are too many."""
        if self.rows and self.rows + rows > self.max_rows:
            raise self.refuse(f"the queue is full ({self.rows} of {self.max_rows} rows)")
        self.rows += rows
        try:
            yield
        finally:
            self.rows -= rows

    def hold_bytes(self, count: int = 0) -> Held:
        """Count bytes until the end of the block, those added in it too; Overloaded where they are too many."""
        held = Held(self)
        held.add(count)
        return held

    def refuse(self, message: str) -> Overloaded:
        """Count a refusal and return it, to be raised."""
        self._on_refusal()
        return Overloaded(message, self._drain_s(self.rows))


class Arrival:
    """Bounds a block in which a body arrives (`Admission.receive`); `arriving` are those of others, oldest first."""

    def __init__(self, arriving: list[asyncio.Timeout], most: int, seconds: float) -> None:
        self._arriving = arriving
        self._most = most
        self._timer = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timer.__aenter__()
        if len(self._arriving) >= self._most:
            oldest = self._arriving.pop(0)
            if not oldest.expired():
                oldest.reschedule(0)
        self._arriving.append(self._timer)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer in self._arriving:
            self._arriving.remove(self._timer)
        await self._timer.__aexit__(kind, error, trace)


class Held:
    """The bytes that one request holds, until the end of a block."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.bytes = 0

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *ended: object) -> None:
        self.admission.bytes -= self.bytes
        self.bytes = 0

    def add(self, count: int) -> None:
        """Hold more bytes; Overloaded where they are too many."""
        admission = self.admission
        if admission.bytes > self.bytes and admission.bytes + count > admission.max_bytes:
            raise admission.refuse(
                f"requests hold {admission.bytes} bytes; {count} more are over {admission.max_bytes}"
            )
        admission.bytes += count
        self.bytes += count

    @contextmanager
    def more(self, count: int) -> Iterator[None]:
        """Hold more bytes until the end of the block; Overloaded where they are too many."""
        self.add(count)
        try:
            yield
        finally:
            self.admission.bytes -= count
            self.bytes -= count

    def grow_to(self, count: int) -> None:
        """Hold this many bytes in all, if they are more than now."""
        if count > self.bytes:
            self.add(count - self.bytes)


def size_of(value: Any) -> int:
    """Return the bytes of a payload's buffers: of bytes, text, arrays and tensors, in tuples and mappings too.

    Lists count as nothing: the body that they came from was counted.
    """
    if isinstance(value, tuple):
        return sum(map(size_of, value))
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, bytes | bytearray | str):
        return len(value)
    if isinstance(value, memoryview | np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    return 0
