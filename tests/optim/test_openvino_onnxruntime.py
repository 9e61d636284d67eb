"""Engines that convert the module: OpenVINO and ONNX Runtime; and the ones that lay its memory out anew."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optim.device
from optim import Bucket, CompiledModel, compile_model
from optim.device import inspect_device
from optim.engines import onnxruntime
from optim.shapes import Example
from optim.trial import Trial
from optim.verify import compare
from tests.support import models

CPU = inspect_device(torch.device("cpu")).capabilities
ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(not CPU[name].available, reason=CPU[name].detail))
    for name in ("openvino", "onnxruntime")
]


def build(module: nn.Module, example: Example, backend: str, **more: Any) -> CompiledModel:
    section = {"compile": {"backend": backend, "only_if_faster": False}}
    return compile_model(module, example, section, device="cpu", **{"batch_sizes": (1, 4), **more})


class FixedGroups(nn.Module):
    """[B, 8] -> [B, 8]; exports for one batch size only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([row * 2 for row in x.unbind(0)]).reshape(x.shape)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize(
    ("module", "example", "lengths"),
    [
        (models.Mlp(), models.features, None),
        (models.SmallCnn(), models.images, None),
        (models.Nested(), models.features, None),
        (models.MaskedMean(), models.tokens, (4, 8)),
    ],
)
def test_every_bucket_answers_as_eager(
    module: nn.Module, example: Example, lengths: tuple[int, ...] | None, backend: str
) -> None:
    model = build(module.eval(), example, backend, lengths=lengths)
    assert set(model.report.engines().values()) == {backend}, model.report.all_refusals()
    for rows in (1, 3, 4, 9):
        inputs = example(rows, lengths[1] - 1 if lengths else None)
        with torch.no_grad():
            got, want = model(*inputs), module(*inputs)
        assert type(got) is type(want)
        assert compare(got, want).max_abs < 1e-4
    after = model.report.after_ready
    assert (after.compilations, after.failed_runs, after.shapes_without_bucket) == (0, 0, 0)


@pytest.mark.parametrize("backend", ENGINES)
def test_an_output_survives_the_next_run(backend: str) -> None:
    model = build(models.Mlp(), models.features, backend, batch_sizes=(2,))
    first = model(*models.features(2))
    kept = first.clone()
    model(torch.full((2, 8), 7.0))
    assert torch.equal(first, kept)


@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
def test_a_module_that_fixes_its_sizes_is_exported_bucket_by_bucket() -> None:
    module = FixedGroups().eval()
    model = build(module, models.features, "onnxruntime")
    assert set(model.report.engines().values()) == {"onnxruntime"}, model.report.all_refusals()
    again = build(module, models.features, "onnxruntime")
    assert (model.report.start, again.report.start) == ("cold", "warm"), again.report.notes
    for built in (model, again):
        assert any("onnxruntime: each bucket is exported for itself" in note for note in built.report.notes)
    for rows in (1, 3, 4, 5):
        torch.testing.assert_close(model(*models.features(rows)), module(*models.features(rows)))
        torch.testing.assert_close(again(*models.features(rows)), module(*models.features(rows)))


@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
@pytest.mark.parametrize("raced", [False, True])
def test_exported_files_are_gone_once_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raced: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    module = models.SlowMlp().eval()
    if raced:
        section = {"tune": {"engines": ["onnxruntime"]}}
        model = compile_model(module, models.features, section, batch_sizes=(1, 4), device="cpu")
    else:
        model = build(module, models.features, "onnxruntime")
    assert set(model.report.engines().values()) == {"onnxruntime"}, model.report.all_refusals()
    (home,) = tmp_path.glob("pt2-*")  # others than we may leave files of their own
    assert list(home.iterdir()) == []
    torch.testing.assert_close(model(*models.features(3)), module(*models.features(3)))


@pytest.mark.parametrize("backend", ENGINES)
def test_a_dtype_that_numpy_has_not_is_refused(backend: str) -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.bfloat16()

    model = build(Half(), models.features, backend)
    assert set(model.report.engines().values()) == {"eager"}
    assert "bfloat16" in model.report.refusals[0].message


