"""torch.compile for real: these build C++ code."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from optim import Bucket, compile_model
from optim.config import Pt2Config
from optim.device import inspect_device
from optim.engines import make_engine
from optim.engines.base import EngineJob
from optim.engines.inductor import TorchCompileEngine
from optim.monitor import count_compilations
from optim.reference import Reference
from tests.support import models

ROOT = Path(__file__).parents[2]

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


def test_ahead_of_time_package_serves_every_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    module = models.SmallCnn().eval()
    section = {"export": {"aot_compile": True}, "compile": {"enable": False, **KEEP}}
    build = torch._inductor.aoti_compile_and_package
    workers: list[int | None] = []

    def watch(*given: Any, **more: Any) -> Any:
        workers.append(torch._inductor.config.compile_threads)
        return build(*given, **more)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", watch)
    model = compile_model(module, models.images, section, batch_sizes=(1, 3), device="cpu")
    assert set(workers) == {1}, "not one for each of the machine's CPUs"
    assert set(model.report.engines().values()) == {"aot"}, model.report.all_refusals()
    with torch.no_grad():
        for rows in (1, 2, 3, 5):
            inputs = models.images(rows)
            torch.testing.assert_close(model(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)


def test_ahead_of_time_packages_are_kept_for_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"export": {"aot_compile": True}, "compile": {"enable": False, **KEEP}}
    made = compile_model(models.SmallCnn(), models.images, section, batch_sizes=(1, 3), device="cpu")

    def compile_again(*arguments: Any, **more: Any) -> None:
        raise AssertionError("it was compiled again")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_again)
    model = compile_model(models.SmallCnn(), models.images, section, batch_sizes=(1, 3), device="cpu")
    assert (made.report.start, model.report.start) == ("cold", "warm"), model.report.notes
    assert set(model.report.engines().values()) == {"aot"}, model.report.all_refusals()


def test_a_hidden_state_of_the_machine_is_no_reason_to_compile_again() -> None:
    section = {"compile": {"backend": "inductor", **KEEP}}
    module = models.Mlp().eval()
    model = compile_model(module, models.features, section, batch_sizes=(2,), device="cpu")
    inputs = models.features(2)
    with torch.enable_grad():  # the model turns it off itself
        torch.testing.assert_close(model(*inputs), module(*inputs))
    assert model.report.after_ready.refused_compilations == 0


def test_a_package_is_loaded_and_held_against_eager(tmp_path: Path) -> None:
    module = models.SmallCnn().eval()
    rows = torch.export.Dim("rows", min=1, max=4)
    with torch.no_grad():
        exported = torch.export.export(module, models.images(4), dynamic_shapes=({0: rows},))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    before = count_compilations().graphs
    section = {"export": {"aot_compile": True, "path": path}, "compile": {"enable": False, **KEEP}}
    model = compile_model(module, models.images, section, batch_sizes=(1, 4), device="cpu")
    assert set(model.report.engines().values()) == {"aot"}, model.report.all_refusals()
    assert count_compilations().graphs == before  # loaded, not compiled
    with torch.no_grad():
        torch.testing.assert_close(model(*models.images(3)), module(*models.images(3)), rtol=1e-4, atol=1e-4)
        module.head.bias.add_(1)  # now it is the package of another model
    other = compile_model(module, models.images, section, batch_sizes=(1,), device="cpu")
    assert other.report.engines() == {"1": "eager"}
    assert other.report.buckets[0].refusals[0].stage == "verify"

    # Its code would take what it is given for pointers of its own device.
    foreign = tmp_path / "foreign.pt2"
    with zipfile.ZipFile(path) as made, zipfile.ZipFile(foreign, "w") as changed:
        for name in made.namelist():
            changed.writestr(name, made.read(name).replace(b'"AOTI_DEVICE_KEY": "cpu"', b'"AOTI_DEVICE_KEY": "cuda"'))
    section = {**section, "export": {"aot_compile": True, "path": str(foreign)}}
    refused = compile_model(module, models.images, section, batch_sizes=(1,), device="cpu")
    (refusal,) = refused.report.refusals
    assert (refusal.stage, refused.report.engines()) == ("preflight", {"1": "eager"})
    assert "the package was made for cuda, and this device is cpu (export.path)" in refusal.message


def test_no_processes_are_kept_that_compile_for_triton() -> None:
    code = """if True:
        from optim import compile_model
        from tests.support import models
        section = {"compile": {"backend": "inductor", "only_if_faster": False}, "cache": {"enable": False}}
        model = compile_model(models.Mlp(), models.features, section, batch_sizes=(1,), device="cpu")
        from torch._inductor import async_compile
        print(model.report.engines()["1"], len(async_compile._pool_set))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_WARM_POOL"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert done.stdout.split() == ["inductor", "0"]


