"""Several calls at a time, each on its share of the threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from optim import CompiledModel, ConfigError, compile_model
from optim.device import inspect_device, set_threads
from optim.shapes import Example
from optim.streams import check_streams
from optim.verify import compare
from tests.support import models

CPU = inspect_device(torch.device("cpu")).capabilities
ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(not CPU[name].available, reason=CPU[name].detail))
    for name in ("onnxruntime", "ipex", "openvino")
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    set_threads(2)
    yield
    set_threads(before)


def build(module: nn.Module, example: Example, backend: str, **more: Any) -> CompiledModel:
    section = {"compile": {"backend": backend, "only_if_faster": False}}
    return compile_model(module, example, section, device="cpu", **{"batch_sizes": (1, 4), "streams": 2, **more})


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize(
    ("module", "example", "lengths"),
    [(models.SmallCnn(), models.images, None), (models.MaskedMean(), models.tokens, (4, 8))],
)
def test_calls_at_the_same_time_answer_as_eager(
    module: nn.Module, example: Example, lengths: tuple[int, ...] | None, backend: str
) -> None:
    model = build(module.eval(), example, backend, lengths=lengths)
    streams = model.streams
    assert streams is not None, model.report.notes
    assert (streams.count, streams.threads, model.report.streams) == (2, 1, 2)
    assert all(row.stream_ms and row.stream_gain for row in model.report.buckets)
    assert set(streams.model.costs) == set(model.buckets)
    asked = []
    for i in range(60):
        inputs = example(i % 5 + 1, (3, 4, 8)[i % 3] if lengths else None)
        with torch.no_grad():
            asked.append((inputs, module(*inputs)))
    with ThreadPoolExecutor(2, initializer=set_threads, initargs=(1,)) as pool:
        for (_, want), got in zip(asked, pool.map(lambda pair: streams.model(*pair[0]), asked), strict=True):
            assert compare(got, want).max_abs < 1e-4
    after = model.report.after_ready
    assert (after.calls, after.failed_runs, after.shapes_without_bucket) == (60, 0, 0)
    assert torch.get_num_threads() == 2


def test_code_that_takes_one_call_at_a_time_has_no_streams() -> None:
    model = build(models.Mlp(), models.features, "inductor")
    assert set(model.report.engines().values()) == {"inductor"}, model.report.all_refusals()
    assert model.streams is None
    assert "one run at a time: code of inductor takes one call at a time" in model.report.notes


def test_a_module_served_eager_has_no_streams() -> None:
    model = compile_model(models.Mlp(), models.features, {"compile": {"enable": False}}, device="cpu", streams=2)
    assert model.streams is None
    assert any(note.startswith("one run at a time: the model is served eager") for note in model.report.notes)


@pytest.mark.parametrize(
    ("count", "threads", "found"), [(None, 1, 1), (None, 2, 2), (None, 6, 3), (None, 7, 2), (None, 16, 4), (3, 7, 3)]
)
def test_streams_share_the_threads(count: int | None, threads: int, found: int) -> None:
    assert check_streams(count, threads) == found


@pytest.mark.parametrize("count", [0, 3, True, "two"])
def test_more_streams_than_threads_are_refused(count: Any) -> None:
    with pytest.raises(ConfigError, match=r"streams.*use 1 to 2"):
        build(models.Mlp(), models.features, "eager", streams=count)


@pytest.mark.parametrize("backend", ENGINES[:1])
def test_streams_that_do_not_pay_are_given_up(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.streams.time_streams", lambda *args: (1e-4, 2.5e-4))
    model = build(models.Mlp(), models.features, backend, streams=None)
    assert model.streams is None
    assert model.report.streams == 1
    assert "one run at a time: 2 runs at a time do no more than 0.80 times" in " ".join(model.report.notes)


@pytest.mark.parametrize("backend", ENGINES[:1])
def test_a_run_that_other_processes_stalled_makes_no_stream_look_free(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optim.streams.time_streams", lambda *args: (1e6, 0.1))
    model = build(models.Mlp(), models.features, backend)
    assert model.streams is not None, model.report.notes
    assert all(cost == pytest.approx(0.05) for cost in model.streams.model.costs.values())


@pytest.mark.parametrize("backend", ENGINES[:1])
def test_where_a_warm_start_has_no_memory_for_them_the_plan_stays(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> CompiledModel:
        return build(models.Mlp().eval(), models.features, backend)

    cold = start()
    assert (cold.report.start, cold.report.streams) == ("cold", 2), cold.report.notes
    with monkeypatch.context() as patch:
        patch.setattr("optim.streams.is_room_for", lambda size: False)
        short = start()
    assert (short.report.start, short.report.streams, short.streams) == ("warm", 1, None)
    assert "might not leave half of the free memory" in " ".join(short.report.notes)
    assert not any(row.stream_ms or row.stream_gain for row in short.report.buckets)
    with monkeypatch.context() as patch:  # nor for a wider reference, which decides here
        patch.setattr("optim.trial.tolerance", lambda config: -1.0)
        patch.setattr("optim.reference.copy", SimpleNamespace(deepcopy=lambda module: torch.empty(1 << 60)))
        unproven = start()
    assert (unproven.report.start, unproven.report.streams, unproven.streams) == ("warm", 1, None)
    assert unproven.report.engines() == {"1": "eager", "4": "eager"}
    assert "one run at a time, though the plan has 2: bucket 1 is eager" in unproven.report.notes
    assert not any(row.stream_ms or row.stream_gain for row in unproven.report.buckets)
    again = start().report
    assert (again.start, again.streams) == ("warm", 2)


@pytest.mark.skipif(not CPU["openvino"].available, reason=CPU["openvino"].detail)
def test_buckets_of_several_lengths_share_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    compiled: list[int] = []
    compile_one = openvino.Core.compile_model

    def count(core: Any, model: Any, device: str, properties: dict[str, Any]) -> Any:
        compiled.append(properties["NUM_STREAMS"])
        return compile_one(core, model, device, properties)

    monkeypatch.setattr(openvino.Core, "compile_model", count)
    module = models.MaskedMean().eval()
    model = build(module, models.tokens, "openvino", lengths=(8, 16))
    assert model.streams is not None, model.report.notes
    assert compiled == [1, 2], "one for all buckets, and one for all on streams"
    with torch.no_grad():
        for rows, length in ((1, 8), (3, 11), (4, 16)):
            inputs = models.tokens(rows, length)
            assert compare(model.streams.model(*inputs), module(*inputs)).max_abs < 1e-4
