"""The logic around CUDA graphs, without a GPU: an engine that behaves as they do."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import optim.builder
from optim import Bucket, CompiledModel, CompileError, compile_model
from optim.engines.base import Engine, EngineJob, Runner
from optim.monitor import count_recordings, prepare_thread
from tests.support import models
from tests.support.threads import error_in_another_thread


class Graphs(Engine):
    """Each bucket takes memory by its rows, and its output lies in one buffer that every call overwrites."""

    name = "graphs"
    reuses_outputs = True
    capacity = 0
    captured: list[int]

    def __init__(self, job: EngineJob) -> None:
        super().__init__(job)
        self._held = 0
        self.closed = False

    def compile(self, bucket: Bucket) -> Runner:
        self.captured.append(bucket.batch_size)
        self._held += bucket.batch_size
        if self._held > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        buffer = torch.empty(bucket.batch_size, 4)
        return lambda *inputs: buffer.copy_(self.job.module(*inputs))

    def close(self) -> None:
        self._held = 0
        self.closed = True


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graphs]:
    monkeypatch.setattr(optim.builder, "make_engine", lambda name, job: Graphs(job))
    monkeypatch.setattr(Graphs, "captured", [], raising=False)
    return Graphs


def build(**more: Any) -> CompiledModel:
    section = {"compile": {"backend": "cudagraphs", "only_if_faster": False}, **more}
    return compile_model(models.Mlp(), models.features, section, device="cpu")


def check(model: CompiledModel) -> None:
    module = models.Mlp().eval()
    with torch.no_grad():
        for rows in (1, 2, 3, 7, 8, 9):
            torch.testing.assert_close(model(*models.features(rows)), module(*models.features(rows)))


def test_the_largest_is_captured_first(graphs: type[Graphs]) -> None:
    graphs.capacity = 15
    model = build()
    assert graphs.captured == [8, 4, 2, 1]
    assert set(model.report.engines().values()) == {"graphs"}
    check(model)


@pytest.mark.parametrize(
    ("capacity", "captured", "kept"),
    [
        (7, [8, 4, 2, 1], ["1", "2", "4"]),
        (13, [8, 4, 2, 4, 2, 1], ["1", "2", "4"]),
        (5, [8, 4, 2, 2, 1], ["1", "2"]),
        (1, [8, 4, 2, 1], ["1"]),
        (0, [8, 4, 2, 1], []),
    ],
)
def test_out_of_memory_means_fewer_buckets(
    graphs: type[Graphs], capacity: int, captured: list[int], kept: list[str]
) -> None:
    graphs.capacity = capacity
    model = build()
    assert graphs.captured == captured
    engines = model.report.engines()
    assert [name for name in engines if engines[name] == "graphs"] == kept
    for row in model.report.buckets:
        if str(row.batch_size) not in kept:
            (refusal,) = row.refusals
            assert (refusal.stage, refusal.exception) == ("memory", "OutOfMemoryError")
            assert "capturing ran out of memory at bucket" in refusal.message
    check(model)


def test_what_was_captured_is_let_go_before_it_is_captured_anew(
    graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that tells of it holds the frames of the call, and what they hold is the memory that was short."""
    alive: list[weakref.ref[torch.Tensor]] = []
    compile_bucket = graphs.compile

    def compile(engine: Graphs, bucket: Bucket) -> Runner:
        captured = torch.zeros(bucket.batch_size)
        assert not [held for held in alive if held() is not None]
        alive.append(weakref.ref(captured))
        return compile_bucket(engine, bucket)

    monkeypatch.setattr(graphs, "compile", compile)
    graphs.capacity = 5
    build()
    assert graphs.captured == [8, 4, 2, 2, 1]


def test_a_plan_stays_where_there_is_no_memory_for_it_this_time(graphs: type[Graphs], tmp_path: Path) -> None:
    def start() -> CompiledModel:
        graphs.captured = []
        return build(cache={"folder": str(tmp_path)})

    graphs.capacity = 15
    assert start().report.start == "cold"
    graphs.capacity = 7
    model = start()
    assert (model.report.start, graphs.captured) == ("warm", [8, 4, 2, 1])
    assert model.report.engines() == {"1": "graphs", "2": "graphs", "4": "graphs", "8": "eager"}
    last = model.report.buckets[-1]
    assert (last.ms, last.speedup, model.costs[Bucket(8)]) == (last.eager_ms, 1.0, last.eager_ms)
    assert "bucket 8 is eager, though the plan has graphs: no memory" in model.report.notes
    check(model)
    with pytest.raises(CompileError, match=r"bucket 8 could not be compiled and fallback is 'fail': .* out of memory"):
        build(cache={"folder": str(tmp_path)}, fallback="fail")
    graphs.capacity = 15
    model = start()
    assert (model.report.start, set(model.report.engines().values())) == ("warm", {"graphs"})


def test_what_a_plan_that_does_not_hold_has_built_gives_its_memory_back(
    graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graphs.capacity = 15
    build(cache={"folder": str(tmp_path)})
    built: list[Graphs] = []

    class Wrong(graphs):  # type: ignore[misc, valid-type]
        def compile(self, bucket: Bucket) -> Runner:
            run: Runner = super().compile(bucket)
            return (lambda *inputs: run(*inputs) + 1) if bucket.batch_size == 1 and len(built) == 1 else run

    def make(name: str, job: EngineJob) -> Graphs:
        built.append(Wrong(job))
        return built[-1]

    monkeypatch.setattr(optim.builder, "make_engine", make)
    model = build(cache={"folder": str(tmp_path)})
    assert (model.report.start, set(model.report.engines().values())) == ("cold", {"graphs"})
    assert [engine.closed for engine in built] == [True, False]
    check(model)


@pytest.mark.parametrize("strict", [False, True])
def test_buckets_for_which_nothing_was_recorded_are_named(
    graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    """From torch 2.9 on a graph of which every part was cut out counts as no skip."""
    graphs.capacity = 15
    monkeypatch.setattr("optim.trial._recorded", lambda engine: 5)
    if strict:
        with pytest.raises(CompileError, match="no CUDA graph was recorded, and `strict` is set"):
            build(strict=True)
        return
    model = build()
    assert "graphs: no CUDA graphs were recorded for 8, 4, 2, 1" in model.report.notes
    check(model)


def test_outputs_are_copied(graphs: type[Graphs]) -> None:
    graphs.capacity = 15
    model = build()
    first = model(*models.features(4))
    kept = first.clone()
    model(torch.full((4, 8), 7.0))
    assert torch.equal(first, kept)


def test_a_second_thread_is_refused(graphs: type[Graphs]) -> None:
    graphs.capacity = 15
    model = build()
    assert "belong to the thread" in str(error_in_another_thread(lambda: model(*models.features(4))))
    check(model)


def test_a_thread_that_did_not_import_cudagraph_trees_gets_a_state_of_its_own() -> None:
    found: list[int] = []

    def use() -> None:
        prepare_thread()
        prepare_thread()  # twice is once
        found.append(count_recordings(torch.device("cuda", 0)))

    count_recordings(torch.device("cuda", 0))  # imports it on this thread
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [0]
