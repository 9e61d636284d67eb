"""CUDA graphs for real; run on a machine with a GPU, PyTorch and pytest: python -m pytest -m gpu tests/optim."""

from __future__ import annotations

import threading

import pytest
import torch

from optim import compile_model
from tests.support import models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("default"),  # what Triton and Inductor warn of on a GPU is not ours to judge
]

GRAPHS = {"compile": {"backend": "inductor", "mode": "reduce-overhead", "only_if_faster": False}}


def test_auto_means_inductor_with_cuda_graphs() -> None:
    model = compile_model(models.Mlp(), models.features, {"compile": {"only_if_faster": False}}, device="cuda")
    assert model.report.candidates == ["inductor"]
    assert set(model.report.engines().values()) == {"inductor"}, model.report.all_refusals()
    assert not [note for note in model.report.notes if "without CUDA graphs" in note]


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
    caught: list[BaseException] = []

    def call() -> None:
        try:
            model(*models.features(4))
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "belong to the thread" in str(caught[0])
