"""The variant of Inductor that writes the products of one row itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optim import CompiledModel, compile_model
from optim.verify import compare
from tests.support.models import Mlp, SmallCnn, features, images


def ask(
    module: nn.Module,
    batch_sizes: list[int],
    dtype: torch.dtype = torch.float32,
    backend: str = "inductor-gemv",
    **settings: Any,
) -> CompiledModel:
    config = {"compile": {"backend": backend, "only_if_faster": False}, "cache": {"enable": False}, **settings}
    return compile_model(
        module, lambda rows, length: features(rows)[0].to(dtype), config, batch_sizes=batch_sizes, device="cpu"
    )


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_one_row_is_its_own_and_more_are_not(dtype: torch.dtype, most: float) -> None:
    module = Mlp().eval().to(dtype)
    model = ask(module, [1, 4], dtype)
    assert model.report.engines() == {"1": "inductor-gemv", "4": "eager"}
    assert [str(refusal) for refusal in model.report.all_refusals()] == [
        "inductor-gemv was refused at preflight for bucket 4: products are written out for one row"
    ]
    for rows in (1, 4):
        x = features(rows)[0].to(dtype)
        assert compare(model(x), module(x)).max_abs < most
    assert model.report.after_ready.compilations == model.report.after_ready.failed_runs == 0
    assert [type(layer) for layer in module.layers] == [nn.Linear, nn.ReLU, nn.Linear]


def test_no_product_is_left_to_a_library() -> None:
    module, x = nn.Linear(512, 2048).eval(), torch.randn(1, 512)
    products = {}
    for backend in ("inductor-gemv", "inductor-unfrozen"):
        config = {"compile": {"backend": backend, "only_if_faster": False}, "cache": {"enable": False}}
        model = compile_model(
            module, lambda rows, length: torch.randn(rows, 512), config, batch_sizes=[1], device="cpu"
        )
        assert model.report.engines() == {"1": backend}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            model(x)
        products[backend] = [event.name for event in seen.events() or () if event.name in ("aten::mm", "aten::addmm")]
    assert products == {"inductor-gemv": [], "inductor-unfrozen": ["aten::addmm"]}


def test_a_weight_that_was_changed_is_seen() -> None:
    module = Mlp().eval()
    model = ask(module, [1])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-2)
    x = features(1)
    torch.testing.assert_close(model(*x), module(*x))
    assert model.report.after_ready.failed_runs == 0


@pytest.mark.parametrize(
    ("batch_sizes", "asked", "reason"),
    [([2, 4], {}, "no bucket has one"), ([1], {"autocast": True}, "autocast")],
)
def test_what_it_is_not_for_is_refused(batch_sizes: list[int], asked: dict[str, Any], reason: str) -> None:
    model = ask(Mlp().eval(), batch_sizes, **asked)
    assert set(model.report.engines().values()) == {"eager"}
    assert reason in str(model.report.refusals[0])


def test_modules_of_other_layers_are_refused() -> None:
    config = {"compile": {"backend": "inductor-gemv"}, "cache": {"enable": False}}
    model = compile_model(SmallCnn().eval(), images, config, batch_sizes=[1], device="cpu")
    assert "most of its parameters are not" in str(model.report.refusals[0])