def test_a_package_that_is_not_there_is_a_fallback() -> None:
    section = {"export": {"aot_compile": True, "path": "nowhere.pt2"}}
    model = compile_model(models.Mlp(), models.features, section, batch_sizes=(1,), device="cpu")
    assert model.report.engines() == {"1": "eager"}
    assert "there is no file 'nowhere.pt2'" in model.report.refusals[0].message


def test_dynamic_code_takes_every_size_and_compiles_none_later() -> None:
    module = models.MaskedMean().eval()
    section = {"compile": {"backend": "inductor", "dynamic": True, **KEEP}}
    model = compile_model(module, models.tokens, section, batch_sizes=(1, 4), lengths=(8, 16), device="cpu")
    assert set(model.report.engines().values()) == {"inductor"}, model.report.all_refusals()
    assert any("graphs serve every size" in note for note in model.report.notes)
    sizes = [(rows, length) for rows in (1, 2, 3, 4, 6) for length in (1, 2, 5, 8, 11, 16)]
    for rows, length in sizes:
        inputs = models.tokens(rows, length)
        torch.testing.assert_close(model(*inputs), module(*inputs))
    after = model.report.after_ready
    assert (after.calls, after.compilations, after.refused_compilations) == (len(sizes), 0, 0)
    assert (after.failed_runs, after.shapes_without_bucket) == (0, 0)


def test_dynamic_code_takes_rows_that_depend_on_each_other_unpadded() -> None:
    module = models.Centering().eval()
    section = {"compile": {"backend": "inductor", "dynamic": True, **KEEP}}
    model = compile_model(module, models.features, section, batch_sizes=(8,), device="cpu")
    assert not model.report.padding
    for rows in (1, 3, 8):
        torch.testing.assert_close(model(*models.features(rows)), module(*models.features(rows)))
    assert model.report.after_ready.shapes_without_bucket == 0
    model(*models.features(9))  # split, it would be wrong
    assert model.report.after_ready.shapes_without_bucket == 1


class FixedSize(torch.nn.Module):
    """Has its batch size in its code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(4, -1, 8).sum(1) if x.shape[0] == 4 else x * 1


def test_a_module_that_fixes_its_size_is_no_dynamic_one() -> None:
    section = {"compile": {"backend": "inductor", "dynamic": True, **KEEP}}
    model = compile_model(FixedSize(), models.features, section, batch_sizes=(4,), device="cpu")
    assert model.report.engines() == {"4": "eager"}
    assert model.report.buckets[0].refusals[0].stage in ("warm-up", "verify")


@pytest.mark.parametrize(
    ("phase", "asked", "expected"),
    [
        ("decode", {}, True),
        ("prefill", {}, None),
        ("decode", {"mode": "reduce-overhead"}, None),
        ("decode", {"options": {"coordinate_descent_tuning": False}}, False),
    ],
)
def test_decoding_on_a_gpu_asks_for_coordinate_descent(
    phase: str, asked: dict[str, Any], expected: bool | None
) -> None:
    reference = Reference(models.Mlp(), models.features, (Bucket(1),), torch.device("cpu"))
    pt2 = Pt2Config.parse({"compile": asked})
    job = EngineJob.of(models.Mlp(), pt2, reference, torch.device("cpu"), phase)
    engine = TorchCompileEngine(replace(job, info=replace(job.info, device=torch.device("cuda"))))
    assert engine._options.get("coordinate_descent_tuning") is expected


def test_a_torch_that_lacks_what_an_engine_asks_it_for_costs_that_engine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> None:
        raise AttributeError("module 'torch._dynamo.utils' has no attribute 'counters'")

    section = {"compile": {"backend": "inductor", **KEEP}}
    with monkeypatch.context() as gone:
        gone.setattr("optim.engines.inductor.count_compilations", count)
        model = compile_model(models.Mlp().eval(), models.features, section, batch_sizes=(1,), device="cpu")
    assert model.report.engines() == {"1": "eager"}
    (refusal,) = model.report.refusals
    assert (refusal.engine, refusal.stage) == ("inductor", "preflight")
    assert "it cannot be made: AttributeError: " in refusal.message


def test_a_torch_that_cannot_let_go_of_code_keeps_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = models.Mlp().eval()
    reference = Reference(module, models.features, (Bucket(1),), torch.device("cpu"))
    pt2 = Pt2Config.parse({"compile": {"backend": "inductor"}})
    engine = make_engine("inductor", EngineJob.of(module, pt2, reference, torch.device("cpu"), "forward"))
    engine.build()
    run = engine.compile(Bucket(1))
    with engine.building():
        run(*models.features(1))
    monkeypatch.delattr(torch._dynamo.eval_frame, "remove_from_cache")
    engine.close()
    assert "inductor: this torch cannot let go of compiled code" in caplog.text
