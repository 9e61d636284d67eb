from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optim import ConfigError, compile_model
from optim.attention import matmul_precision
from optim.config import Pt2Config
from tests.support import models

#: What was allowed while something was compiled, and when its code ran: (flash, math, matmul precision).
seen: dict[str, list[tuple[bool, bool, str]]] = {"compiled": [], "run": [], "eager": []}


def allowed() -> tuple[bool, bool, str]:
    return (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.get_float32_matmul_precision(),
    )


def records(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    seen["compiled"].append(allowed())

    def run(*args: Any) -> Any:
        seen["run"].append(allowed())
        return graph.forward(*args)

    return run


if "pt2test_records" not in torch.compiler.list_backends(exclude_tags=()):
    torch._dynamo.register_backend(records, name="pt2test_records")


class Attends(nn.Module):
    """[B, 8] -> [B, 1, 2, 4]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            seen["eager"].append(allowed())
        heads = x.reshape(-1, 1, 2, 4)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads)


def build(phase: str, **section: Any) -> Any:
    for calls in seen.values():
        calls.clear()
    section = {"compile": {"backend": "pt2test_records", "only_if_faster": False}, **section}
    model = compile_model(Attends().eval(), models.features, section, batch_sizes=(2,), device="cpu", phase=phase)
    assert model.report.engines() == {"2": "pt2test_records"}, model.report.all_refusals()
    return model


def test_math_is_for_compiled_decode_and_never_for_eager() -> None:
    model = build("decode")
    assert {(flash, math) for flash, math, _ in seen["compiled"]} == {(False, True)}
    assert {(flash, math) for flash, math, _ in seen["eager"]} == {(True, True)}
    assert model.report.attention == "math"
    assert (model.report.phase, allowed()[:2]) == ("decode", (True, True))


@pytest.mark.parametrize("phase", ["forward", "prefill"])
def test_pytorch_chooses_elsewhere(phase: str) -> None:
    model = build(phase)
    assert {(flash, math) for flash, math, _ in seen["compiled"]} == {(True, True)}
    assert model.report.attention is None


def test_a_phase_gets_the_kernel_it_was_given() -> None:
    build("prefill", attention={"prefill": "flash"})
    assert {(flash, math) for flash, math, _ in seen["compiled"]} == {(True, False)}
    build("decode", attention={"decode": None})
    assert {(flash, math) for flash, math, _ in seen["compiled"]} == {(True, True)}


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(ConfigError, match="phase: 'encode' is not allowed; use one of forward, prefill, decode"):
        compile_model(models.Mlp(), models.features, phase="encode")


def test_matmul_precision_is_for_compiled_code_alone_and_the_same_when_serving() -> None:
    model = build("forward", matmul_precision="high")
    assert {precision for _, _, precision in seen["compiled"] + seen["run"]} == {"high"}
    assert {precision for _, _, precision in seen["eager"]} == {"highest"}
    seen["run"].clear()
    model(*models.features(2))
    assert [precision for _, _, precision in seen["run"]] == ["high"]
    assert model.report.after_ready.refused_compilations == 0
    assert torch.get_float32_matmul_precision() == "highest"


def test_precision_comes_back_when_the_last_of_several_calls_ends() -> None:
    configs = [Pt2Config.parse({"matmul_precision": precision}) for precision in ("high", "medium")]
    first, second = map(matmul_precision, configs)
    with first:
        assert torch.get_float32_matmul_precision() == "high"
        second.__enter__()
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "medium", "the second still runs"
    second.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_choice_is_part_of_inductors_cache_keys() -> None:
    import torch.compiler.config as compiler_config

    tags = []

    def remembers(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        tags.append(compiler_config.cache_key_tag)
        return graph.forward

    torch._dynamo.register_backend(remembers, name="pt2test_remembers")
    precise: dict[str, Any] = {"matmul_precision": "high"}
    for phase, more in (("decode", {}), ("prefill", {}), ("prefill", precise)):
        section = {"compile": {"backend": "pt2test_remembers", "only_if_faster": False}, **more}
        compile_model(Attends().eval(), models.features, section, batch_sizes=(2,), device="cpu", phase=phase)
    assert len(set(tags)) == 3
    assert all(str(torch.get_num_threads()) in tag.split("/") for tag in tags)