@pytest.mark.skipif(not CPU["openvino"].available, reason=CPU["openvino"].detail)
def test_where_memory_is_short_buckets_share_a_model_with_free_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim.device, "available_bytes", lambda: 0)
    module = models.Mlp().eval()
    model = build(module, models.features, "openvino")
    assert set(model.report.engines().values()) == {"openvino"}, model.report.all_refusals()
    assert "openvino: buckets 4, 1 share a model with free shapes for want of memory" in model.report.notes
    for rows in (1, 3, 9):
        torch.testing.assert_close(model(*models.features(rows)), module(*models.features(rows)))


@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
def test_onnxruntime_tells_nobody_what_is_served(tmp_path: Path) -> None:
    script = """
from optim import compile_model
from tests.support import models
section = {"compile": {"backend": "onnxruntime", "only_if_faster": False}, "cache": {"enable": False}}
model = compile_model(models.Mlp(), models.features, section, batch_sizes=(1,), device="cpu")
assert model.report.engines() == {"1": "onnxruntime"}, model.report
"""
    given = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment = {**given, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, env=environment)
    # Else it has a device id there, and what is yet to be sent.
    assert [path for path in tmp_path.rglob("*") if "Microsoft" in path.parts] == []


class UnknownToOpenVino(nn.Module):
    """[B, 8] -> [B, 8]; traces, and has an operator that OpenVINO does not convert."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i0e(x)  # type: ignore[no-any-return]


@pytest.mark.skipif(not CPU["openvino"].available, reason=CPU["openvino"].detail)
def test_a_conversion_that_fails_silences_nobody() -> None:
    before = logging.getLogger().level, list(logging.getLogger().handlers)
    model = build(UnknownToOpenVino().eval(), models.features, "openvino")
    assert set(model.report.engines().values()) == {"eager"}
    assert "i0e" in str(model.report.all_refusals())
    assert (logging.getLogger().level, logging.getLogger().handlers) == before


def without_grad(module: nn.Module, *inputs: torch.Tensor) -> Any:
    with torch.no_grad():
        return module(*inputs)


class Convolved(nn.Module):
    """[B, T] tokens, [B, T] mask -> [B, T]; takes lengths of 5 and more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 5)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found = self.conv((ids * mask).float().unsqueeze(1))
        return found.mean((1, 2)).unsqueeze(1) * mask  # type: ignore[no-any-return]


@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
def test_a_module_that_takes_larger_sizes_alone_is_exported_once() -> None:
    module = Convolved().eval()
    model = build(module, models.tokens, "onnxruntime", lengths=(8, 12))
    assert set(model.report.engines().values()) == {"onnxruntime"}, model.report.all_refusals()
    assert not any("each bucket is exported for itself" in note for note in model.report.notes), model.report.notes
    for rows, length in ((1, 8), (3, 9), (4, 12)):
        inputs = models.tokens(rows, length)
        assert compare(model(*inputs), without_grad(module, *inputs)).max_abs < 1e-4
    assert model.report.after_ready.failed_runs == 0


@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
def test_sizes_that_no_example_showed_to_be_free_get_exports_of_their_own() -> None:
    def example(rows: int, length: int | None) -> tuple[torch.Tensor, ...]:
        if rows not in (1, 4):
            raise ValueError("1 or 4 rows")
        return models.features(rows, length)

    module = models.Mlp().eval()
    model = build(module, example, "onnxruntime")
    assert set(model.report.engines().values()) == {"onnxruntime"}, model.report.all_refusals()
    torch.testing.assert_close(model(*models.features(1)), without_grad(module, *models.features(1)))


@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
@pytest.mark.parametrize(
    ("module", "example", "lengths"),
    [(models.SmallCnn(), models.images, None), (models.MaskedMean(), models.tokens, (4, 8))],
)
def test_the_buckets_of_onnxruntime_share_one_session_for_each_number_of_threads(
    module: nn.Module, example: Example, lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    open_one, before = onnxruntime._open, torch.get_num_threads()

    def count(path: Path) -> Any:
        opened.append(torch.get_num_threads())
        return open_one(path)

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "_open", count)
        torch.set_num_threads(2)
        try:
            for start in ("cold", "warm"):
                model = build(module.eval(), example, "onnxruntime", lengths=lengths, streams=2)
                assert set(model.report.engines().values()) == {"onnxruntime"}, model.report.all_refusals()
                assert model.report.start == start, model.report.notes
                assert model.streams is not None, model.report.notes
                assert opened == [2, 1], start
                opened.clear()
        finally:
            torch.set_num_threads(before)


