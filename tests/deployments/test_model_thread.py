from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import nn

from deployments.batch import BatchRecord
from deployments.errors import DeadlineExceeded, ModelFailed, NotReady
from deployments.model_thread import ModelThread
from deployments.queue import Work
from optim import compile_model
from optim.buckets import make_grid
from optim.model import StreamedModel
from optim.planner import Planner
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
        model = compile_model(module, models.features, EAGER, batch_sizes=batch_sizes, device="cpu")
        # Every run costs the same, so that the fewest runs are best whatever this machine measures.
        thread.serve(model, Planner(dict.fromkeys(make_grid(batch_sizes), 1.0)))

    thread.call(job).result()


def row(value: float, rows: int = 1) -> Work:
    return Work((torch.full((rows, 8), float(value)),), rows)


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
    assert [len(record.waits_s) for record in records] == [1, 4, 2]
    assert [record.padding for record in records] == [0, 0, 0]  # eager needs none


def test_a_metric_that_fails_does_not_stop_the_model() -> None:
    def on_batch(record: BatchRecord) -> None:
        raise RuntimeError("no metrics today")

    thread = ModelThread("test", on_batch)
    load(thread, models.Mlp())
    assert [thread.submit(row(i)).result().shape for i in range(2)] == [(1, 4), (1, 4)]
    assert thread.failure is None
    thread.close()


def test_everything_runs_on_one_thread(thread: ModelThread) -> None:
    gate = Gate()
    load(thread, gate)
    where: Future[int] = thread.call(threading.get_ident)
    thread.submit(row(1)).result()
    assert gate.threads == {where.result()}
    assert where.result() != threading.get_ident()


def test_a_thread_is_idle_while_nothing_waits_or_runs(thread: ModelThread) -> None:
    gate = Gate()
    load(thread, gate)
    gate.entered.clear()
    gate.gate.clear()
    future = thread.submit(row(1))
    assert not thread.is_idle, "it waits"
    gate.entered.wait()
    assert not thread.is_idle, "it runs"
    gate.gate.set()
    future.result()
    end = time.monotonic() + 60
    while not thread.is_idle:
        assert time.monotonic() < end
        time.sleep(0.001)


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
    assert gate.seen == [(3, 8), (3, 8)]  # 2 + 1 are one run; 3 + 1 and 2 would be as many


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


def test_a_request_whose_deadline_has_passed_costs_nothing(thread: ModelThread) -> None:
    gate = Gate()
    load(thread, gate)
    blocked = threading.Event()
    thread.call(blocked.wait)
    late = thread.submit(Work((torch.zeros(1, 8),), 1, deadline=time.monotonic() - 1))
    wanted = thread.submit(Work((torch.ones(1, 8),), 1, deadline=time.monotonic() + 600))
    gate.seen.clear()
    blocked.set()
    assert wanted.result()[0, 0] == 2
    with pytest.raises(DeadlineExceeded, match="before the model was free"):
        late.result()
    assert gate.seen == [(1, 8)]


@pytest.fixture
def texts(thread: ModelThread) -> Iterator[list[tuple[int, ...]]]:
    """The thread serves texts of up to 32 tokens; yields the shapes that the model is given."""
    seen: list[tuple[int, ...]] = []

    class Seen(models.MaskedMean):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.append(tuple(ids.shape))
            return super().forward(ids, mask)

    sizes, lengths = (1, 2, 4), (8, 16, 32)

    def job() -> None:
        model = compile_model(
            Seen(), models.tokens, EAGER, batch_sizes=sizes, lengths=lengths, token_budget=64, device="cpu"
        )
        grid = make_grid(sizes, lengths, 64)
        assert model.buckets == grid
        thread.serve(model, Planner({bucket: bucket.length + 0.1 * bucket.batch_size for bucket in grid}))

    thread.call(job).result()
    seen.clear()
    yield seen


def text(length: int) -> Work:
    ids, mask = models.tokens(1, length)
    return Work((ids, mask), 1)


def test_texts_of_any_length_get_their_own_answers(
    thread: ModelThread, texts: list[tuple[int, ...]], records: list[BatchRecord]
) -> None:
    works = [text(length) for length in (30, 3, 16, 5, 40, 32, 8, 2, 31, 1)]
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(work) for work in works]
    blocked.set()
    module = models.MaskedMean()
    for work, future in zip(works, futures, strict=True):
        want, found = module(*work.inputs), future.result()
        assert found["tokens"].shape == want["tokens"].shape
        torch.testing.assert_close(found, want)
    # The oldest first, with its likes: 30 takes 16, which is one run less; of the others 3 takes 1, 2 and 5.
    # 40 is longer than every bucket: alone, and unpadded.
    assert texts == [(2, 30), (4, 5), (1, 40), (2, 32), (1, 8)]
    thread.call(lambda: None).result()
    assert sum(len(record.waits_s) for record in records) == len(works)
    # Eager runs a group at its longest, so that is all the padding there is.
    assert [(record.tokens, record.tokens_run) for record in records] == [
        (30 + 16, 2 * 30),
        (3 + 5 + 2 + 1, 4 * 5),
        (40, 40),
        (32 + 31, 2 * 32),
        (8, 8),
    ]


