from __future__ import annotations

import errno
import logging
import os
import tempfile
from typing import Any

import pytest
import torch
from torch import nn

from optim import Bucket, CompiledModel, CompileError, ConfigError, ModelError, compile_model
from tests.support import backends, models

assert backends.BACKENDS  # importing the module registers them


def use(backend: str, **more: Any) -> dict[str, Any]:
    """A pt2 section with one of the test backends; kept whatever its speed, so no test depends on time."""
    section: dict[str, Any] = {"compile": {"backend": f"pt2test_{backend}", "only_if_faster": False}}
    section["compile"].update(more.pop("compile", {}))
    return {**section, **more}


def equal_to_eager(model: CompiledModel, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)


def test_every_bucket_is_compiled_and_any_number_of_rows_is_answered() -> None:
    module = models.Mlp().eval()
    model = compile_model(module, models.features, use("faithful"), device="cpu")
    assert model.report.engines() == dict.fromkeys("1248", "pt2test_faithful")
    assert [(b.max_abs_error, b.tolerance) for b in model.report.buckets] == [(0.0, 1e-3)] * 4
    for rows in (1, 2, 3, 5, 8, 9, 21):
        equal_to_eager(model, module, models.features(rows))
    after = model.report.after_ready
    assert (after.calls, after.compilations, after.refused_compilations) == (7, 0, 0)
    assert after.shapes_without_bucket == 0


def test_nothing_is_compiled_after_construction() -> None:
    module = models.Mlp().eval()
    model = compile_model(module, models.features, use("faithful"), batch_sizes=(2,), device="cpu")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    double = torch.randn(2, 8, dtype=torch.float64)
    module.double()
    assert model(double).dtype == torch.float64  # no bucket: eager
    module.float()
    torch.set_num_threads(torch.get_num_threads())
    with torch.autocast("cpu", torch.bfloat16):  # a guard fails, so the call would compile
        model(*models.features(2))
    after = model.report.after_ready
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert (after.shapes_without_bucket, after.refused_compilations, after.compilations) == (1, 1, 0)
    assert any(r.stage == "serving" for r in model.report.refusals)


