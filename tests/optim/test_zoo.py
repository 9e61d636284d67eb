"""A zoo of failures: whatever a compiler or a module does, the answers are eager's and the reason is in the report."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optim import CompiledModel, CompileError, compile_model
from optim.deadline import stuck_calls
from optim.device import inspect_device
from tests.support import backends, models

CPU = inspect_device(torch.device("cpu")).capabilities
KEEP = {"only_if_faster": False}

#: Engines that exist here, each tried alone.
REAL = [
    pytest.param(name, marks=pytest.mark.skipif(not CPU[needs].available, reason=CPU[needs].detail))
    for name, needs in (("inductor", "cxx"), ("ipex", "ipex"), ("openvino", "openvino"), ("onnxruntime", "onnxruntime"))
]


def build(module: nn.Module, backend: str, **more: Any) -> CompiledModel:
    section = {"compile": {"backend": backend, **KEEP}, **more}
    return compile_model(module, models.features, section, batch_sizes=(1, 4), device="cpu")


def check(model: CompiledModel, module: nn.Module) -> None:
    """Right for any number of rows, and for data that no warm-up has shown."""
    for rows in (1, 3, 4, 6):
        for inputs in (models.features(rows), (-3 * models.features(rows)[0],)):
            with torch.no_grad():
                torch.testing.assert_close(model(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)
    assert model.report.after_ready.compilations == 0


@dataclass
class Scores:
    best: torch.Tensor
    all: dict[str, torch.Tensor]


class ReturnsDataclass(nn.Module):
    def forward(self, x: torch.Tensor) -> Scores:
        return Scores(x.amax(1), {"x": x * 2, "more": x + 1})


class ReturnsViews(nn.Module):
    """Outputs that share memory with each other and with the input."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        return y, y[:, :3], y.t().t(), x


class ReturnsTransposed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ torch.ones(8, 3)).unsqueeze(-1).transpose(1, 2).expand(-1, 2, 3)


class Breaks(models.Mlp):
    """Leaves the graph in the middle."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[0](features)
        torch._dynamo.graph_break()
        return self.layers[2](self.layers[1](hidden))  # type: ignore[no-any-return]


class GlobalSwitch(nn.Module):
    """Which way every row goes depends on all of them, without Python looking."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.sum() > 0, x * 2, x - 1)


class ChangesInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2