def test_the_oldest_request_never_waits_for_better_fitting_ones(
    thread: ModelThread, texts: list[tuple[int, ...]]
) -> None:
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(text(32))] + [thread.submit(text(8)) for _ in range(20)]
    blocked.set()
    for future in futures:
        future.result()
    assert texts[0] == (1, 32)


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


class Greedy(nn.Module):
    """[B, 8] -> [B, 8]; a row of 13 asks for more memory than any machine has, and so does all once it is `full`."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False
        self.before: list[bool] = []
        self._last: weakref.ref[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.before.append(self._last is not None and self._last() is not None)
        held = x + 1
        if self.full or 13 in x.numpy():  # asked of torch, rows would be taken to depend on each other
            self._last = weakref.ref(held)
            torch.empty(1 << 60)
        return held


def test_a_request_for_which_there_is_no_memory_fails_alone(thread: ModelThread) -> None:
    module = Greedy()
    load(thread, module)
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(row(float(value))) for value in (1, 13, 3, 13)]
    module.before.clear()
    blocked.set()
    assert [futures[i].result()[0, 0].item() for i in (0, 2)] == [2, 4]
    for i in (1, 3):
        with pytest.raises(ModelFailed, match=r"the model failed on this request: .*DefaultCPUAllocator"):
            futures[i].result()
    assert thread.failure is None
    assert thread.submit(row(5)).result()[0, 0] == 6
    # What a failed run held is gone before the next.
    assert len(module.before) == 9 and not any(module.before)


def test_memory_that_was_there_at_the_start_and_is_gone_is_the_replicas_end(thread: ModelThread) -> None:
    class Shrinks(nn.Module):
        most = 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if len(x) <= self.most else torch.empty(1 << 60)

    module = Shrinks()
    load(thread, module)
    module.most = 1
    assert thread.submit(row(1)).result()[0, 0] == 2
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(row(float(value))) for value in (1, 2, 3, 4)]
    blocked.set()
    for future in futures:
        with pytest.raises(NotReady, match=r"the device failed: .*DefaultCPUAllocator"):
            future.result()


def test_a_model_for_whose_own_example_there_is_no_memory_is_broken(thread: ModelThread) -> None:
    module = Greedy()
    load(thread, module)
    module.full = True
    with pytest.raises(NotReady, match=r"the device failed: .*DefaultCPUAllocator"):
        thread.submit(row(1)).result()
    assert "DefaultCPUAllocator" in str(thread.failure)


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


class Pair(nn.Module):
    """[B, 8] -> [B, 8]; every call waits until another one has come in."""

    def __init__(self) -> None:
        super().__init__()
        self.meeting = threading.Barrier(1)
        self.threads: set[str] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.meeting.wait(10)
        self.threads.add(threading.current_thread().name)
        if bool((x == 13).any()):
            raise ValueError("thirteen is unlucky")
        return x + 1


def load_with_streams(thread: ModelThread, whole: nn.Module, streams: tuple[nn.Module, nn.Module]) -> None:
    """Load modules for all threads, and for two streams; by the planners' costs the streams are twice as fast."""

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        # Eager code is called once at a time, so each stream has its own module here.
        mine = int(threading.current_thread().name[-1])
        output: torch.Tensor = streams[mine](*inputs)
        return output

    def job() -> None:
        sizes = (1, 2, 4)
        model = compile_model(whole, models.features, EAGER, batch_sizes=sizes, device="cpu")
        beside = compile_model(whole, models.features, EAGER, batch_sizes=sizes, device="cpu")
        beside._run_module = lambda inputs: run(*inputs)  # type: ignore[method-assign]
        model.streams = StreamedModel(beside, 2, 1)
        costs = {bucket: float(bucket.batch_size) for bucket in make_grid(sizes)}
        thread.serve(model, Planner(costs), Planner(costs))

    thread.call(job).result()


