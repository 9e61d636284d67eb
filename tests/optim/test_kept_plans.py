"""Which plans are kept, and that the next start does by them what the first one did."""

from __future__ import annotations

import errno
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from optim import CompileError, arena, compile_model
from optim.buckets import PROBES
from optim.cache import Cache, default_folder
from optim.device import Capability, inspect_device
from optim.engines import EngineJob
from optim.errors import ConfigError
from optim.race import Standing
from optim.report import CompileReport
from tests.support import backends, models

pytestmark = pytest.mark.any_torch

assert backends.BACKENDS, "imported, so that they are registered"

CPU = inspect_device(torch.device("cpu")).capabilities
NO_COMPILER = Capability(False, "no C++ compiler (no g++ or clang++ on PATH): a test")


def start(section: dict[str, Any], *sizes: int, module: type[models.Mlp] = models.Mlp, **more: Any) -> CompileReport:
    sizes = sizes or (1,)
    return compile_model(module(), models.features, section, batch_sizes=sizes, device="cpu", **more).report


def named(engine: str, **more: Any) -> dict[str, Any]:
    return {"compile": {"backend": engine}, **more}


def race(*engines: str, budget_s: float = 60, **more: Any) -> dict[str, Any]:
    return {"tune": {"engines": [*engines], "budget_s": budget_s}, **more}


def entries() -> list[Path]:
    return sorted((default_folder() / "v1" / "entries").glob("*"))


def test_what_failed_is_not_kept() -> None:
    report = start(named("pt2test_raises_at_call"), 1, 4)
    assert set(report.engines().values()) == {"eager"}
    assert entries() == []
    assert any(note.startswith("no plan is kept: bucket") for note in report.notes)


NEEDS_ONNX = pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)