@pytest.mark.skipif(not CPU["openvino"].available, reason=CPU["openvino"].detail)
def test_streams_of_openvino_compile_the_same_converted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    loaded: list[str] = []
    read, convert, before = openvino.Core.read_model, openvino.convert_model, torch.get_num_threads()

    def count(what: str, call: Any) -> Any:
        def counted(*args: Any, **more: Any) -> Any:
            loaded.append(what)
            return call(*args, **more)

        return counted

    monkeypatch.setattr(openvino.Core, "read_model", count("read", read))
    monkeypatch.setattr(openvino, "convert_model", count("converted", convert))
    torch.set_num_threads(2)
    try:
        for what in ("converted", "read"):
            module = models.MaskedMean().eval()
            model = build(module, models.tokens, "openvino", lengths=(4, 8), streams=2)
            assert model.streams is not None, model.report.notes
            assert loaded == [what]
            loaded.clear()
            inputs = models.tokens(3, 7)
            assert compare(model.streams.model(*inputs), without_grad(module, *inputs)).max_abs < 1e-4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ENGINES)
def test_where_lengths_differ_every_size_is_run_as_it_is(backend: str) -> None:
    module = models.MaskedMean().eval()
    model = build(module, models.tokens, backend, lengths=(4, 8))
    assert set(model.report.engines().values()) == {backend}, model.report.all_refusals()
    assert not model.pads
    for rows in range(1, 5):
        for length in range(1, 9):
            inputs = models.tokens(rows, length)
            assert compare(model(*inputs), without_grad(module, *inputs)).max_abs < 1e-4
            assert model.size_run(rows, length) == rows * length
    assert model.report.after_ready.failed_runs == 0


class Quarters(nn.Module):
    """[B, T] tokens, [B, T] mask -> [B, T]; takes lengths that are multiples of 4 alone."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = (ids * mask).float()
        return x.view(x.shape[0], x.shape[1] // 4, 4).cumsum(-1).flatten(1) * 0.5


class OddOnes(models.MaskedMean):
    """Goes another way for odd lengths, which a trace of an even one has not seen."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(ids // 2 if ids.shape[1] % 2 else ids, mask)


NEEDS_OPENVINO = pytest.mark.skipif(not CPU["openvino"].available, reason=CPU["openvino"].detail)
HOW: dict[str, dict[str, dict[str, Any]]] = {
    "openvino, named": {"compile": {"backend": "openvino", "only_if_faster": False}},
    "openvino, in the background": {
        "compile": {"backend": "openvino", "only_if_faster": False, "when": "background"},
    },
    "openvino, raced": {"compile": {"only_if_faster": False}, "tune": {"engines": ["openvino"], "budget_s": 60}},
    "onnxruntime, named": {"compile": {"backend": "onnxruntime", "only_if_faster": False}},
}


def padded(
    module: nn.Module, example: Example = models.tokens, how: str = "openvino, named", streams: int = 1
) -> CompiledModel:
    """Build, and check that the one engine serves every bucket, and nothing between them."""
    grid: dict[str, Any] = {"batch_sizes": (1, 4), "lengths": (4, 8, 12)}
    model = compile_model(module.eval(), example, HOW[how], streams=streams, device="cpu", **grid)
    if model.background is not None:
        model.background.run(lambda change: change())
    assert set(model.report.engines().values()) == {how.partition(",")[0]}, model.report.all_refusals()
    assert model.pads
    why = ("what is smaller than its bucket is padded: ", "each bucket is exported for itself: ")
    assert any(said in note for note in model.report.notes for said in why)
    return model


