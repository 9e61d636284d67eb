"""Clients for serving benchmarks: closed and open loops over keep-alive connections, every reply looked at."""

from __future__ import annotations

import http.client
import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Says whether a reply to a payload (by its place) is right.
Check = Callable[[int, bytes], bool]


_BOUNDARY = b"--pt2-serve-benchmark"


def make_form(payload: bytes) -> bytes:
    """Return a body as a form's file `data`, for servers that take nothing else."""
    head = b'\r\nContent-Disposition: form-data; name="data"; filename="data"\r\n\r\n'
    return _BOUNDARY + head + payload + b"\r\n" + _BOUNDARY + b"--\r\n"


@dataclass
class Load:
    """What a run of clients found: seconds by request, and what went wrong."""

    seconds: float
    taken: list[float] = field(default_factory=list)
    failed: list[Any] = field(default_factory=list)
    wrong: int = 0

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.taken) / self.seconds

    def ms(self, percent: float) -> float:
        """Return a percentile of the latency, ms."""
        if not self.taken:
            return float("nan")
        if percent == 50:
            return statistics.median(self.taken) * 1e3
        return statistics.quantiles(self.taken, n=1000)[round(percent * 10) - 1] * 1e3


class _Client:
    def __init__(self, port: int, path: str, payloads: Sequence[bytes], check: Check, load: Load) -> None:
        self._path, self._payloads, self._check, self._load = path, payloads, check, load
        form = payloads[0].startswith(_BOUNDARY)
        self._headers = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY[2:].decode()}"} if form else {}
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, index: int, since: float) -> None:
        try:
            self._connection.request("POST", self._path, self._payloads[index], self._headers)
            reply = self._connection.getresponse()
            body = reply.read()
        except (OSError, http.client.HTTPException) as error:
            self._load.failed.append(type(error).__name__)
            self._connection.close()
            return
        if reply.status != 200:
            self._load.failed.append(reply.status)
            return
        self._load.taken.append(time.perf_counter() - since)
        if not self._check(index, body):
            self._load.wrong += 1

    def close(self) -> None:
        self._connection.close()


def deal(count: int) -> Iterator[int]:
    """Yield the numbers below `count` without end, shuffled, none a second time before all the others.

    A few hundred texts of 5 to 200 tokens that are drawn each by itself have medians that differ by a tenth (issue 4).
    """
    dice = random.Random(0)
    while True:
        yield from dice.sample(range(count), count)


def closed_loop(port: int, path: str, payloads: Sequence[bytes], check: Check, clients: int, seconds: float) -> Load:
    """Let each client ask again as soon as it has its answer."""
    load, cards, lock = Load(seconds), deal(len(payloads)), threading.Lock()
    end = time.perf_counter() + seconds

    def run() -> None:
        client = _Client(port, path, payloads, check, load)
        while (begin := time.perf_counter()) < end:
            with lock:
                index = next(cards)
            client.ask(index, begin)
        client.close()

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load


def open_loop(
    port: int,
    path: str,
    payloads: Sequence[bytes],
    check: Check,
    rate: float,
    seconds: float,
    stop: threading.Event | None = None,
) -> Load:
    """Send requests at random times, `rate` a second, whether answers come or not; latency counts from that time.

    Ends after some seconds or as soon as `stop` is set, and waits for the answers.
    """
    load, cards, dice = Load(seconds), deal(len(payloads)), random.Random(7)
    waiting: queue.SimpleQueue[tuple[int, float] | None] = queue.SimpleQueue()

    def run() -> None:
        client = _Client(port, path, payloads, check, load)
        while (job := waiting.get()) is not None:
            client.ask(*job)
        client.close()

    threads = [threading.Thread(target=run) for _ in range(64)]
    for thread in threads:
        thread.start()
    begin = due = time.perf_counter()
    while (due := due + dice.expovariate(rate)) < begin + seconds:
        time.sleep(max(due - time.perf_counter(), 0))
        if stop is not None and stop.is_set():
            break
        waiting.put((next(cards), due))
    for _ in threads:
        waiting.put(None)
    for thread in threads:
        thread.join()
    return load
