from __future__ import annotations

import pytest
import torch

from optim import compile_model
from optim.device import inspect_device
from optim.engines.tracing import fold_padding
from optim.values import reads_values
from tests.support import models

CAPABILITIES = inspect_device(torch.device("cpu")).capabilities
needs_ipex = [
    pytest.mark.ipex,
    pytest.mark.skipif(not CAPABILITIES["ipex"].available, reason=CAPABILITIES["ipex"].detail),
]
KEEP = {"only_if_faster": False}


class TestWithIpex:
    pytestmark = needs_ipex

    @pytest.mark.parametrize("backend", ["ipex", pytest.param("ipex-compile", marks=pytest.mark.slow)])
    def test_every_bucket_answers_as_eager(self, backend: str) -> None:
        module = models.SmallCnn().eval()
        section = {"compile": {"backend": backend, **KEEP}}
        model = compile_model(module, models.images, section, batch_sizes=(1, 3), device="cpu")
        assert set(model.report.engines().values()) == {backend}, model.report.all_refusals()
        with torch.no_grad():
            for rows in (1, 2, 3, 7):
                inputs = models.images(rows)
                torch.testing.assert_close(model(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)

    def test_outputs_keep_their_structure(self) -> None:
        module = models.Nested().eval()
        section = {"compile": {"backend": "ipex", **KEEP}}
        model = compile_model(module, models.features, section, batch_sizes=(1, 4), device="cpu")
        assert set(model.report.engines().values()) == {"ipex"}, model.report.all_refusals()
        got, want = model(*models.features(3)), module(*models.features(3))
        assert isinstance(got[0], models.Pair)
        torch.testing.assert_close(got[0], want[0])
        assert got[2] == "done"

    def test_what_a_trace_would_bake_in_is_refused(self) -> None:
        section = {"compile": {"backend": "ipex", **KEEP}}
        module = models.Branchy().eval()
        model = compile_model(module, models.features, section, batch_sizes=(1,), device="cpu")
        assert model.report.engines() == {"1": "eager"}
        assert "reads tensor values in Python" in model.report.refusals[0].message
        for sign in (1, -1):
            x = sign * torch.ones(1, 8)
            torch.testing.assert_close(model(x), module(x))

    @pytest.mark.skipif(not CAPABILITIES["bfloat16"].available, reason=CAPABILITIES["bfloat16"].detail)
    def test_bfloat16_answers_in_eagers_dtype(self) -> None:
        section = {"compile": {"backend": "ipex", **KEEP}, "autocast": True}
        model = compile_model(models.SmallCnn(), models.images, section, batch_sizes=(2,), device="cpu")
        (bucket,) = model.report.buckets
        assert bucket.engine == "ipex", bucket.refusals
        assert model(*models.images(2)).dtype == torch.float32
        assert bucket.max_abs_error is not None
        assert bucket.max_abs_error > 1e-5


@pytest.mark.skipif(CAPABILITIES["ipex"].available, reason="IPEX is here")
def test_auto_without_ipex_says_so() -> None:
    model = compile_model(
        models.Mlp(), models.features, {"compile": {"backend": "ipex"}}, batch_sizes=(1,), device="cpu"
    )
    assert model.report.engines() == {"1": "eager"}
    assert model.report.refusals[0].message == CAPABILITIES["ipex"].detail


@pytest.mark.skipif(CAPABILITIES["bfloat16"].available, reason="this CPU has bf16 instructions")
def test_bfloat16_is_refused_where_it_would_be_emulated() -> None:
    section = {"autocast": True, "compile": {"backend": "inductor", **KEEP}}
    model = compile_model(models.Mlp(), models.features, section, batch_sizes=(1,), device="cpu")
    assert model.report.engines() == {"1": "eager"}
    assert any("autocast to bfloat16 is not there" in r.message for r in model.report.refusals)


def test_symmetric_zero_padding_moves_into_the_convolution() -> None:
    module = models.SmallCnn().eval()
    inputs = models.images(2)
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(module, inputs))
        before = [n.kind() for n in traced.graph.nodes() if "pad" in n.kind()]
        assert len(before) == 1
        assert fold_padding(traced.graph) == 1
        assert not [n.kind() for n in traced.graph.nodes() if "pad" in n.kind()]
        torch.testing.assert_close(traced(*inputs), module(*inputs))


@pytest.mark.parametrize(("padding", "value"), [((0, 1, 0, 1), 0.0), ((1, 1, 1, 1), 2.0), ((1, 1, 0, 1), 0.0)])
def test_other_padding_stays(padding: tuple[int, ...], value: float) -> None:
    module = models.SmallCnn().eval()
    module.pad = torch.nn.ConstantPad2d(padding, value)  # type: ignore[assignment, arg-type]
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(module, models.images(2)))
        assert fold_padding(traced.graph) == 0


@pytest.mark.parametrize("size", [15, 16])
@pytest.mark.parametrize(
    ("padding", "kernel"), [((0, 1, 0, 1), 3), ((1, 2, 1, 2), 5), ((2, 0, 0, 1), 3), ((3, 0, 1, 1), 4)]
)
def test_uneven_padding_moves_into_the_kernel_of_a_depthwise_convolution(
    padding: tuple[int, int, int, int], kernel: int, size: int
) -> None:
    module = torch.nn.Sequential(torch.nn.ZeroPad2d(padding), torch.nn.Conv2d(6, 6, kernel, stride=2, groups=6)).eval()
    inputs = torch.randn(2, 6, size, size)
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(module, inputs))
        assert fold_padding(traced.graph) == 1
        assert not [n.kind() for n in traced.graph.nodes() if "pad" in n.kind()]
        torch.testing.assert_close(traced(inputs), module(inputs))


def test_padding_before_a_transposed_convolution_stays() -> None:
    module = models.SmallCnn().eval()
    module.conv = torch.nn.ConvTranspose2d(3, 8, 3)  # type: ignore[assignment]
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(module, models.images(2)))
        assert fold_padding(traced.graph) == 0


def test_a_torch_without_jit_has_nobody_who_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.jit, "is_tracing")
    assert reads_values(models.Branchy(), models.features(1)) == ["aten::_local_scalar_dense"]


def test_reading_a_shape_is_not_reading_a_value() -> None:
    assert reads_values(models.SmallCnn(), models.images(1)) == []
    assert reads_values(models.Branchy(), models.features(1)) == ["aten::_local_scalar_dense"]