@NEEDS_OPENVINO
@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("module", "sizes"), [(Quarters(), [(1, 8), (3, 12)]), (OddOnes(), [(2, 8), (4, 12)])])
def test_no_size_between_buckets_is_taken_that_would_be_answered_wrongly(
    module: nn.Module, sizes: list[tuple[int, int]], how: str
) -> None:
    """OpenVINO looks at no size and computes something for each; ONNX's export of such a module fixes the sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cold, again = (padded(module, how=how, streams=2) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert again.report.start == "warm", again.report.notes
    for model in (cold, again):
        assert model.streams is not None, model.report.notes
        assert model.streams.model.pads
        for rows, length in sizes:
            inputs = models.tokens(rows, length)
            for served in (model, model.streams.model):
                assert compare(served(*inputs), without_grad(module, *inputs)).max_abs < 1e-4


def rounded(rows: int, length: int | None = None) -> tuple[torch.Tensor, ...]:
    return models.tokens(rows, -(-(length or 0) // 4) * 4)


@NEEDS_OPENVINO
def test_an_example_of_another_size_proves_nothing() -> None:
    model = padded(Quarters(), rounded)
    assert any("there is no example of size 1x1" in note for note in model.report.notes)


@NEEDS_OPENVINO
@pytest.mark.any_torch
def test_sizes_that_there_is_no_time_to_prove_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(self: Trial) -> None:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(Trial, "_find_wrong_size", hang)
    monkeypatch.setattr("optim.start.ENGINE_LIMIT_S", 40.0)
    padded(models.MaskedMean())


@NEEDS_OPENVINO
def test_a_module_that_openvino_takes_in_fixed_shapes_alone_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    compile_one = openvino.Core.compile_model

    def fixed_alone(core: Any, model: Any, *more: Any) -> Any:
        if model.is_dynamic():
            raise RuntimeError("to_shape was called on a dynamic shape")
        return compile_one(core, model, *more)

    monkeypatch.setattr(openvino.Core, "compile_model", fixed_alone)
    padded(models.MaskedMean())


@pytest.mark.skipif(not CPU["openvino"].available, reason=CPU["openvino"].detail)
@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
def test_beside_code_for_any_size_a_bucket_of_its_own_shape_is_padded_to(monkeypatch: pytest.MonkeyPatch) -> None:
    module = models.MaskedMean().eval()
    model = build(module, models.tokens, "onnxruntime", lengths=(4, 8))
    monkeypatch.setattr(Trial, "_find_wrong_size", lambda self: "as if one were answered wrongly")
    other = build(module, models.tokens, "openvino", lengths=(4, 8))
    fixed = Bucket(4, 8)
    for bucket, row in zip(model._ms, other.report.buckets, strict=True):
        assert row.bucket == bucket
        # Whichever was the quicker: one run of four rows costs less than four of one.
        model._ms[bucket] = row.ms = bucket.tokens**0.5
    model.move_over({fixed: other._lanes[fixed]}, [row for row in other.report.buckets if row.bucket == fixed])
    assert model.pads
    assert (model.size_run(1, 7), model.size_run(3, 3)) == (7, 9)
    assert model.size_run(4, 7) == 32
    for rows, length in ((1, 7), (3, 3), (4, 7), (6, 7)):
        inputs = models.tokens(rows, length)
        assert compare(model(*inputs), without_grad(module, *inputs)).max_abs < 1e-4
    after = model.report.after_ready
    assert (after.failed_runs, after.shapes_without_bucket) == (0, 0)


def test_channels_last_answers_as_eager() -> None:
    module = models.SmallCnn().eval()
    model = build(module, models.images, "channels_last")
    assert set(model.report.engines().values()) == {"channels_last"}, model.report.all_refusals()
    with torch.no_grad():
        for rows in (1, 3, 5):
            inputs = models.images(rows)
            torch.testing.assert_close(model(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)
    assert module.conv.weight.is_contiguous()  # the caller's module stays what it was


def test_channels_last_is_for_convolutions() -> None:
    model = build(models.Mlp(), models.features, "channels_last")
    assert model.report.refusals[0].message == "the module has no 2-d convolutions"


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(not CPU[needs].available, reason=CPU[needs].detail))
        for name, needs in (("openvino", "openvino"), ("inductor", "cxx"))
    ],
)
@pytest.mark.skipif(not CPU["bfloat16"].available, reason=CPU["bfloat16"].detail)
def test_autocast_computes_in_bf16_and_answers_in_eagers_dtype(backend: str) -> None:
    section = {"compile": {"backend": backend, "only_if_faster": False}, "autocast": True}
    model = compile_model(models.SmallCnn(), models.images, section, batch_sizes=(2,), device="cpu")
    (bucket,) = model.report.buckets
    assert bucket.engine == backend, bucket.refusals
    assert model(*models.images(2)).dtype == torch.float32
    assert (bucket.max_abs_error or 0) > 1e-5
    assert bucket.tolerance == 2e-2