def forbid_exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let none succeed in this process; return the list of those that are asked for."""
    asked: list[str] = []

    def refuse(*args: Any, **more: Any) -> None:
        asked.append("export")
        raise RuntimeError("exported in the process that serves")

    monkeypatch.setattr(torch.export, "export", refuse)
    return asked


@NEEDS_ONNX
def test_what_the_race_exported_is_not_exported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = forbid_exports(monkeypatch)
    for expected in ("cold", "warm"):
        report = start(race("onnxruntime"), 1, 2, 4, module=models.SlowMlp)
        assert report.start == expected, report.notes
        assert set(report.engines().values()) == {"onnxruntime"}, report.all_refusals()
    (entry,) = entries()
    assert (entry / "onnxruntime" / "shared.onnx").is_file()
    assert asked == []


@NEEDS_ONNX
def test_what_a_loser_exported_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.start.rank", lambda rounds, **more: {r.bucket: ["channels_last"] for r in rounds})
    section = race("onnxruntime", "channels_last", compile={"only_if_faster": False})
    taken: list[str] = []

    def take_over(folder: Path, job: EngineJob, standing: Standing) -> None:
        take(folder, job, standing)
        taken.extend(standing.handed_over)

    take = arena._take_over
    monkeypatch.setattr(arena, "_take_over", take_over)
    report = compile_model(models.SlowCnn(), models.images, section, batch_sizes=(1,), device="cpu").report
    assert report.engines() == {"1": "channels_last"}, report.all_refusals()
    assert taken == ["onnxruntime"]
    (entry,) = entries()
    assert not (entry / "onnxruntime").exists()


@NEEDS_ONNX
def test_what_cannot_be_handed_over_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "onnxruntime":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        report = start(race("onnxruntime"), 1, 4, module=models.SlowMlp)
    assert set(report.engines().values()) == {"onnxruntime"}, report.all_refusals()
    assert any("what the race made is made once more: [Errno" in note for note in report.notes)


def test_without_memory_for_a_wider_reference_nothing_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What seems wrong may be as close to the truth as eager is; another start can tell."""
    section = {"compile": {"backend": "pt2test_slow", "only_if_faster": False}}
    assert start(section).start == "cold"
    (entry,) = entries()

    def copy(module: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patched:
        patched.setattr("optim.reference.copy", SimpleNamespace(deepcopy=copy))
        patched.setattr("optim.trial.tolerance", lambda config: -1.0)  # so that the wider one is asked for
        warm, cold = start(section), start(named("pt2test_faithful"))
    (refusal,) = warm.all_refusals()
    assert (refusal.stage, warm.start, warm.engines()) == ("memory", "warm", {"1": "eager"})
    assert refusal.message.startswith("there was no memory for a wider reference, and output: error")
    assert "bucket 1 is eager, though the plan has pt2test_slow: no memory" in warm.notes
    assert (cold.start, cold.engines()) == ("cold", {"1": "eager"})
    assert any(note.startswith("no plan is kept: bucket 1 is eager") for note in cold.notes)
    assert entries() == [entry]
    again = start(section)
    assert (again.start, again.engines()) == ("warm", {"1": "pt2test_slow"})


def test_slowness_is_not_fatal_at_a_warm_start_either() -> None:
    cold, warm = (start(named("pt2test_slow", fallback="fail")) for _ in range(2))
    assert (cold.start, cold.engines()) == ("cold", {"1": "eager"})
    assert (warm.start, warm.engines()) == ("warm", {"1": "eager"})


def test_where_a_failure_is_fatal_it_is_told_at_each_start() -> None:
    for _ in range(2):
        with pytest.raises(CompileError, match="pt2test_wrong was refused at verify"):
            start(named("pt2test_wrong", fallback="fail"))


def test_what_eager_won_is_kept_though_an_engine_had_no_time() -> None:
    """Beside a load it would have none at the next start either, and every start would be cold."""
    cold, warm = (start(race("pt2test_slow", "pt2test_hangs", budget_s=15)) for _ in range(2))
    assert any("did not end within the" in refusal.message for refusal in cold.all_refusals())
    assert (cold.start, cold.engines()) == ("cold", {"1": "eager"})
    assert (warm.start, warm.engines()) == ("warm", {"1": "eager"})


def test_buckets_that_were_not_raced_count_as_won_by_their_neighbours() -> None:
    sizes = range(1, PROBES + 3)
    cold, warm = (start(race("pt2test_slow", fallback="fail"), *sizes) for _ in range(2))
    assert (cold.start, warm.start) == ("cold", "warm")
    for report in (cold, warm):
        assert set(report.engines().values()) == {"eager"}
        assert all(row.eager_won for row in report.buckets)
        assert any(not row.race for row in report.buckets), "else this shows nothing"


@pytest.mark.parametrize("only_if_faster", [False, True])
@pytest.mark.parametrize(("engine", "budget_s"), [("pt2test_raises", 60), ("pt2test_faithful", 0.01)])
def test_a_race_that_no_engine_ends_leaves_eager(engine: str, budget_s: float, only_if_faster: bool) -> None:
    report = start(race(engine, budget_s=budget_s, compile={"only_if_faster": only_if_faster}))
    assert report.engines() == {"1": "eager"}
    assert not report.buckets[0].eager_won
    assert report.all_refusals()
    assert entries() == []


def test_a_warm_start_says_what_the_race_said_of_those_that_lost() -> None:
    cold, warm = (start(race("pt2test_slow", "pt2test_wrong"), 1, 4) for _ in range(2))
    assert (cold.start, warm.start) == ("cold", "warm")
    assert {refusal.engine for refusal in cold.all_refusals()} >= {"pt2test_wrong"}
    assert warm.refusals == cold.refusals
    assert [row.refusals for row in warm.buckets] == [row.refusals for row in cold.buckets]


def test_a_plan_that_was_made_beside_a_load_says_so_at_every_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.arena._Racing.stretch", 2.5)
    cold, warm = (start(race("pt2test_faithful")) for _ in range(2))
    assert (cold.start, warm.start) == ("cold", "warm")
    for report in (cold, warm):
        assert sum("beside a load (things took 2.5 times as long)" in note for note in report.notes) == 1


@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
def test_why_there_is_one_stream_is_said_at_every_start(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr("optim.streams.is_room_for", lambda size: False)
    section = named("onnxruntime", compile={"backend": "onnxruntime", "only_if_faster": False})
    try:
        cold, warm = (start(section, streams=2) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert (cold.start, warm.start) == ("cold", "warm")
    for report in (cold, warm):
        assert sum("might not leave half of the free memory" in note for note in report.notes) == 1


def faithful(**more: Any) -> dict[str, Any]:
    return {"compile": {"backend": "pt2test_faithful", "only_if_faster": False}, **more}


@pytest.mark.parametrize("when", ["start", "background"])
def test_a_plan_can_be_made_anew(when: str) -> None:
    def section(**cache: Any) -> dict[str, Any]:
        return {"compile": {"backend": "pt2test_faithful", "only_if_faster": False, "when": when}, "cache": cache}

    start(faithful())
    now = datetime.now(UTC).isoformat()
    anew = start(section(not_before=now))
    assert anew.start == ("cold" if when == "start" else "eager")
    assert any("its plan was made before pt2.cache.not_before" in note for note in anew.notes)
    if when == "start":
        assert start(section(not_before=now)).start == "warm", "once is enough"
        assert len(entries()) == 1


def test_an_old_plan_that_cannot_be_set_aside_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cache: Cache, name: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    start(faithful())
    monkeypatch.setattr(Cache, "_set_aside", refuse)
    report = start(faithful(cache={"not_before": datetime.now(UTC).isoformat()}))
    assert (report.start, report.cache) == ("cold", None)
    assert any("cannot be set aside (Read-only file system)" in note for note in report.notes)


def test_a_time_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pt2\.cache\.not_before: 'soon'.* use an ISO 8601 time"):
        start(faithful(cache={"not_before": "soon"}))


def test_a_plan_survives_what_hangs_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(faithful()).start == "cold"
    with monkeypatch.context() as patch:
        patch.setattr("optim.trial.stuck_calls", lambda: ("another model",))
        report = start(faithful())
    assert (report.start, report.engines()) == ("cold", {"1": "eager"})
    assert sum("hangs and holds Dynamo's lock (another model)" in note for note in report.notes) == 1, report.notes
    assert start(faithful()).start == "warm"


@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
@pytest.mark.parametrize("when", ["start", "background"])
def test_what_was_made_with_a_compiler_is_found_without_one(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"compile": {"backend": "onnxruntime", "only_if_faster": False, "when": when}}
    start({"compile": {**section["compile"], "when": "start"}}, 1, 4)
    monkeypatch.setattr("optim.device._find_compiler", lambda: NO_COMPILER)
    monkeypatch.setattr("optim.device._find_headers", lambda: Capability(False, "Python.h is not there"))
    for _ in range(2):
        report = start(section, 1, 4)
        assert (report.start, report.engines()) == ("warm", {"1": "onnxruntime", "4": "onnxruntime"})
        assert "the plan was made with a C++ compiler, which this machine does not have" in report.notes
    assert len(entries()) == 1


@pytest.mark.skipif(not CPU["cxx"].available, reason=CPU["cxx"].detail)
def test_a_plan_that_needs_a_compiler_stays_for_those_who_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"compile": {"backend": "inductor", "only_if_faster": False}}
    start(section)
    (theirs,) = entries()
    with monkeypatch.context() as patch:
        patch.setattr("optim.device._find_compiler", lambda: NO_COMPILER)
        report = start(section)
    assert (report.start, report.engines()) == ("cold", {"1": "eager"})
    told = "a plan that was made with a C++ compiler is not used: its plan does not hold any more: inductor was refused"
    assert any(note.startswith(told) for note in report.notes), report.notes
    assert theirs in entries()
    assert start(section).start == "warm"


@pytest.mark.parametrize("capability", ["_find_headers", "_find_amx"])
def test_what_is_permitted_or_installed_later_is_another_key(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start(faithful())
    name = {"_find_headers": "python_headers", "_find_amx": "amx"}[capability]
    other = Capability(not CPU[name].available, "a test")
    monkeypatch.setattr(f"optim.device.{capability}", lambda *args: other)
    assert start(faithful()).start == "cold"
    assert len(entries()) == 2


def test_a_package_that_is_given_later_is_found(tmp_path: Path) -> None:
    """That there was none is kept with eager: another file is another key."""
    section = {"export": {"aot_compile": True, "path": str(tmp_path / "model.pt2")}}
    for expected in ("cold", "warm"):
        report = start(section)
        assert (report.start, report.engines()) == (expected, {"1": "eager"})
    (tmp_path / "model.pt2").write_bytes(b"not a package")
    assert start(section).start == "cold"


def test_in_a_folder_that_nothing_can_be_written_to_nothing_is_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "is_writable", lambda cache: False)
    section = {"compile": {"backend": "pt2test_faithful", "only_if_faster": False, "when": "background"}}
    report = start(section)
    assert (report.start, report.engines()) == ("cold", {"1": "pt2test_faithful"})
    assert any("what another process makes could not be kept in" in note for note in report.notes)
    assert start(section).start == "warm", "an image's plan is found"


def test_several_files_that_cannot_be_kept_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise shutil.Error([("one", "two", "[Errno 28] No space left on device")])

    monkeypatch.setattr(shutil, "copytree", fail)
    report = start(faithful())
    (note,) = (note for note in report.notes if note.startswith("no plan is kept"))
    assert "No space left on device" in note
    assert os.listdir(default_folder() / "v1" / "entries") == []
