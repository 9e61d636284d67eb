"""CUDA graphs for real; run on a machine with a GPU, PyTorch and pytest: python -m pytest -m gpu tests/optim."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from optim import Bucket, CompiledModel, CompileError, compile_model
from optim.trial import Trial
from tests.support import models
from tests.support.threads import error_in_another_thread

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("default"),  # what Triton and Inductor warn of on a GPU is not ours to judge
]

GRAPHS = {"compile": {"backend": "inductor", "mode": "reduce-overhead", "only_if_faster": False}}


def equal_to_eager(model: CompiledModel, sizes: Iterable[int]) -> None:
    for rows in sizes:
        inputs = models.features(rows)
        with torch.no_grad():
            torch.testing.assert_close(model(*inputs), model.module(*(t.cuda() for t in inputs)), rtol=1e-3, atol=1e-3)


class Layer(nn.Module):
    """Attention and a small MLP, [B, 16, 64] -> [B, 16, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(rows, length, 3, 4, 16).permute(2, 0, 3, 1, 4)  # each [B, 4, T, 16]
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, 64))
        return x + self.mlp(self.norm_mlp(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A small transformer, [B, 16, 64] -> [B, 16, 64]: many small kernels, so launches are what it costs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(Layer() for _ in range(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def sequences(batch_size: int, length: int | None = None) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(batch_size)
    return (torch.randn((batch_size, 16, 64), generator=generator),)


class LeavesTheGpu(nn.Module):
    """Computes in part on the CPU, which no CUDA graph can hold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.cpu() * 2).to(x.device) + 1


def test_auto_races_inductors_variants_here() -> None:
    section = {"compile": {"only_if_faster": False}, "tune": {"budget_s": 120}}
    model = compile_model(models.Mlp(), models.features, section, batch_sizes=(1, 8), device="cuda")
    assert model.report.candidates[:2] == ["inductor", "inductor-default"]
    assert set(model.report.engines().values()) <= set(model.report.candidates), model.report.all_refusals()
    assert {"eager", "inductor", "inductor-default"} <= {name for ms in model.report.buckets[0].race for name in ms}
    equal_to_eager(model, (1, 3, 8, 11))
    assert model.report.after_ready.graph_recordings == 0


def test_reduce_overhead_is_the_choice_for_a_small_transformer_and_nothing_is_skipped() -> None:
    section = {"compile": {"mode": "reduce-overhead"}, "strict": True}
    model = compile_model(Block(), sequences, section, batch_sizes=(1, 4), device="cuda")
    assert set(model.report.engines().values()) == {"inductor"}, model.report.all_refusals()
    assert not [note for note in model.report.notes if "without CUDA graphs" in note]
    assert all(row.graph_bytes is not None for row in model.report.buckets)
    assert sum(row.graph_bytes or 0 for row in model.report.buckets) > 0


def test_outputs_are_intact_under_ten_thousand_replays_with_changing_data() -> None:
    module = Block().eval()
    model = compile_model(module, sequences, GRAPHS, batch_sizes=(1,), device="cuda")
    (example,) = sequences(1)
    with torch.no_grad():
        inputs = [torch.roll(example, i, 1).cuda() for i in range(16)]
        want = [module(x) for x in inputs]
    kept = [model(x) for x in inputs]
    for i in range(10_000):
        found = model(inputs[i % 16])
        if i % 97 == 0:
            torch.testing.assert_close(found, want[i % 16], rtol=1e-3, atol=1e-3)
    for found, expected in zip(kept, want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    after = model.report.after_ready
    assert (after.compilations, after.graph_recordings, after.failed_runs) == (0, 0, 0)


def test_a_skipped_graph_is_told_and_an_error_when_strict() -> None:
    # Newer releases would cut the part on the CPU out of the graph.
    options = {"triton.cudagraphs": True, "graph_partition": False}
    section = {"compile": {"backend": "inductor", "options": options, "only_if_faster": False}}
    model = compile_model(LeavesTheGpu(), models.features, section, batch_sizes=(2,), device="cuda")
    assert any("without CUDA graphs" in note for note in model.report.notes)
    with torch.no_grad():
        inputs = models.features(2)
        torch.testing.assert_close(model(*inputs), inputs[0].cuda() * 2 + 1)
    with pytest.raises(CompileError, match="without CUDA graphs"):
        compile_model(LeavesTheGpu(), models.features, {**section, "strict": True}, batch_sizes=(2,), device="cuda")


def test_a_capture_that_runs_out_of_memory_is_retried_with_fewer_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is there; the engine says that it is not, for the largest bucket, when capturing it."""
    warm_up = Trial._warm_up

    def short_of_memory(self: Trial, bucket: Bucket) -> Any:
        run = warm_up(self, bucket)
        if bucket.batch_size == 8:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")  # a real torch.OutOfMemoryError
        return run

    monkeypatch.setattr(Trial, "_warm_up", short_of_memory)
    model = compile_model(models.Mlp(), models.features, GRAPHS, device="cuda")
    assert model.report.engines() == {"1": "inductor", "2": "inductor", "4": "inductor", "8": "eager"}
    assert "capturing ran out of memory at bucket 8" in model.report.buckets[3].refusals[0].message
    equal_to_eager(model, (1, 4, 8, 9))
    assert model.report.after_ready.graph_recordings == 0


def test_tf32_is_off_unless_asked_for_and_off_again_after() -> None:
    section = {**GRAPHS, "matmul_precision": "high"}
    model = compile_model(Block(), sequences, section, batch_sizes=(2,), device="cuda")
    assert model.report.config["matmul_precision"] == "high"
    assert torch.get_float32_matmul_precision() == "highest"
    model(*sequences(2))
    assert model.report.after_ready.refused_compilations == 0


def test_replays_with_changing_data_and_no_late_compilation() -> None:
    module = models.Mlp().eval()
    model = compile_model(module, models.features, GRAPHS, device="cuda")
    for i in range(200):
        inputs = models.features(1 + i % 11)
        with torch.no_grad():
            want = module(*(t.cuda() for t in inputs))
        torch.testing.assert_close(model(*inputs), want, rtol=1e-3, atol=1e-3)
    after = model.report.after_ready
    assert (after.compilations, after.refused_compilations, after.failed_runs) == (0, 0, 0)


def test_an_output_survives_the_next_replay() -> None:
    model = compile_model(models.Mlp(), models.features, GRAPHS, batch_sizes=(4,), device="cuda")
    first = model(*models.features(4))
    kept = first.clone()
    model(torch.full((4, 8), 7.0))
    assert torch.equal(first, kept)


def test_a_second_thread_is_refused() -> None:
    model = compile_model(models.Mlp(), models.features, GRAPHS, batch_sizes=(4,), device="cuda")
    assert "belong to the thread" in str(error_in_another_thread(lambda: model(*models.features(4))))


def test_a_declared_state_is_read_and_written_by_cuda_graphs() -> None:
    class Memory(nn.Module):
        slots: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("slots", torch.zeros(4, 8), persistent=False)

        def forward(self, value: torch.Tensor, slot: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            self.slots[slot, place] = 2 * value
            found: torch.Tensor = self.slots[slot].sum(-1)
            return found

    def example(rows: int, length: int | None) -> tuple[torch.Tensor, ...]:
        return torch.arange(1.0, rows + 1), torch.arange(rows), torch.arange(rows) + 2

    module = Memory()
    model = compile_model(module, example, GRAPHS, batch_sizes=(1, 2), state=["slots"])
    assert {row.engine for row in model.report.buckets} == {"inductor"}
    assert not any("CUDA graphs" in note for note in model.report.notes), model.report.notes
    assert not module.slots.any()
    first = model(torch.tensor([3.0]), torch.tensor([1]), torch.tensor([0])).tolist()
    second = model(torch.tensor([4.0, 5.0]), torch.tensor([1, 3]), torch.tensor([1, 1])).tolist()
    assert (first, second) == ([6.0], [14.0, 10.0])
    assert module.slots[1, :2].tolist() == [6.0, 8.0]
    after = model.report.after_ready
    assert (after.compilations, after.graph_recordings) == (0, 0)
