"""A second start verifies what the first one found, and believes nothing that does not hold."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optim import CompiledModel, compile_model
from optim.cache import default_folder
from optim.device import inspect_device
from optim.engines.inductor import TorchCompileEngine
from optim.verify import compare
from tests.support import models

CPU = inspect_device(torch.device("cpu")).capabilities
ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(not CPU[name].available, reason=CPU[name].detail))
    for name in ("onnxruntime", "openvino")
]


def build(backend: str = "pt2test_faithful", module: nn.Module | None = None, **more: Any) -> CompiledModel:
    from tests.support import backends

    assert backends.BACKENDS
    section = {"compile": {"backend": backend, "only_if_faster": False}, **more.pop("pt2", {})}
    return compile_model(
        module or models.Mlp(), models.features, section, device="cpu", **{"batch_sizes": (1, 4), **more}
    )


def entries() -> list[Path]:
    return sorted((default_folder() / "v1" / "entries").glob("*"))


def check(model: CompiledModel, module: nn.Module) -> None:
    for rows in (1, 2, 4, 7):
        inputs = models.features(rows)
        with torch.no_grad():
            assert compare(model(*inputs), module.eval()(*inputs)).max_abs < 1e-4
    assert model.report.after_ready.failed_runs == 0


@pytest.mark.parametrize("backend", [*ENGINES, "pt2test_faithful"])
def test_the_second_start_is_warm(backend: str) -> None:
    cold = build(backend)
    assert (cold.report.start, len(entries())) == ("cold", 1)
    warm = build(backend)
    assert (warm.report.start, len(entries())) == ("warm", 1)
    assert warm.report.engines() == cold.report.engines() == dict.fromkeys(("1", "4"), backend)
    assert [row.ms for row in warm.report.buckets] == [row.ms for row in cold.report.buckets]
    assert all(row.relative_error is not None for row in warm.report.buckets), "it was verified"
    check(warm, models.Mlp())


@pytest.mark.parametrize("backend", ENGINES[:1])
def test_streams_start_warm_too(backend: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cold, warm = build(backend, streams=2), build(backend, streams=2)
    finally:
        torch.set_num_threads(before)
    assert cold.streams is not None
    assert warm.streams is not None
    assert warm.report.start == "warm"
    assert warm.streams.model.costs == pytest.approx(cold.streams.model.costs, abs=1e-3)  # as far as a plan has them
    check(warm.streams.model, models.Mlp())


@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
def test_a_race_is_not_held_again() -> None:
    section = {"compile": {"backend": "auto", "only_if_faster": False}, "tune": {"engines": ["onnxruntime"]}}
    cold = compile_model(models.Mlp(), models.features, section, batch_sizes=(1, 4), device="cpu")
    warm = compile_model(models.Mlp(), models.features, section, batch_sizes=(1, 4), device="cpu")
    assert "race" in cold.report.seconds
    assert "race" not in warm.report.seconds
    assert warm.report.engines() == cold.report.engines()
    assert [row.race for row in warm.report.buckets] == [row.race for row in cold.report.buckets]


@pytest.mark.parametrize(
    "change",
    [
        {"module": models.Mlp(seed=1)},
        {"module": models.Nested()},
        {"batch_sizes": (1, 2, 4)},
        {"phase": "decode"},
        {"pt2": {"verify": {"tolerance": 0.01}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_anything_else_is_another_entry(change: dict[str, Any]) -> None:
    build()
    model = build(**change)
    assert (model.report.start, len(entries())) == ("cold", 2)


def test_other_threads_are_another_entry() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert build().report.start == "cold"
    finally:
        torch.set_num_threads(before)


@pytest.mark.any_torch
@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_never_make_a_wrong_answer(backend: str, seed: int) -> None:
    build(backend)
    dice = random.Random(seed)
    for path in [path for entry in entries() for path in entry.rglob("*") if path.is_file()]:
        content = bytearray(path.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
    model = build(backend)
    assert model.report.start == "cold"
    assert any("was set aside" in note for note in model.report.notes)
    check(model, models.Mlp())
    assert build(backend).report.start == "warm"


@pytest.mark.parametrize("backend", ENGINES)
def test_an_artifact_of_other_weights_is_found_out(backend: str) -> None:
    """Its hashes are right, and so is its key: only the comparison with eager can tell."""
    build(backend)
    ours = entries()[0]
    build(backend, models.Mlp(seed=5))
    theirs = next(entry for entry in entries() if entry != ours)
    kept = (ours / "plan.json").read_bytes()
    for path in sorted(ours.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    ours.rmdir()
    theirs.rename(ours)
    (ours / "plan.json").write_bytes(kept)
    manifest = json.loads((ours / "MANIFEST.json").read_text())
    import hashlib

    manifest["files"]["plan.json"] = hashlib.sha256(kept).hexdigest()
    (ours / "MANIFEST.json").write_text(json.dumps(manifest))
    model = build(backend)
    assert model.report.start == "cold"
    assert any("its plan does not hold any more" in note for note in model.report.notes), model.report.notes
    check(model, models.Mlp())


def test_a_plan_that_is_slower_than_eager_now_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"compile": {"backend": "pt2test_faithful"}}
    figures = [1.0, 2.0]
    monkeypatch.setattr("optim.builder.time_in_turn", lambda runs, *args, **kwargs: figures[: len(runs)])

    def start() -> CompiledModel:
        return compile_model(models.Mlp(), models.features, section, batch_sizes=(1, 4), device="cpu")

    from tests.support import backends

    assert backends.BACKENDS
    start()
    assert start().report.start == "warm"
    figures.reverse()
    model = start()
    assert model.report.start == "cold"
    assert set(model.report.engines().values()) == {"eager"}
    assert any("its plan does not hold any more" in note and "slower than eager" in note for note in model.report.notes)


def test_a_plan_outlives_a_call_that_had_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def time_in_turn(runs: Sequence[Any], *args: Any, min_rounds: int = 5, **kwargs: Any) -> list[float]:
        rounds.append(min_rounds)
        return [9.0, 2.0] if min_rounds == 1 else [1.0, 2.0]

    monkeypatch.setattr("optim.builder.time_in_turn", time_in_turn)
    section = {"compile": {"backend": "pt2test_faithful"}}
    build(pt2=section)
    rounds.clear()
    report = build(pt2=section).report
    assert (report.start, set(report.engines().values())) == ("warm", {"pt2test_faithful"})
    assert rounds == [1, 5] * 2, "at both ends a few calls, and then as many as for a new plan"


def test_a_plan_for_something_else_is_not_believed() -> None:
    build()
    [entry] = entries()
    other = entry.parent / ("0" * 32)
    build(module=models.Mlp(seed=1))
    foreign = next(path for path in entries() if path != entry)
    foreign.rename(other)
    entry.rename(foreign)
    model = build(module=models.Mlp(seed=1))
    assert model.report.start == "cold"
    assert any("its plan was made for something else" in note for note in model.report.notes)


def test_it_can_be_switched_off() -> None:
    assert build(pt2={"cache": {"enable": False}}).report.start == "cold"
    assert not default_folder().exists()


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    section = {"cache": {"folder": str(tmp_path / "mine")}}
    build(pt2=section)
    assert not default_folder().exists()
    assert build(pt2=section).report.start == "warm"


def test_a_cache_that_cannot_be_used_is_told_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    model = build(pt2={"cache": {"folder": str(folder)}})
    assert any("no compile cache: " in note and "written by others" in note for note in model.report.notes)
    assert set(model.report.engines().values()) == {"pt2test_faithful"}
    assert not os.listdir(folder)


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home.")))
    model = build()
    assert "no compile cache: Could not determine home. Set XDG_CACHE_HOME or pt2.cache.folder" in model.report.notes
    assert set(model.report.engines().values()) == {"pt2test_faithful"}


class Odd(models.Mlp):
    """A module whose settings cannot be read."""

    def extra_repr(self) -> str:
        raise RuntimeError("not now")


def test_a_module_that_cannot_be_described_is_compiled_all_the_same() -> None:
    model = build(module=Odd())
    assert any(
        "no compile cache: the module cannot be described: RuntimeError: not now" in n for n in model.report.notes
    )
    assert set(model.report.engines().values()) == {"pt2test_faithful"}
    check(model, models.Mlp())


def test_what_cannot_be_saved_is_told_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(engine: TorchCompileEngine, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise AttributeError("torch has it elsewhere now")

    monkeypatch.setattr(TorchCompileEngine, "save", fail)
    for start in ("cold", "warm"):
        model = build()
        assert (model.report.start, *set(model.report.engines().values())) == (start, "pt2test_faithful")
        told = "pt2test_faithful: nothing is kept for the next start: AttributeError: torch has it elsewhere now"
        assert (told in model.report.notes) == (start == "cold")
    assert [path.name for path in entries()[0].iterdir() if path.is_dir()] == []


@pytest.mark.any_torch
def test_replicas_that_start_at_once_compile_once(tmp_path: Path) -> None:
    code = """
