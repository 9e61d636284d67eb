"""`Deadline`: until when the answer to a request has to be there."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from types import TracebackType

from starlette.requests import Request

from deployments.errors import BadRequest, DeadlineExceeded, ModelFailed
from deployments.middleware import OWN_TIMEOUT, TIMEOUT


class Deadline:
    """Bounds a block by a number of seconds (None: not at all), and counts how it ended where that was no answer.

    Entered it gives the deadline on time.monotonic's clock. Where the time is over, and where the block raises
    TimeoutError, DeadlineExceeded leaves it. A class, since as an asynccontextmanager it took twice as long (issue 6).
    """

    def __init__(self, seconds: float | None, count: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._count = count
        self._timer = asyncio.timeout(seconds)

    async def __aenter__(self) -> float | None:
        seconds = self._seconds
        if seconds is None:
            return None
        if seconds <= 0:
            self._count("deadline")
            raise DeadlineExceeded("the deadline has passed")
        await self._timer.__aenter__()
        return time.monotonic() + seconds

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._seconds is not None:
                await self._timer.__aexit__(kind, error, trace)
        except TimeoutError as over:
            error = over
        if isinstance(error, TimeoutError | DeadlineExceeded):
            self._count("deadline")
            raise DeadlineExceeded(f"no answer in time: the deadline was {self._seconds:.3g} s away") from None
        if isinstance(error, asyncio.CancelledError):
            self._count("gone")
        elif isinstance(error, ModelFailed):
            self._count("failed")


def time_left(request: Request, started: float) -> float | None:
    """Return the seconds left of those that the caller grants, or None where the configured time holds.

    Ray Serve reads the same header, and answers in words of its own when the time is over: where it was not told a
    later one (`deployments.middleware`), ours has to be there a little before that.
    """
    text = request.headers.get(OWN_TIMEOUT, request.headers.get(TIMEOUT))
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise BadRequest(f"{TIMEOUT}: {text!r} is not allowed; use a number of seconds above 0")
    early = 0.0 if OWN_TIMEOUT in request.headers else min(0.05 * seconds, 0.1)
    return max(seconds - early - (time.monotonic() - started), 0.0)