@pytest.mark.parametrize(
    ("backend", "stage", "text"),
    [
        ("raises", "warm-up", "this backend cannot compile anything"),
        ("raises_at_call", "warm-up", "this backend's code cannot run"),
        ("wrong", "verify", "over the tolerance"),
        ("makes_nan", "verify", "not finite"),
        ("wrong_dtype", "verify", "dtype torch.float64, eager gives torch.float32"),
        ("stale", "verify", "over the tolerance"),
    ],
)
def test_a_failure_means_eager_with_the_reason(
    backend: str, stage: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = models.Mlp().eval()
    with caplog.at_level(logging.INFO, "optim"):
        model = compile_model(module, models.features, use(backend), batch_sizes=(1, 2), device="cpu")
    assert set(model.report.engines().values()) == {"eager"}
    for bucket in model.report.buckets:
        (refusal,) = bucket.refusals
        assert (refusal.stage, refusal.engine) == (stage, f"pt2test_{backend}")
        assert text in refusal.message
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert text in warnings[0].message
    equal_to_eager(model, module, models.features(3))


def test_only_the_bucket_that_fails_is_served_eager() -> None:
    module = models.Mlp().eval()
    model = compile_model(module, models.features, use("raises_on_four_rows"), device="cpu")
    expected = {"1": "compiled", "2": "compiled", "4": "eager", "8": "compiled"}
    assert {k: "eager" if v == "eager" else "compiled" for k, v in model.report.engines().items()} == expected
    for rows in range(1, 10):
        equal_to_eager(model, module, models.features(rows))
    assert model.report.after_ready.compilations == 0


def test_slower_than_eager_is_not_used() -> None:
    config = use("slow", compile={"only_if_faster": True})
    model = compile_model(models.Mlp(), models.features, config, batch_sizes=(1,), device="cpu")
    (bucket,) = model.report.buckets
    assert bucket.engine == "eager"
    assert bucket.refusals[0].stage == "time"


def test_code_that_serves_nothing_is_let_go_and_other_code_of_the_class_stays() -> None:
    before = len(backends.SLOW)
    serves = compile_model(models.Mlp(), models.features, use("slow"), batch_sizes=(1, 4), device="cpu")
    assert len(backends.SLOW) == before + 2
    config = use("slow", compile={"only_if_faster": True})
    loses = compile_model(models.Mlp(), models.features, config, batch_sizes=(1, 4), device="cpu")
    assert (set(serves.report.engines().values()), set(loses.report.engines().values())) == (
        {"pt2test_slow"},
        {"eager"},
    )
    assert len(backends.SLOW) == before + 2
    for rows in (1, 3, 4):
        equal_to_eager(serves, models.Mlp().eval(), models.features(rows))
    assert (serves.report.after_ready.compilations, serves.report.after_ready.refused_compilations) == (0, 0)


def test_fallback_fail_makes_failures_fatal_but_not_slowness() -> None:
    with pytest.raises(CompileError, match="cannot compile anything"):
        compile_model(models.Mlp(), models.features, use("raises", fallback="fail"), batch_sizes=(1,), device="cpu")
    slow = use("slow", fallback="fail", compile={"only_if_faster": True})
    compile_model(models.Mlp(), models.features, slow, batch_sizes=(1,), device="cpu")


def test_out_of_memory_is_never_a_compile_failure() -> None:
    with pytest.raises(Exception) as caught:
        compile_model(models.Mlp(), models.features, use("out_of_memory"), batch_sizes=(1,), device="cpu")
    from optim import is_device_error

    assert is_device_error(caught.value)


@pytest.mark.parametrize(
    "section",
    [
        {"compile": {"backend": "pt2test_faithful"}},
        {"compile": {"backend": "pt2test_faithful", "when": "background"}},
        {"tune": {"engines": ["pt2test_faithful", "pt2test_wrong"]}},
    ],
)
def test_without_room_for_a_temporary_folder_it_is_compiled_all_the_same(
    section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **more: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), tempfile.gettempdir())

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    section = {**section, "compile": {**section.get("compile", {}), "only_if_faster": False}}
    model = compile_model(models.Mlp(), models.features, section, batch_sizes=(1, 4), device="cpu")
    assert set(model.report.engines().values()) == {"pt2test_faithful"}
    assert any("nothing is left for later starts: there can be no" in note for note in model.report.notes)
    equal_to_eager(model, models.Mlp().eval(), models.features(3))


def test_the_models_own_error_is_raised_as_such() -> None:
    with pytest.raises(ModelError, match="ValueError: this model never works"):
        compile_model(models.Failing(), models.features, use("faithful"), device="cpu")


def test_a_backend_that_is_known_but_absent_is_a_fallback() -> None:
    name = "torch_tensorrt"
    model = compile_model(models.Mlp(), models.features, name, batch_sizes=(1,), device="cpu")
    assert model.report.engines() == {"1": "eager"}
    assert "torch-tensorrt" in model.report.refusals[0].message


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (models.Counting(), "changes its own state when called (calls)"),
        (models.Noisy(), "different answers to the same input"),
    ],
)
def test_what_cannot_be_verified_stays_eager(module: nn.Module, text: str) -> None:
    model = compile_model(module, models.features, use("faithful"), batch_sizes=(1, 2), device="cpu")
    assert set(model.report.engines().values()) == {"eager"}
    assert text in model.report.refusals[0].message


def test_rows_that_depend_on_each_other_are_never_padded() -> None:
    module = models.Centering().eval()
    model = compile_model(module, models.features, use("faithful"), batch_sizes=(1, 4), device="cpu")
    assert not model.report.padding
    for rows in (1, 3, 4, 6):
        equal_to_eager(model, module, models.features(rows))
    assert model.report.after_ready.shapes_without_bucket == 2


def test_outputs_keep_their_structure() -> None:
    module = models.Nested().eval()
    model = compile_model(module, models.features, use("faithful"), device="cpu")
    for rows in (1, 3, 11):
        inputs = models.features(rows)
        got, want = model(*inputs), module(*inputs)
        assert isinstance(got[0], models.Pair)
        assert got[2] == "done"
        torch.testing.assert_close(got[:2], want[:2])
        assert got[0].second.shape == (rows,)


