"""The variant of Inductor that has oneDNN multiply by the packed weights of linear layers."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from optim import CompiledModel, compile_model
from optim.engines import onednn
from tests.support.models import Mlp, features


def ask(module: nn.Module, **compiling: Any) -> CompiledModel:
    config = {
        "compile": {"backend": "inductor-onednn", "only_if_faster": False, **compiling},
        "cache": {"enable": False},
    }
    return compile_model(module, lambda rows, length: features(rows), config, batch_sizes=[1, 4], device="cpu")


def engines(model: CompiledModel) -> set[str]:
    return {bucket.engine for bucket in model.report.buckets}


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The weights that were packed, one after the other."""
    seen: list[torch.Tensor] = []
    reorder = onednn._reorder

    def look(weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight)
        return reorder(weight)

    monkeypatch.setattr(onednn, "_reorder", look)
    return seen


def forget_compiled_code() -> None:
    """Dynamo keeps it, and so the modules, by code object."""
    torch._dynamo.reset()
    gc.collect()


def test_buckets_and_models_of_one_module_share_one_packed_copy_of_each_weight(packings: list[torch.Tensor]) -> None:
    forget_compiled_code()
    others = len(onednn._packed)
    module = Mlp().eval()
    first, second = ask(module), ask(module)
    for rows in (1, 3, 4):
        x = features(rows)
        torch.testing.assert_close(first(*x), module(*x))
        torch.testing.assert_close(second(*x), module(*x))
    assert engines(first) == engines(second) == {"inductor-onednn"}
    assert first.report.after_ready.compilations == first.report.after_ready.failed_runs == 0
    assert len(packings) == 2  # the layers of an Mlp
    assert len(onednn._packed) == others + 2


def test_the_module_itself_is_left_as_it_was() -> None:
    module = Mlp().eval()
    ask(module)
    assert [type(layer) for layer in module.layers] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_weight_that_was_changed_is_packed_anew(packings: list[torch.Tensor]) -> None:
    module = Mlp().eval()
    before = ask(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-2)
    x = features(4)
    torch.testing.assert_close(before(*x), module(*x))
    assert before.report.after_ready.failed_runs == 1  # eager answered: what is packed is another weight
    after = ask(module)
    assert engines(after) == {"inductor-onednn"} and len(packings) == 4
    for model in (after, before):
        torch.testing.assert_close(model(*x), module(*x))
    assert after.report.after_ready.failed_runs == 0
    del after, model
    forget_compiled_code()
    before(*x)
    assert before.report.after_ready.failed_runs == 1


def test_weights_that_begin_at_one_address_have_their_own_copies() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.whole, self.part = nn.Linear(8, 16), nn.Linear(8, 8)
            self.part.weight = nn.Parameter(self.whole.weight.detach()[:8])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.whole(x), self.part(x)], -1)

    module = Halves().eval()
    assert module.part.weight.data_ptr() == module.whole.weight.data_ptr()
    model = ask(module)
    assert engines(model) == {"inductor-onednn"}
    torch.testing.assert_close(model(*features(4)), module(*features(4)))


def test_a_module_that_is_one_layer() -> None:
    torch.manual_seed(0)
    module = nn.Linear(8, 3).eval()
    model = ask(module)
    assert engines(model) == {"inductor-onednn"}
    torch.testing.assert_close(model(*features(4)), module(*features(4)))


def test_layers_that_compute_something_else_are_not_packed(packings: list[torch.Tensor]) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    def add_one(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 1

    torch.manual_seed(0)
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(add_one)
    module = nn.Sequential(hooked, Doubled(8, 8), nn.Linear(8, 64)).eval()
    model = ask(module)
    assert engines(model) == {"inductor-onednn"}
    assert [tuple(weight.shape) for weight in packings] == [(64, 8)]
    torch.testing.assert_close(model(*features(4)), module(*features(4)))


def test_weights_that_change_places_are_not_taken_for_each_other() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    model = ask(module)
    first, second = module[0].weight, module[2].weight
    first.data, second.data = second.data, first.data
    torch.testing.assert_close(model(*features(4)), module(*features(4)))
    assert engines(model) == {"inductor-onednn"} and model.report.after_ready.failed_runs == 1


def test_packed_copies_go_with_the_last_model_that_uses_them() -> None:
    forget_compiled_code()
    others = len(onednn._packed)
    model = ask(Mlp().eval())
    assert len(onednn._packed) == others + 2
    del model
    forget_compiled_code()
    assert len(onednn._packed) == others


def test_bfloat16_is_packed_too(packings: list[torch.Tensor]) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    module = Mlp().eval().to(torch.bfloat16)
    config = {"compile": {"backend": "inductor-onednn", "only_if_faster": False}, "cache": {"enable": False}}
    model = compile_model(
        module, lambda rows, length: features(rows)[0].bfloat16(), config, batch_sizes=[4], device="cpu"
    )
    assert engines(model) == {"inductor-onednn"} and len(packings) == 2
    x = features(4)[0].bfloat16()
    torch.testing.assert_close(model(x), module(x))


def test_modules_and_settings_that_it_is_not_for_are_refused() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = nn.Parameter(torch.randn(1000, 8)), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(x @ self.rows.t() @ self.rows)
            return found

    model = ask(Rows().eval())
    assert engines(model) == {"eager"}
    assert "not the weights of linear layers" in str(model.report.refusals[0])