import sys
from optim import compile_model
from tests.support import backends, models
section = {"compile": {"backend": "pt2test_faithful", "only_if_faster": False}, "cache": {"folder": sys.argv[1]}}
model = compile_model(models.Mlp(), models.features, section, batch_sizes=(1, 4), device="cpu")
print(model.report.start)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "shared")]
    root = Path(__file__).parents[2]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(4)]
    starts = sorted(process.communicate()[0].split()[-1] for process in started)
    assert starts == ["cold", "warm", "warm", "warm"]


@pytest.mark.skipif(not CPU["cxx"].available, reason="there is no C++ compiler")
@pytest.mark.parametrize(("backend", "model"), [("inductor-onednn", "Mlp"), ("inductor", "SmallCnn")])
def test_inductors_libraries_are_not_built_again_where_its_folder_is_another(
    tmp_path: Path, backend: str, model: str
) -> None:
    code = """
import sys
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from optim import compile_model
from tests.support import models

compiled = []
build = cpp_builder.CppBuilder.build

def count(self):
    compiled.append(self)
    return build(self)

cpp_builder.CppBuilder.build = count
module, example = {"Mlp": (models.Mlp, models.features), "SmallCnn": (models.SmallCnn, models.images)}[sys.argv[2]]
if sys.argv[4:]:  # another model, in the same process before it
    other = {"compile": {"backend": sys.argv[1], "only_if_faster": False}, "cache": {"folder": sys.argv[4]}}
    compile_model(module(), example, other, batch_sizes=(2,), device="cpu")
section = {"compile": {"backend": sys.argv[1], "only_if_faster": False}, "cache": {"folder": sys.argv[3]}}
model = compile_model(module(), example, section, batch_sizes=(1, 4), device="cpu")
engines = set(model.report.engines().values())
print(model.report.start, *engines, len(compiled), counters["inductor"]["fxgraph_cache_miss"])
"""

    def start(machine: str, *others: str) -> list[str]:
        folders = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / machine / "inductor")}
        if machine == "other":  # precompiled headers lie in the default folder, whatever Inductor's own is
            (tmp_path / machine).mkdir()
            folders["TMPDIR"] = str(tmp_path / machine)
        command = [sys.executable, "-c", code, backend, model, str(tmp_path / "plans"), *others]
        root = Path(__file__).parents[2]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, **folders})
        return ended.stdout.splitlines()[-1].split()

    start_, engine, compiled, _ = start("one", str(tmp_path / "others"))
    assert (start_, engine) == ("cold", backend) and int(compiled) > 0
    assert start("other") == ["warm", backend, "0", "0"]


class Settings(nn.Module):
    """[B, 8] -> [B, 8]; has settings of all kinds, and says where it was loaded from."""

    def __init__(self, name_or_path: str, scale: int = 2) -> None:
        super().__init__()
        self.name_or_path = name_or_path
        self.steps = [torch.relu, lambda x: x * scale, (nn.ReLU, [torch.Tensor.relu, object()])]
        self.scale = [{"by": scale}]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale[0]["by"]


def test_what_differs_from_process_to_process_is_no_part_of_the_key() -> None:
    starts = [build(module=module).report.start for module in (Settings("/home/one"), Settings("/mnt/two"))]
    assert starts == ["cold", "warm"]
    assert build(module=Settings("/home/one", scale=3)).report.start == "cold"
