from __future__ import annotations

import time

import pytest
import torch

from deployments.queue import RequestQueue, Work
from optim import CompiledModel, compile_model
from optim.buckets import Bucket
from optim.model import StreamedModel
from optim.planner import Planner
from tests.support import models

EAGER = {"compile": {"enable": False}}


@pytest.fixture
def model() -> CompiledModel:
    def make() -> CompiledModel:
        return compile_model(models.Mlp(), models.features, EAGER, batch_sizes=(1, 2, 4), device="cpu")

    model = make()
    model.streams = StreamedModel(make(), 2, 1)
    return model


def queue_of(model: CompiledModel, whole: list[float], beside: list[float], rows: list[int]) -> RequestQueue:
    """Return a queue of requests, with costs for the batch sizes 1, 2 and 4 on all threads and on a stream."""
    planners = [Planner(dict(zip(map(Bucket, (1, 2, 4)), costs, strict=True))) for costs in (whole, beside)]
    queue = RequestQueue(model, *planners)
    for count in rows:
        queue.put(queue.look_at(Work((torch.zeros(count, 8),), count)))
    return queue


def test_one_request_has_all_threads(model: CompiledModel) -> None:
    queue = queue_of(model, [9, 9, 9], [1, 1, 1], [1])
    assert not queue.prefers_streams()
    assert [queued.work.rows for queued in queue.take()] == [1]
    assert not queue


def test_streams_share_what_waits_where_that_is_sooner(model: CompiledModel) -> None:
    queue = queue_of(model, [1, 2, 4], [1.8, 3.4, 6.6], [1] * 4)
    assert queue.prefers_streams()  # 3.4 ms beside each other, 4 one after the other
    assert [len(queue.take(on_stream=True)) for _ in range(3)] == [2, 1, 1]


def test_what_gains_by_running_together_is_not_shared_out(model: CompiledModel) -> None:
    queue = queue_of(model, [1, 1.1, 1.2], [2, 2.2, 2.4], [1] * 4)
    assert not queue.prefers_streams()
    assert len(queue.take()) == 4


def test_a_request_is_never_split_between_streams(model: CompiledModel) -> None:
    queue = queue_of(model, [1, 2, 4], [1, 2, 4], [3])
    assert not queue.prefers_streams()
    queue.put(queue.look_at(Work((torch.zeros(1, 8),), 1)))
    assert [queued.work.rows for queued in queue.take(on_stream=True)] == [3]


def test_requests_that_cannot_be_joined_still_run_beside_each_other(model: CompiledModel) -> None:
    queue = queue_of(model, [1, 1, 1], [1.5, 1.5, 1.5], [])
    for width in (7, 8, 9, 10):  # a shape of its own each, so a group of its own
        queue.put(queue.look_at(Work((torch.zeros(1, width),), 1)))
    assert queue.prefers_streams()
    assert len(queue.take(on_stream=True)) == 1


def test_what_nobody_waits_for_is_dropped(model: CompiledModel) -> None:
    queue = queue_of(model, [1, 1, 1], [1, 1, 1], [1])
    late = Work((torch.zeros(1, 8),), 1, deadline=time.monotonic() - 1)
    gone = Work((torch.zeros(1, 8),), 1)
    gone.future.cancel()
    for work in (late, gone):
        queue.put(queue.look_at(work))
    assert [queued.work for queued in queue.drop_unwanted()] == [late, gone]
    assert len(queue) == 1


@pytest.mark.parametrize(("pads", "first"), [(False, [18]), (True, [18, 30])])
def test_sizes_between_buckets_count_where_nothing_is_padded_to_them(
    pads: bool, first: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compile_model(models.MaskedMean(), models.tokens, EAGER, batch_sizes=(1, 2), lengths=(16, 32), device="cpu")
    assert not model.pads, "eager takes every size"
    costs = {Bucket(1, 16): 2.0, Bucket(2, 16): 3.6, Bucket(1, 32): 4.0, Bucket(2, 32): 7.6}
    monkeypatch.setattr(CompiledModel, "costs", costs)
    monkeypatch.setattr(CompiledModel, "pads", pads)
    queue = RequestQueue(model)
    for length in (18, 31, 30):
        queue.put(queue.look_at(Work(models.tokens(1, length), 1)))
    assert [queued.item.length for queued in queue.take() if queued.item] == first
