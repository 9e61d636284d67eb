"""A start that answers eager, and moves over to what another process compiled."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optim import CompiledModel, compile_model
from optim.cache import Cache, default_folder
from optim.config import Pt2Config
from optim.device import inspect_device
from optim.errors import ConfigError
from optim.verify import compare
from tests.support import backends, models

assert backends.BACKENDS
CPU = inspect_device(torch.device("cpu")).capabilities
ONNX = pytest.param(
    "onnxruntime", marks=pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
)


def build(backend: str = "pt2test_faithful", module: nn.Module | None = None, **more: Any) -> CompiledModel:
    section = {"compile": {"backend": backend, "only_if_faster": False, "when": more.pop("when", "background")}}
    return compile_model(
        module or models.Mlp(), models.features, section, device="cpu", **{"batch_sizes": (1, 4), **more}
    )


def entries() -> list[Path]:
    return sorted((default_folder() / "v1" / "entries").glob("*"))


with torch.no_grad():
    # Once, and not beside a background: an Mlp seeds the global generator, whose state Dynamo puts back as it traces.
    RIGHT = {rows: models.Mlp().eval()(*models.features(rows)) for rows in (1, 2, 4, 7)}


def check(model: CompiledModel) -> None:
    for rows, right in RIGHT.items():
        with torch.no_grad():
            assert compare(model(*models.features(rows)), right).max_abs < 1e-4


def call_until_done(model: CompiledModel) -> list[dict[str, str]]:
    """Call the model here while its background runs on another thread; return the engines after every change."""
    assert model.background is not None
    changes: queue.Queue[tuple[Callable[[], None], threading.Event]] = queue.Queue()

    def between_runs(change: Callable[[], None]) -> None:
        done = threading.Event()
        changes.put((change, done))
        done.wait()

    running = threading.Thread(target=model.background.run, args=(between_runs,), daemon=True)
    running.start()
    seen = [model.report.engines()]
    while running.is_alive():
        check(model)
        try:
            change, done = changes.get(timeout=0.02)  # with a pause, or the other process would starve
        except queue.Empty:
            continue
        change()
        done.set()
        if model.report.engines() != seen[-1]:
            seen.append(model.report.engines())
    check(model)
    return seen


@pytest.mark.parametrize("backend", ["pt2test_faithful", ONNX])
def test_it_answers_eager_and_then_moves_over(backend: str) -> None:
    model = build(backend)
    assert (model.report.start, model.report.background) == ("eager", "compiling")
    assert model.report.engines() == {"1": "eager", "4": "eager"}
    seen = call_until_done(model)
    assert model.report.background == "done"
    assert seen[-1] == {"1": backend, "4": backend}
    if backend == "onnxruntime":
        assert seen[1:-1] == [{"1": "eager", "4": backend}], "bucket by bucket"
    assert all(row.relative_error is not None for row in model.report.buckets), "it was verified here"
    after = model.report.after_ready
    assert after.calls > 8
    assert (after.compilations, after.failed_runs, after.refused_compilations) == (0, 0, 0)
    assert len(entries()) == 1


def test_with_a_plan_in_the_cache_it_starts_warm() -> None:
    build(when="start")
    model = build()
    assert (model.report.start, model.report.background, model.background) == ("warm", None, None)


@pytest.mark.any_torch
def test_what_the_background_made_is_for_every_later_start() -> None:
    call_until_done(build())
    again = build(when="start").report
    assert again.start == "warm", again.notes


def test_it_says_why_which_engine_lost_though_another_start_made_the_plan() -> None:
    def start(when: str) -> CompiledModel:
        section = {"compile": {"when": when}, "tune": {"engines": ["pt2test_slow", "pt2test_wrong"]}}
        return compile_model(models.Mlp(), models.features, section, batch_sizes=(1, 4), device="cpu")

    late, first = start("background"), start("start")
    assert first.report.start == "cold"
    assert {refusal.engine for refusal in first.report.all_refusals()} >= {"pt2test_wrong"}
    assert late.report.all_refusals() == []
    call_until_done(late)
    assert late.report.background == "done", late.report.notes
    assert late.report.refusals == first.report.refusals
    for ours, theirs in zip(late.report.buckets, first.report.buckets, strict=True):
        assert (ours.refusals, ours.race, ours.eager_won) == (theirs.refusals, theirs.race, theirs.eager_won)


@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
def test_streams_come_last() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = build("onnxruntime", streams=2)
        assert model.report.streams == 1
        call_until_done(model)
    finally:
        torch.set_num_threads(before)
    assert model.streams is not None
    assert (model.streams.count, model.streams.threads, model.report.streams) == (2, 1, 2)
    assert set(model.streams.model.costs) == set(model.costs)
    check(model.streams.model)


@pytest.mark.any_torch
@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
def test_streams_that_there_is_no_memory_for_have_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr("optim.streams.is_room_for", lambda size: False)  # the other process has it
    try:
        model = build("onnxruntime", streams=2)
        call_until_done(model)
    finally:
        torch.set_num_threads(before)
    assert (model.report.background, model.streams) == ("done", None)
    assert any("one run at a time, though the plan has 2" in note for note in model.report.notes)
    assert not any(row.stream_ms or row.stream_gain for row in model.report.buckets)


@pytest.mark.any_torch
def test_it_does_not_wait_for_a_process_that_compiles_the_same() -> None:
    call_until_done(build())
    (entry,) = entries()
    entry.rename(entry.parent.parent / "gone")
    with Cache(default_folder(), 10**9).hold(entry.name) as path:
        assert path is None
        model = build()
        assert model.report.background == "compiling"
    call_until_done(model)
    assert model.report.background == "done"


@pytest.mark.any_torch
@pytest.mark.parametrize("backend", ["pt2test_raises", "pt2test_wrong", "pt2test_crashes"])
def test_what_cannot_be_compiled_leaves_eager_and_the_reason(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(backend)
    seen = call_until_done(model)
    assert seen == [{"1": "eager", "4": "eager"}]
    reasons = [*map(str, model.report.all_refusals()), *model.report.notes]
    if backend == "pt2test_wrong":  # that will be so next time, so it is a plan
        assert model.report.background == "done"
        assert any("verify" in reason for reason in reasons)
    else:
        assert model.report.background == "failed"
        assert any("compiling in the background failed" in reason for reason in reasons)
        assert "what has not moved over stays eager" in caplog.text
    if backend == "pt2test_crashes":
        assert any("was killed by SIG" in reason for reason in reasons)


def test_a_process_that_is_killed_leaves_eager(caplog: pytest.LogCaptureFixture) -> None:
    model = build("pt2test_hangs")
    assert model.background is not None
    runs = threading.Thread(target=model.background.run, args=(lambda change: change(),), daemon=True)
    runs.start()
    while not (children := _children()):
        pass
    os.kill(children[0], signal.SIGKILL)
    runs.join()
    assert model.report.background == "failed"
    assert any("was killed by SIGKILL" in note for note in model.report.notes)
    assert "buckets 1, 4 are served eager: compiling in the background failed" in caplog.text
    check(model)


def test_it_can_be_stopped() -> None:
    model = build("pt2test_hangs")
    assert model.background is not None
    runs = threading.Thread(target=model.background.run, args=(lambda change: change(),), daemon=True)
    runs.start()
    while not _children():
        pass
    model.background.stop()
    runs.join()
    assert model.report.background == "failed"
    assert any("it was stopped" in note for note in model.report.notes)
    assert not _children()


@pytest.mark.any_torch
def test_one_that_is_stopped_while_it_moves_over_keeps_the_plan() -> None:
    model = build()
    assert model.background is not None
    background = model.background

    def between_runs(change: Callable[[], None]) -> None:
        change()

    class Patient:
        def __enter__(self) -> None:
            background.stop()

        def __exit__(self, *error: object) -> None:
            return None

    background.run(between_runs, Patient)
    assert (model.report.background, model.report.engines()["1"]) == ("failed", "eager")
    assert len(entries()) == 1
    check(model)


def _children() -> list[int]:
    """Return the processes that compile for this one."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"optim.filler" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


