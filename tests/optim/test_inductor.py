"""torch.compile for real: these build C++ code."""

from __future__ import annotations

import pytest
import torch

from optim import compile_model
from optim.device import inspect_device
from tests.support import models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not inspect_device(torch.device("cpu")).capabilities["cxx"].available, reason="there is no C++ compiler"
    ),
]

KEEP = {"only_if_faster": False}


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_inductor_serves_every_bucket(mode: str | None) -> None:
    module = models.SmallCnn().eval()
    section = {"compile": {"backend": "inductor", "mode": mode, **KEEP}}
    model = compile_model(module, models.images, section, batch_sizes=(1, 3), device="cpu")
    assert set(model.report.engines().values()) == {"inductor"}, model.report.all_refusals()
    with torch.no_grad():
        for rows in (1, 2, 3, 7):
            inputs = models.images(rows)
            torch.testing.assert_close(model(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)
    after = model.report.after_ready
    assert (after.compilations, after.refused_compilations, after.failed_runs) == (0, 0, 0)


def test_weights_are_frozen_even_after_another_compilation_of_the_class() -> None:
    frozen = {}
    for freeze in (False, True):
        module = models.SmallCnn().eval()
        section = {"compile": {"backend": "inductor", "freeze": freeze, **KEEP}}
        model = compile_model(module, models.images, section, batch_sizes=(2,), device="cpu")
        inputs = models.images(2)
        before = model(*inputs).clone()
        with torch.no_grad():
            module.head.bias.add_(1)
        frozen[freeze] = torch.equal(model(*inputs), before)
    assert frozen == {False: False, True: True}


def test_more_buckets_than_dynamos_limit_of_eight() -> None:
    section = {"compile": {"backend": "inductor", **KEEP}}
    sizes = tuple(range(1, 11))
    model = compile_model(models.Mlp(), models.features, section, batch_sizes=sizes, device="cpu")
    assert set(model.report.engines().values()) == {"inductor"}, model.report.all_refusals()


def test_data_dependent_control_flow_with_fullgraph_is_eager_with_the_reason() -> None:
    section = {"compile": {"backend": "inductor", "fullgraph": True, **KEEP}}
    model = compile_model(models.Branchy(), models.features, section, batch_sizes=(2,), device="cpu")
    (bucket,) = model.report.buckets
    assert bucket.engine == "eager"
    assert "Data-dependent" in bucket.refusals[0].message


def test_ahead_of_time_package_serves_every_batch_size() -> None:
    module = models.SmallCnn().eval()
    section = {"export": {"aot_compile": True}, "compile": {"enable": False, **KEEP}}
    model = compile_model(module, models.images, section, batch_sizes=(1, 3), device="cpu")
    assert set(model.report.engines().values()) == {"aot"}, model.report.all_refusals()
    with torch.no_grad():
        for rows in (1, 2, 3, 5):
            inputs = models.images(rows)
            torch.testing.assert_close(model(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)


def test_a_hidden_state_of_the_machine_is_no_reason_to_compile_again() -> None:
    section = {"compile": {"backend": "inductor", **KEEP}}
    module = models.Mlp().eval()
    model = compile_model(module, models.features, section, batch_sizes=(2,), device="cpu")
    inputs = models.features(2)
    with torch.enable_grad():  # the model turns it off itself
        torch.testing.assert_close(model(*inputs), module(*inputs))
    assert model.report.after_ready.refused_compilations == 0
