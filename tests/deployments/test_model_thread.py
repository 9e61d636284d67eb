from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import nn

from deployments.errors import ModelFailed, NotReady
from deployments.model_thread import BatchRecord, ModelThread, Work
from optim import compile_model
from tests.support import models
from tests.support.servables import Picky

EAGER = {"compile": {"enable": False}}


class Gate(nn.Module):
    """[B, 8] -> [B, 8]; waits for its gate when asked to, and notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.seen: list[tuple[int, ...]] = []
        self.threads: set[int] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        self.gate.wait()
        self.seen.append(tuple(x.shape))
        self.threads.add(threading.get_ident())
        return x + 1


@pytest.fixture
def records() -> list[BatchRecord]:
    return []


@pytest.fixture
def thread(records: list[BatchRecord]) -> Iterator[ModelThread]:
    thread = ModelThread("test", records.append)
    yield thread
    thread.close()


def load(thread: ModelThread, module: nn.Module, batch_sizes: tuple[int, ...] = (1, 2, 4)) -> None:
    def job() -> None:
        thread.serve(compile_model(module, models.features, EAGER, batch_sizes=batch_sizes, device="cpu"))

    thread.call(job).result()


def row(value: float, rows: int = 1) -> Work:
    return Work((torch.full((rows, 8), value),), rows)


def test_what_waits_is_run_together_oldest_first(thread: ModelThread, records: list[BatchRecord]) -> None:
    gate = Gate()
    load(thread, gate)
    gate.seen.clear()
    gate.entered.clear()
    gate.gate.clear()
    futures = [thread.submit(row(0))]
    gate.entered.wait()
    futures += [thread.submit(row(i)) for i in range(1, 7)]
    gate.gate.set()
    values = [future.result()[0, 0].item() for future in futures]
    assert values == [i + 1 for i in range(7)]
    assert gate.seen == [(1, 8), (4, 8), (2, 8)]
    thread.call(lambda: None).result()  # the last record is written after the last result
    assert [record.rows for record in records] == [1, 4, 2]


def test_everything_runs_on_one_thread(thread: ModelThread) -> None:
    gate = Gate()
    load(thread, gate)
    where: Future[int] = thread.call(threading.get_ident)
    thread.submit(row(1)).result()
    assert gate.threads == {where.result()}
    assert where.result() != threading.get_ident()


def test_a_bad_request_fails_alone_with_its_own_error(thread: ModelThread) -> None:
    module = Picky(0)
    gate = threading.Event()
    load(thread, module)
    thread.call(gate.wait)
    futures = [thread.submit(row(value)) for value in (1, 13, 2)]
    gate.set()
    assert futures[0].result()[0, 0] == 2
    assert futures[2].result()[0, 0] == 4
    with pytest.raises(ModelFailed, match="ValueError: thirteen is unlucky"):
        futures[1].result()
    assert thread.failure is None


def test_a_request_of_several_rows_stays_whole(thread: ModelThread) -> None:
    gate = Gate()
    load(thread, gate)
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(row(1, rows=3)), thread.submit(row(5, rows=2)), thread.submit(row(7))]
    gate.seen.clear()
    blocked.set()
    assert [f.result().shape[0] for f in futures] == [3, 2, 1]
    assert [f.result()[0, 0].item() for f in futures] == [2, 6, 8]
    assert gate.seen == [(4, 8), (2, 8)]  # 3 + 1, then 2: the oldest first, joined by what still fits


def test_rows_that_depend_on_each_other_are_never_joined(thread: ModelThread) -> None:
    load(thread, models.Centering())
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(row(float(i))) for i in range(3)]
    blocked.set()
    assert all(torch.equal(f.result(), torch.zeros(1, 8)) for f in futures)


def test_an_abandoned_request_costs_nothing(thread: ModelThread) -> None:
    gate = Gate()
    load(thread, gate)
    blocked = threading.Event()
    thread.call(blocked.wait)
    abandoned, wanted = thread.submit(row(1)), thread.submit(row(2))
    assert abandoned.cancel()
    gate.seen.clear()
    blocked.set()
    assert wanted.result()[0, 0] == 3
    assert gate.seen == [(1, 8)]


def test_a_broken_device_stops_the_thread_for_good(thread: ModelThread) -> None:
    class Broken(nn.Module):
        armed = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.armed:
                raise RuntimeError("CUDA error: device-side assert triggered")
            return x

    module = Broken()
    load(thread, module)
    module.armed = True
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(row(1, rows=4)), thread.submit(row(2))]
    blocked.set()
    for future in futures:
        with pytest.raises(NotReady, match="device-side assert"):
            future.result()
    assert "device-side assert" in str(thread.failure)
    with pytest.raises(NotReady):
        thread.submit(row(3))


def test_closing_answers_what_was_accepted() -> None:
    thread = ModelThread("test")
    load(thread, models.Mlp())
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(row(float(i))) for i in range(9)]
    threading.Timer(0.05, blocked.set).start()
    thread.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(NotReady):
        thread.submit(row(1))
    assert thread.failure == "the model thread is dead"


def test_a_job_that_fails_fails_its_caller_alone(thread: ModelThread) -> None:
    def job() -> Any:
        raise KeyError("x")

    with pytest.raises(KeyError):
        thread.call(job).result()
    with pytest.raises(NotReady, match="not ready"):
        thread.submit(row(1))
    assert thread.call(lambda: 5).result() == 5