@torch.library.custom_op("pt2test::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.detach().numpy() * 3)


class CustomOp(nn.Module):
    """Calls an operator that has no meta kernel, so no compiler knows the shape of its result."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return triple(x) + 1  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("backend", REAL)
@pytest.mark.parametrize("module", [ReturnsDataclass(), models.Nested()])
def test_nested_outputs_come_back_as_they_were(module: nn.Module, backend: str) -> None:
    model = build(module.eval(), backend)
    assert set(model.report.engines().values()) == {backend}, model.report.all_refusals()
    got, want = model(*models.features(3)), module(*models.features(3))
    if isinstance(want, Scores):
        got, want = vars(got), vars(want)
    if isinstance(want, tuple):  # the third is no tensor
        assert got[2] == want[2]
        got, want = got[:2], want[:2]
    torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("backend", REAL)
@pytest.mark.parametrize("module", [ReturnsViews(), ReturnsTransposed()])
def test_aliased_and_odd_strides(module: nn.Module, backend: str) -> None:
    check(build(module.eval(), backend), module)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*REAL, "pt2test_faithful"])
@pytest.mark.parametrize("module", [CustomOp(), models.Branchy()])
def test_what_compilers_cannot_see_into(module: nn.Module, backend: str) -> None:
    model = build(module.eval(), backend)
    check(model, module)
    if set(model.report.engines().values()) == {"eager"}:
        assert model.report.all_refusals()


@pytest.mark.parametrize("module", [models.Branchy(), GlobalSwitch()])
def test_rows_that_may_depend_on_their_neighbours_are_never_padded(module: nn.Module) -> None:
    model = build(module.eval(), "pt2test_faithful")
    assert not model.report.padding
    check(model, module)


@pytest.mark.skipif(not CPU["openvino"].available, reason=CPU["openvino"].detail)
def test_an_unknown_operator_is_the_reason() -> None:
    model = build(CustomOp().eval(), "openvino")
    assert set(model.report.engines().values()) == {"eager"}
    assert "pt2test::triple" in model.report.all_refusals()[0].message


def test_a_graph_break_is_told() -> None:
    module = Breaks().eval()
    model = build(module, "pt2test_faithful")
    assert set(model.report.engines().values()) == {"pt2test_faithful"}
    assert any("graph break" in note for note in model.report.notes)
    check(model, module)


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        ("wrong_shape", r"shape \(1, 1, 4\), eager gives \(1, 4\)"),
        ("one_buffer", "overwritten by the next"),
        ("changes_its_input", "changes its inputs, eager does not"),
    ],
)
def test_wrong_in_a_way_of_its_own(backend: str, text: str) -> None:
    import re

    module = models.Mlp().eval()
    model = build(module, f"pt2test_{backend}")
    assert set(model.report.engines().values()) == {"eager"}
    assert re.search(text, model.report.buckets[0].refusals[0].message), model.report.buckets[0].refusals
    check(model, module)


def test_right_with_other_strides_is_right() -> None:
    module = models.Mlp().eval()
    model = build(module, "pt2test_transposed")
    assert set(model.report.engines().values()) == {"pt2test_transposed"}, model.report.all_refusals()
    check(model, module)


def test_a_module_that_changes_its_input_stays_eager() -> None:
    model = build(ChangesInput().eval(), "pt2test_faithful")
    assert set(model.report.engines().values()) == {"eager"}
    assert "changes its inputs" in model.report.refusals[0].message


@pytest.fixture
def hanging() -> Iterator[None]:
    backends.let_go.clear()
    yield
    backends.let_go.set()
    while stuck_calls():
        time.sleep(0.001)


@pytest.mark.parametrize(("backend", "text"), [("loops", "was stopped"), ("hangs", "cannot be stopped")])
def test_a_compiler_that_hangs_is_not_waited_for(hanging: None, backend: str, text: str) -> None:
    module = models.Mlp().eval()
    model = build(module, f"pt2test_{backend}", tune={"budget_s": 0.5})
    assert set(model.report.engines().values()) == {"eager"}
    assert text in model.report.buckets[0].refusals[0].message
    check(model, module)
    if backend == "hangs":  # it holds Dynamo's lock: nothing may wait for it
        second = build(module, "pt2test_faithful")
        assert "hangs and holds Dynamo's lock" in second.report.refusals[0].message
        assert any(note.startswith("no plan is kept: bucket") for note in second.report.notes), "the next can compile"
        check(second, module)


@pytest.mark.parametrize("how", ["torch.compile", "in place"])
def test_an_already_compiled_module_is_taken_as_it_was_before(how: str) -> None:
    module = models.Mlp().eval()
    given: Any = module
    if how == "in place":
        given.compile(backend="pt2test_wrong")
    else:
        given = torch.compile(module, backend="pt2test_wrong")
    model = build(given, "pt2test_faithful")
    assert set(model.report.engines().values()) == {"pt2test_faithful"}, model.report.all_refusals()
    assert any("was compiled" in note for note in model.report.notes)
    check(model, models.Mlp().eval())


@pytest.mark.slow
@pytest.mark.parametrize("backend", REAL)
def test_torchscript_is_served_by_what_takes_it(backend: str) -> None:
    module = models.Mlp().eval()
    script = torch.jit.trace(module, models.features(2))
    model = build(script, backend)
    if set(model.report.engines().values()) == {"eager"}:
        assert "TorchScript" in model.report.refusals[0].message
    check(model, module)


@pytest.mark.slow
@pytest.mark.skipif(not CPU["cxx"].available, reason=CPU["cxx"].detail)
def test_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / f"pt2-inductor-{os.getuid()}").write_text("no folder either")
    script = """
import torch
from optim import compile_model
from tests.support import models
module = models.Mlp().eval()
section = {"compile": {"backend": "inductor", "only_if_faster": False}}
model = compile_model(module, models.features, section, batch_sizes=(2,), device="cpu")
assert model.report.engines() == {"2": "inductor"}, model.report
assert any("cannot be written (Not a directory)" in note for note in model.report.notes), model.report.notes
torch.testing.assert_close(model(*models.features(3)), module(*models.features(3)))
"""
    folders = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache"),
        "TMPDIR": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "file"),
    }
    environment = {**os.environ, **folders}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(not CPU["cxx"].available, reason=CPU["cxx"].detail)
def test_a_cache_folder_of_inductors_that_others_can_write_to(tmp_path: Path) -> None:
    """Whoever made it first, under the folder for temporary files, could have put libraries or headers there."""
    theirs = tmp_path / f"torchinductor_{getpass.getuser()}"
    theirs.mkdir()
    theirs.chmod(0o777)
    script = """
import os
from pathlib import Path
from optim import compile_model
from tests.support import models
section = {"compile": {"backend": "inductor", "only_if_faster": False}}
model = compile_model(models.Mlp().eval(), models.features, section, batch_sizes=(2,), device="cpu")
assert model.report.engines() == {"2": "inductor"}, model.report
assert any("can be written by others (mode 777)" in note for note in model.report.notes), model.report.notes
assert Path(model.report.cache).is_dir(), "what was compiled elsewhere is kept all the same"
ours = Path(os.environ["TMPDIR"]) / f"pt2-inductor-{os.getuid()}"
assert list(ours.rglob("*.so")) and list(ours.glob("precompiled_headers/*.gch")), list(ours.rglob("*"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment["TMPDIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, env=environment)
    assert not list(theirs.iterdir())


def test_a_user_without_a_name() -> None:
    """As in a container that was given a number to run as: torch 2.8 cannot import Dynamo then."""
    script = """
import pwd
def getpwuid(user):
    raise KeyError(f"getpwuid(): uid not found: {user}")
pwd.getpwuid = getpwuid
from optim import Pt2Config
assert Pt2Config.parse({"compile": {"backend": "inductor"}}).compile.backend == "inductor"
import torch._inductor.codecache
"""
    names = {"LOGNAME", "USER", "LNAME", "USERNAME"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, env=environment)


class TestStrict:
    def test_a_failure_is_fatal(self) -> None:
        with pytest.raises(CompileError, match="cannot compile anything"):
            build(models.Mlp(), "pt2test_raises", strict=True)

    def test_a_call_that_would_compile_is_an_error(self) -> None:
        model = build(models.Mlp().eval(), "pt2test_faithful", strict=True)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(CompileError, match=r"bucket 4 could not .*strict"):
            model(*models.features(4))
        model(*models.features(4))

    def test_a_late_compilation_is_an_error(self) -> None:
        """Code that the model itself runs eager, compiled by somebody else."""

        class Inner(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * 3

        inner = torch.compile(Inner(), backend="pt2test_faithful", dynamic=False)

        class Outer(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return inner(x)  # type: ignore[no-any-return]

        section = {"compile": {"enable": False}, "strict": True}
        model = compile_model(Outer(), models.features, section, batch_sizes=(2,), device="cpu")
        with pytest.raises(CompileError, match="1 graphs were compiled"):
            model(*models.features(5))


def test_an_errors_own_input_is_still_the_callers_error_when_strict() -> None:
    model = build(models.Mlp().eval(), "pt2test_faithful", strict=True)
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(4, 9))
    assert not isinstance(caught.value, CompileError)