def test_lengths_are_padded_to_their_bucket_and_cut_again() -> None:
    module = models.MaskedMean().eval()
    model = compile_model(module, models.tokens, use("faithful"), batch_sizes=(1, 4), lengths=(8, 16), device="cpu")
    assert model.buckets == (Bucket(1, 8), Bucket(1, 16), Bucket(4, 8), Bucket(4, 16))
    for rows, length in ((1, 5), (3, 8), (4, 13), (7, 16)):
        inputs = models.tokens(rows, length)
        got, want = model(*inputs), module(*inputs)
        assert got["tokens"].shape == (rows, length, 6)
        torch.testing.assert_close(got, want)
    assert model.report.after_ready.shapes_without_bucket == 0
    assert model(*models.tokens(1, 17))["tokens"].shape == (1, 17, 6)  # no bucket: eager, and counted
    assert model.report.after_ready.shapes_without_bucket == 1


def test_code_that_ignores_the_mask_is_found_although_the_examples_have_none() -> None:
    config = use("blind_to_masks")
    model = compile_model(models.MaskedMean(), models.tokens, config, batch_sizes=(2,), lengths=(8,), device="cpu")
    assert set(model.report.engines().values()) == {"eager"}
    assert model.report.buckets[0].refusals[0].stage == "verify"


def test_a_model_that_is_not_to_be_compiled() -> None:
    model = compile_model(models.Mlp(), models.features, {"compile": {"enable": False}}, device="cpu")
    assert model.report.candidates == []
    assert set(model.report.engines().values()) == {"eager"}
    assert all(bucket.ms for bucket in model.report.buckets)


def test_data_dependent_control_flow_is_answered_right() -> None:
    module = models.Branchy().eval()
    model = compile_model(module, models.features, use("faithful"), batch_sizes=(1, 2), device="cpu")
    for sign in (1, -1):
        equal_to_eager(model, module, (sign * torch.ones(2, 8),))


def test_the_argument_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"batch_sizes: 0 is not allowed; use whole numbers above 0"):
        compile_model(models.Mlp(), models.features, batch_sizes=(0,))
    with pytest.raises(ConfigError, match="example: 'list_iterator'"):
        compile_model(models.Mlp(), lambda b, n: iter([b]), batch_sizes=(1,))


def test_the_report_is_plain_data() -> None:
    import json

    model = compile_model(models.Mlp(), models.features, use("faithful"), batch_sizes=(1,), device="cpu")
    plain = json.loads(json.dumps(model.report.to_dict()))
    assert plain["buckets"][0]["engine"] == "pt2test_faithful"
    assert plain["device"]["capabilities"]["cuda"]["available"] in (True, False)
    assert plain["config"]["compile"]["backend"] == "pt2test_faithful"


def test_odd_strides_do_not_miss_their_bucket() -> None:
    module = models.Mlp().eval()
    model = compile_model(module, models.features, use("faithful"), batch_sizes=(1, 2), device="cpu")
    wide = torch.randn(8, 6).t()  # [6, 8], not contiguous
    equal_to_eager(model, module, (wide[2:4],))
    equal_to_eager(model, module, (torch.randn(5, 8)[4:].as_strided((1, 8), (99, 1)),))
    equal_to_eager(model, module, (torch.randn(2, 8, requires_grad=True),))
    assert model.report.after_ready.refused_compilations == 0


def test_an_example_that_knows_only_the_declared_lengths_is_enough() -> None:
    def example(batch_size: int, length: int | None) -> tuple[torch.Tensor, ...]:
        if length not in (8, 16):
            raise KeyError(length)
        return models.tokens(batch_size, length)

    module = models.MaskedMean().eval()
    model = compile_model(module, example, use("faithful"), batch_sizes=(1, 2), lengths=(8, 16), device="cpu")
    assert set(model.report.engines().values()) == {"pt2test_faithful"}, model.report.all_refusals()
    assert any("not verified with a shorter example" in note for note in model.report.notes)
    inputs = models.tokens(2, 11)
    torch.testing.assert_close(model(*inputs), module(*inputs))
