"""The variant of Inductor that has oneDNN multiply by float32 weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optim import compile_model
from optim.monitor import count_compilations
from tests.support.models import Mlp, features


def ask(module: nn.Module, name: str) -> tuple[str, list[str]]:
    config = {
        "compile": {"backend": name, "only_if_faster": False},
        "cache": {"enable": False},
    }
    model = compile_model(module, lambda rows, length: features(rows), config, batch_sizes=[1, 4], device="cpu")
    x = features(4)
    torch.testing.assert_close(model(*x), module(*x))
    assert model.report.after_ready.compilations == 0
    return model.report.buckets[0].engine, [str(refusal) for refusal in model.report.refusals]


def test_it_packs_for_onednn_while_it_builds_and_at_no_other_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.fx_passes import mkldnn_fusion

    packer: Any = mkldnn_fusion.CpuMkldnnDeviceOp
    before = packer.pack_linear_weight
    asked: list[bool] = []

    def look(self: Any, graph: Any, is_half: bool, *rest: Any) -> Any:
        asked.append(is_half)
        return before(self, graph, is_half, *rest)

    monkeypatch.setattr(packer, "pack_linear_weight", look)
    seen = count_compilations()
    assert ask(Mlp().eval(), "inductor-onednn") == ("inductor-onednn", [])
    assert count_compilations().graphs > seen.graphs
    assert asked and all(asked)
    asked.clear()
    assert ask(Mlp().eval(), "inductor")[0] == "inductor"
    assert asked and not any(asked)


def test_a_module_that_it_would_change_nothing_of_is_refused() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Mlp().to(torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.inner(x.to(torch.bfloat16)).float()
            return found

    engine, refusals = ask(Half().eval(), "inductor-onednn")
    assert engine == "eager"
    assert "not those of float32 linear layers" in refusals[0]