def test_a_module_that_no_other_process_can_have_is_compiled_before_it_is_ready() -> None:
    module = models.Mlp()
    module.lock = threading.Lock()  # type: ignore[assignment]
    model = build(module=module)
    assert (model.report.start, model.background) == ("cold", None)
    assert model.report.engines() == {"1": "pt2test_faithful", "4": "pt2test_faithful"}
    assert any("not compiled in the background but before it was ready" in note for note in model.report.notes)


@pytest.mark.any_torch
@pytest.mark.skipif(not CPU["onnxruntime"].available, reason=CPU["onnxruntime"].detail)
def test_an_artifact_of_other_weights_moves_nothing_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hashes are right; only the comparison with eager, in the replica, can tell."""
    build("onnxruntime", models.Mlp(seed=5), when="start")
    (theirs,) = entries()
    model = build("onnxruntime")
    compiles = model.background._compile  # type: ignore[union-attr]

    def compile_and_exchange() -> str | None:
        failure = compiles()
        (ours,) = [entry for entry in entries() if entry != theirs]
        for path in (theirs / "onnxruntime").iterdir():
            (ours / "onnxruntime" / path.name).write_bytes(path.read_bytes())
        manifest = json.loads((ours / "MANIFEST.json").read_text())
        for name in manifest["files"]:
            manifest["files"][name] = hashlib.sha256((ours / name).read_bytes()).hexdigest()
        (ours / "MANIFEST.json").write_text(json.dumps(manifest))
        return failure

    monkeypatch.setattr(model.background, "_compile", compile_and_exchange)
    assert call_until_done(model) == [{"1": "eager", "4": "eager"}]
    assert model.report.background == "failed"
    assert any("its plan does not hold any more" in note for note in model.report.notes)
    assert entries() == [theirs], "it was set aside"


@pytest.mark.parametrize(
    "section", [{"strict": True}, {"fallback": "fail"}, {"cache": {"enable": False}}], ids=lambda s: next(iter(s))
)
def test_what_contradicts_it_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"pt2\.compile\.when"):
        Pt2Config.parse({"compile": {"when": "background"}, **section})


def test_it_goes_with_ahead_of_time_compilation() -> None:
    config = Pt2Config.parse({"compile": {"when": "background"}, "export": {"aot_compile": True}})
    assert (config.compile.when, config.export.aot_compile) == ("background", True)
    with pytest.raises(ConfigError, match=r"pt2\.export\.aot_compile"):
        Pt2Config.parse({"compile": {"when": "background", "mode": "default"}, "export": {"aot_compile": True}})