def test_under_load_runs_are_made_beside_each_other(thread: ModelThread, records: list[BatchRecord]) -> None:
    whole, pair = Gate(), Pair()
    load_with_streams(thread, whole, (pair, pair))
    whole.seen.clear()
    pair.meeting = threading.Barrier(2)  # broken after 10 s, unless two calls are there at once
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(row(i)) for i in range(4)]
    blocked.set()
    assert [future.result()[0, 0].item() for future in futures] == [1, 2, 3, 4]
    assert pair.threads == {"model-test-stream-0", "model-test-stream-1"}
    assert whole.seen == []
    pair.meeting = threading.Barrier(1)
    assert thread.submit(row(7)).result()[0, 0] == 8  # one alone has all threads
    assert whole.seen == [(1, 8)]
    thread.call(lambda: None).result()
    assert [(record.rows, record.on_stream) for record in records][-1] == (1, False)
    assert all(record.on_stream for record in records[:-1])


def test_streams_may_come_while_requests_wait(thread: ModelThread) -> None:
    whole, pair = Gate(), Pair()
    model = compile_model(whole, models.features, EAGER, batch_sizes=(1, 2, 4), device="cpu")
    thread.call(lambda: thread.serve(model)).result()
    whole.seen.clear()
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(row(i)) for i in range(4)]

    def change() -> None:
        beside = compile_model(pair, models.features, EAGER, batch_sizes=(1, 2, 4), device="cpu")
        beside._run_module = lambda inputs: pair(*inputs)  # type: ignore[method-assign]
        beside._ms = {bucket: 1e-3 * bucket.batch_size for bucket in beside.buckets}
        model._ms = dict.fromkeys(model.buckets, 1.0)
        model.streams = StreamedModel(beside, 2, 1)
        pair.meeting = threading.Barrier(2)
        thread.look_again()
        thread.look_again()  # once more changes nothing

    changed = thread.call(change)
    blocked.set()
    assert [future.result()[0, 0].item() for future in futures] == [1, 2, 3, 4]
    changed.result()
    assert pair.threads == {"model-test", "model-test-stream-0", "model-test-stream-1"}  # the first compiled it
    assert whole.seen == []
    assert thread.failure is None


def test_a_job_waits_for_the_streams_and_they_for_it(thread: ModelThread) -> None:
    gates = (Gate(), Gate())
    load_with_streams(thread, Gate(), gates)
    for gate in gates:
        gate.entered.clear()
        gate.gate.clear()
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(row(i)) for i in range(4)]
    blocked.set()
    for gate in gates:
        gate.entered.wait()
    order: list[str] = []
    job = thread.call(lambda: order.append(f"job after {sum(future.done() for future in futures)}"))
    futures += [thread.submit(row(i)) for i in range(4, 8)]
    assert not job.done()
    for gate in gates:
        gate.gate.set()
    job.result()
    assert [future.result()[0, 0].item() for future in futures] == [i + 1 for i in range(8)]
    done = int(order[0].split()[-1])
    assert 2 <= done < 8, "it came after what ran, and before what was submitted later"


def test_a_bad_request_on_a_stream_fails_alone(thread: ModelThread) -> None:
    pair = Pair()
    load_with_streams(thread, Gate(), (pair, pair))
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(row(value)) for value in (1, 13, 2, 3)]
    blocked.set()
    assert [futures[i].result()[0, 0].item() for i in (0, 2, 3)] == [2, 3, 4]
    with pytest.raises(ModelFailed, match="thirteen is unlucky"):
        futures[1].result()


def test_closing_answers_what_waits_for_the_streams() -> None:
    thread = ModelThread("test")
    pair = Pair()
    load_with_streams(thread, Gate(), (pair, pair))
    blocked = threading.Event()
    thread.call(blocked.wait)
    futures = [thread.submit(row(i)) for i in range(9)]
    closing = threading.Thread(target=thread.close)
    closing.start()
    blocked.set()
    closing.join()
    assert [future.result()[0, 0].item() for future in futures] == [i + 1 for i in range(9)]


def test_nothing_is_lost_between_threads_and_streams(thread: ModelThread, records: list[BatchRecord]) -> None:
    pair, whole = Pair(), Gate()
    load_with_streams(thread, whole, (pair, pair))
    found: list[tuple[float, Future[Any], bool]] = []

    def ask(number: int) -> None:
        for i in range(200):
            value = float((number + 1) * 1000 + i)
            future = thread.submit(row(value, rows=i % 3 + 1))
            cancelled = i % 7 == 0 and future.cancel()
            found.append((value, future, cancelled))
            if i % 5 == 0 and not cancelled:
                future.result()

    askers = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    wanted = [(value, future) for value, future, cancelled in found if not cancelled]
    assert all(future.result()[0, 0].item() == value + 1 for value, future in wanted)
    assert thread.submit(row(7)).result()[0, 0] == 8
    thread.call(lambda: None).result()
    assert sum(len(record.waits_s) for record in records) == len(wanted) + 1
    assert any(record.on_stream for record in records)
    assert not records[-1].on_stream
