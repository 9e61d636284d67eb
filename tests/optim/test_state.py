"""Modules that keep a declared state: code that loses it, or takes it for a constant, is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optim import ConfigError, compile_model
from optim.buckets import Bucket
from optim.config import Pt2Config
from optim.engines import EngineJob
from optim.engines.base import Engine, Runner
from optim.reference import Reference
from optim.trial import Trial

CPU = torch.device("cpu")


class Memory(nn.Module):
    """Writes a number into a row's slot, and answers the sum of the slot. [B], [B], [B] -> [B]."""

    slots: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("slots", torch.zeros(4, 8), persistent=False)

    def forward(self, value: torch.Tensor, slot: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        self.slots[slot, place] = value * self.weight
        found: torch.Tensor = self.slots[slot].sum(-1)
        return found


def example(batch_size: int, length: int | None) -> tuple[torch.Tensor, ...]:
    return torch.arange(1.0, batch_size + 1), torch.arange(batch_size), torch.arange(batch_size) + 2


class Lossy(Engine):
    """Runs the module as `how` says."""

    name = "lossy"
    keeps_state = True

    def __init__(self, job: EngineJob, how: Callable[[Memory], Runner]) -> None:
        super().__init__(job)
        self._how = how

    def compile(self, bucket: Bucket) -> Runner:
        return self._how(self.job.module)  # type: ignore[arg-type]


def forgets(module: Memory) -> Runner:
    """Answer right, and write nothing."""

    def run(*inputs: torch.Tensor) -> Any:
        kept = module.slots.clone()
        output = module(*inputs)
        module.slots.copy_(kept)
        return output

    return run


def bakes(module: Memory) -> Runner:
    """Take what is in the state now for a constant."""
    baked = module.slots.clone()

    def run(*inputs: torch.Tensor) -> Any:
        value, slot, place = inputs
        module(*inputs)
        rows = baked[slot].clone()
        rows[torch.arange(len(slot)), place] = value * module.weight
        return rows.sum(-1)

    return run


def blurs(module: Memory) -> Runner:
    """Write values that are small beside the rest of the state, and wrong."""

    def run(*inputs: torch.Tensor) -> Any:
        output = module(*inputs)
        _, slot, place = inputs
        module.slots[slot, place] *= 1.5
        return output

    return run


def test_small_values_of_a_state_are_compared_by_their_own_size() -> None:
    module = Memory().eval()
    with torch.no_grad():
        module.weight.fill_(1e-5)
        reference = Reference(module, example, (Bucket(2),), CPU, ("slots",))
        job = EngineJob.of(module, Pt2Config.parse(None), reference, CPU, "forward")
        trial = Trial(Lossy(job, blurs), reference, 60.0)
        assert trial.prepare() is None
        (refusal,) = trial.prove(Bucket(2)).values()
    assert "the state slots is another" in refusal.message


@pytest.mark.parametrize(("how", "why"), [(forgets, "the state slots is another"), (bakes, "is over the tolerance")])
def test_code_that_loses_the_state_is_refused(how: Callable[[Memory], Runner], why: str) -> None:
    module = Memory().eval()
    with torch.no_grad():
        reference = Reference(module, example, (Bucket(2),), CPU, ("slots",))
        job = EngineJob.of(module, Pt2Config.parse(None), reference, CPU, "forward")
        trial = Trial(Lossy(job, how), reference, 60.0)
        assert trial.prepare() is None
        (refusal,) = trial.prove(Bucket(2)).values()
        assert refusal.stage == "verify" and why in refusal.message
        right = Trial(Lossy(job, lambda module: module), reference, 60.0)
        assert right.prepare() is None and not right.prove(Bucket(2))


def overwrites(module: Memory) -> Runner:
    """Answer right, in the same tensor each time."""
    kept = torch.empty(2)

    def run(*inputs: torch.Tensor) -> Any:
        return kept.copy_(module(*inputs))

    return run


@pytest.mark.parametrize("seed", range(6))
def test_outputs_that_the_next_call_overwrites_are_found_whatever_the_state_was(seed: int) -> None:
    module = Memory().eval()
    with torch.no_grad():
        reference = Reference(module, example, (Bucket(2),), CPU, ("slots",))
        reference.state._generator.manual_seed(seed)
        job = EngineJob.of(module, Pt2Config.parse(None), reference, CPU, "forward")
        trial = Trial(Lossy(job, overwrites), reference, 60.0)
        assert trial.prepare() is None
        (refusal,) = trial.prove(Bucket(2)).values()
    assert "overwritten by the next" in refusal.message


@pytest.mark.parametrize("freeze", [True, False])
def test_compiled_code_reads_and_writes_the_state_where_it_lies(freeze: bool) -> None:
    module, pt2 = Memory(), {"compile": {"backend": "inductor", "freeze": freeze, "only_if_faster": False}}
    model = compile_model(module, example, pt2, batch_sizes=(1, 2), device="cpu", state=["slots"])
    assert {row.engine for row in model.report.buckets} == {"inductor"}
    assert not module.slots.any()  # what verification left is gone
    first = model(torch.tensor([3.0]), torch.tensor([1]), torch.tensor([0]))
    second = model(torch.tensor([4.0, 5.0]), torch.tensor([1, 3]), torch.tensor([1, 1]))
    assert first.tolist() == [6.0] and second.tolist() == [14.0, 10.0]
    assert module.slots[1, :2].tolist() == [6.0, 8.0]
    assert model.report.after_ready.compilations == 0


def test_an_engine_that_would_bake_the_state_is_not_tried() -> None:
    model = compile_model(
        Memory(), example, {"compile": {"backend": "openvino"}}, batch_sizes=(1, 2), device="cpu", state=["slots"]
    )
    (refusal,) = model.report.refusals
    assert refusal.stage == "preflight" and "take the module's state for constants (slots)" in refusal.message


def test_a_state_that_was_not_declared_is_no_reason_to_compile() -> None:
    model = compile_model(Memory(), example, {"compile": {"backend": "inductor"}}, batch_sizes=(1, 2), device="cpu")
    assert any("changes its own state when called (slots)" in str(refusal) for refusal in model.report.refusals)


def test_a_name_that_is_no_buffer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"state.*'cache'.*slots"):
        compile_model(Memory(), example, device="cpu", state=["cache"])
