"""The requests that wait for the model, and which of them run next (no threads here; the caller holds the lock)."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from optim import CompiledModel
from optim.planner import Item, Planner
from optim.shapes import Inputs, measure

#: The oldest requests that are planned together: a plan takes 10 us a request and should not hold the model up.
_WINDOW = 128
#: Streams are taken for what all threads together would do in no more than this much less time. Their costs were
#: measured on a quiet machine; under load a run on all threads waits for each of them while clients, proxies and
#: decoding want the cores too (tried, 32 clients: 1.05 to 1.2 by the figures, 1.2 to 1.4 times the requests served).
_LEAST_GAIN = 0.87


@dataclass(frozen=True, eq=False)
class Work:
    """One request: its inputs with their batch dimension, until when it is wanted, and where its output goes."""

    inputs: Inputs
    rows: int
    deadline: float | None = None
    """On time.monotonic's clock; None is never."""
    future: Future[Any] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)

    def is_wanted(self, now: float) -> bool:
        """Say whether somebody still waits for the answer."""
        return not self.future.cancelled() and (self.deadline is None or self.deadline > now)

    async def wait(self) -> Any:
        """Return the output, or raise the request's own error; who stops waiting takes it out of the queue.

        As asyncio.wrap_future does it, in half of its time (15 us of 30): it keeps the two futures alike in both
        directions, and here one has to tell the other only that it is done.
        """
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def tell() -> None:
            if not done.done():
                done.set_result(None)

        def settled(_: Future[Any]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(tell)

        self.future.add_done_callback(settled)
        try:
            await done
            return self.future.result()
        finally:
            self.future.cancel()


@dataclass(frozen=True, eq=False)
class Queued:
    """A request in the queue; those with the same key may run together, one without a key runs alone.

    `item` is its size, measured once; None where its tensors have none that the model knows.
    """

    work: Work
    item: Item | None
    key: tuple[Any, ...] | None


class RequestQueue:
    """Keeps requests in their order and puts them into groups.

    The group taken is always the one that the oldest request is in, so nothing starves behind what fits better.
    """

    def __init__(
        self, model: CompiledModel, planner: Planner | None = None, stream_planner: Planner | None = None
    ) -> None:
        self._model = model
        self._waiting: deque[Queued] = deque()
        self.plan_anew(planner, stream_planner)

    def plan_anew(self, planner: Planner | None = None, stream_planner: Planner | None = None) -> None:
        """Plan by what the model's buckets cost now, on the streams that it has now, or by the planners given."""
        model, streams = self._model, self._model.streams
        self._streams = streams.count if streams else 1
        self._planner = planner or _planner_of(model)
        self._stream_planner = stream_planner or _planner_of(streams.model if streams else model)

    def __len__(self) -> int:
        return len(self._waiting)

    def look_at(self, work: Work) -> Queued:
        """Return a request with what is needed to plan it."""
        model = self._model
        size = measure(model.input_specs, work.inputs)
        may_join = model.report.padding and all(spec.batch_dim is not None for spec in model.input_specs)
        if size is None or not may_join:
            return Queued(work, size and Item(*size), None)
        key = []
        for spec, tensor in zip(model.input_specs, work.inputs, strict=True):
            free = {spec.batch_dim, *spec.length_dims}
            key.append((tensor.dtype, tuple(size for dim, size in enumerate(tensor.shape) if dim not in free)))
        return Queued(work, Item(*size), tuple(key))

    def put(self, queued: Queued) -> None:
        """Take in a request."""
        self._waiting.append(queued)

    def drop_unwanted(self) -> list[Queued]:
        """Take out and return what nobody waits for any more."""
        now = time.monotonic()
        unwanted = [queued for queued in self._waiting if not queued.work.is_wanted(now)]
        self._remove(unwanted)
        return unwanted

    def prefers_streams(self) -> bool:
        """Say whether what waits is done sooner by several runs beside each other than by one after the other."""
        if self._streams == 1 or len(self._waiting) == 1:
            return False
        apart = self._plan_all(self._stream_planner, self._most_rows())
        if len(apart) == 1:
            return False
        beside = max(max(apart), sum(apart) / self._streams)
        return beside * _LEAST_GAIN < sum(self._plan_all(self._planner, None))

    def take(self, *, on_stream: bool = False) -> list[Queued]:
        """Take out what runs next: the oldest request and those planned with it; on a stream, its share at most."""
        peers = self._peers(self._waiting[0])
        planner, most_rows = (self._stream_planner, self._most_rows()) if on_stream else (self._planner, None)
        group = [self._waiting[0]]
        if len(peers) > 1:
            oldest, *_ = planner.plan(_items(peers), most_rows)
            group = [peers[i] for i in oldest.items]
        self._remove(group)
        return group

    def clear(self) -> list[Queued]:
        """Take out everything."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting

    def _peers(self, queued: Queued) -> list[Queued]:
        """Return the requests that may run with one, itself included, oldest first."""
        if queued.key is None:
            return [queued]
        return [other for other in self._waiting if other.key == queued.key][:_WINDOW]

    def _most_rows(self) -> int:
        """Return the rows of a stream's fair share of what waits."""
        return math.ceil(sum(queued.work.rows for queued in self._waiting) / self._streams)

    def _plan_all(self, planner: Planner, most_rows: int | None) -> list[float]:
        """Return the cost of every group that what waits would run in."""
        together: dict[Any, list[Queued]] = {}
        for queued in list(self._waiting)[:_WINDOW]:
            together.setdefault(id(queued) if queued.key is None else queued.key, []).append(queued)
        costs: list[float] = []
        for peers in together.values():
            costs += [planner.cost([group]) for group in planner.plan(_items(peers), most_rows)]
        return costs

    def _remove(self, gone: Sequence[Queued]) -> None:
        if gone:
            names = set(map(id, gone))
            self._waiting = deque(queued for queued in self._waiting if id(queued) not in names)


def _planner_of(model: CompiledModel) -> Planner:
    return Planner(model.costs, any_size=not model.pads)


def _items(peers: Sequence[Queued]) -> list[Item]:
    # Without a size that the model knows nothing can be said of its cost; it runs alone.
    return [queued.item or Item(queued.work.rows) for queued in peers]
