from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optim.buckets import Bucket
from optim.config import Pt2Config
from optim.engines import EngineJob, make_engine
from optim.engines.base import Engine, Runner
from optim.engines.choice import _MAKERS
from optim.reference import Reference
from optim.trial import Trial
from optim.verify import Mismatch, compare
from tests.support import models

CPU = torch.device("cpu")


class Rounds(nn.Module):
    """Layers that round otherwise for one row than for several, as kernels do; `factor` makes several others."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(256, 256) / 16) for _ in range(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            if len(x) == 1:
                x = torch.tanh(1.5 * (x @ weight))
            else:
                x = torch.tanh(1.5 * self.factor * (x.float() @ weight.float())).to(x.dtype)
        return x


@pytest.mark.parametrize(("factor", "independent"), [(1.0, True), (1.02, False)])
def test_rows_among_others_may_differ_by_what_rounding_explains(factor: float, independent: bool) -> None:
    def example(rows: int, length: int | None) -> tuple[torch.Tensor, ...]:
        return (torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)).bfloat16(),)

    with torch.no_grad():
        module, (rows,) = Rounds(factor).bfloat16(), example(4, None)
        with pytest.raises(Mismatch, match="over the tolerance"):
            compare(module(rows)[:1], module(rows[:1]))
        reference = Reference(Rounds(factor).bfloat16(), example, (Bucket(1), Bucket(4)), CPU)
    assert reference.rows_are_independent is independent, reference.notes
    assert any("among other rows" in note for note in reference.notes) is not independent


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_the_truth_is_in_float64_or_for_two_bytes_in_float32(dtype: torch.dtype, wide: torch.dtype) -> None:
    def example(rows: int, length: int | None) -> tuple[torch.Tensor, ...]:
        return (torch.ones(rows, 8, dtype=dtype),)

    with torch.no_grad():
        reference = Reference(models.Mlp().to(dtype), example, (Bucket(2),), CPU)
        assert reference.exact(reference.samples[Bucket(2)])().dtype == wide


class Counted(Engine):
    """Runs the module, and counts how often."""

    calls = 0

    def compile(self, bucket: Bucket) -> Runner:
        def run(*inputs: torch.Tensor) -> Any:
            self.calls += 1
            return self.job.module(*inputs)

        return run


@pytest.mark.parametrize(("config", "settles_at_once", "calls"), [(None, False, 3), (None, True, 1), (4, True, 4)])
def test_code_is_warmed_up_as_often_as_it_needs_or_is_asked_for(
    config: int | None, settles_at_once: bool, calls: int
) -> None:
    with torch.no_grad():
        module = models.Mlp().eval()
        reference = Reference(module, models.features, (Bucket(2),), CPU)
        pt2 = Pt2Config.parse({} if config is None else {"verify": {"warmup_calls": config}})
        engine = Counted(EngineJob.of(module, pt2, reference, CPU, "forward"))
        engine.settles_at_once = settles_at_once
        trial = Trial(engine, reference, 60.0)
        assert trial.prepare() is None and not trial.prove(Bucket(2))
        data = len(list(reference.data(Bucket(2))))
    assert engine.calls == calls + data


def test_which_engines_one_call_is_enough_for() -> None:
    with torch.no_grad():
        module = models.Mlp().eval()
        reference = Reference(module, models.features, (Bucket(2),), CPU)
        job = EngineJob.of(module, Pt2Config.parse({}), reference, CPU, "forward")
    names = (*_MAKERS, "aot_eager")
    settling = {name for name in names if make_engine(name, job).settles_at_once}
    assert settling == {"aot", "aot-amx", "channels_last", "onnxruntime", "openvino"}


def test_code_that_changes_its_inputs_leaves_the_examples_as_they_are() -> None:
    class Zeroes(Engine):
        def compile(self, bucket: Bucket) -> Runner:
            return lambda x: (self.job.module(x), x.zero_())[0]

    with torch.no_grad():
        module = models.Mlp().eval()
        reference = Reference(module, models.features, (Bucket(2),), CPU)
        job = EngineJob.of(module, Pt2Config.parse({}), reference, CPU, "forward")
        trial = Trial(Zeroes(job), reference, 60.0)
        assert trial.prepare() is None
        (refusal,) = trial.prove(Bucket(2)).values()
        assert "changes its inputs" in refusal.message
        assert torch.equal(reference.samples[Bucket(2)][0], models.features(2)[0])


def test_what_eager_answers_an_example_with_is_computed_once_and_kept_apart() -> None:
    class Reuses(nn.Module):
        """Answers in the same tensor each time."""

        def __init__(self) -> None:
            super().__init__()
            self.calls, self.answers = 0, {rows: torch.empty(rows, 8) for rows in range(1, 9)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.mul(x, 2, out=self.answers[len(x)])

    module = Reuses()
    reference = Reference(module, models.features, (Bucket(2),), CPU)
    before = module.calls
    module(torch.zeros(2, 8))
    (inputs, outputs), *others = reference.data(Bucket(2))
    assert module.calls == before + 1 + len(others)
    assert torch.equal(outputs, 2 * inputs[0])
