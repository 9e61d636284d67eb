from __future__ import annotations

import errno
import gc
import logging
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optim import Bucket, CompiledModel, compile_model
from optim.buckets import PROBES, make_grid
from optim.budget import Budget
from optim.config import Pt2Config
from optim.engines.base import Engine, EngineJob
from optim.race import PAYS, SIMPLICITY, TIE, Race, Round, Standing, rank
from optim.reference import Reference
from optim.trial import Proven, Trial
from optim.verify import Difference
from tests.support import backends, models

pytest.importorskip("hypothesis")  # a GPU machine may have pytest alone

from hypothesis import given
from hypothesis import strategies as st

ENGINES = st.sampled_from([*SIMPLICITY, "somebody-elses"])
MS = st.floats(0.01, 1000)


def race(*engines: str, budget_s: float = 60, **more: Any) -> dict[str, Any]:
    """A section in which these test backends race; kept whatever eager's speed, so no test depends on time."""
    return {"tune": {"engines": [*engines], "budget_s": budget_s}, "compile": {"only_if_faster": False}, **more}


def equal_to_eager(model: CompiledModel, module: nn.Module) -> None:
    for rows in (1, 2, 3, 5):
        inputs = models.features(rows)
        torch.testing.assert_close(model(*inputs), module(*inputs))


@given(st.dictionaries(st.integers(1, 8).map(Bucket), st.dictionaries(ENGINES, MS, min_size=1), min_size=1))
def test_the_winner_is_hardly_behind_the_best_and_each_engine_pays(table: dict[Bucket, dict[str, float]]) -> None:
    rounds = [Round(bucket, {"eager": 500.0, **ms}) for bucket, ms in table.items()]
    ranking = rank(rounds)
    winners = {order[0] for order in ranking.values()} - {"eager"}
    for name in winners:
        own = [{"eager": 500.0, **table[bucket]} for bucket, order in ranking.items() if order[0] == name]
        if all(ms[name] <= min(ms.values()) * TIE for ms in own):  # it stands in for no other
            behind = [
                all(ms.get(other, 1e9) > min(min(ms.values()) * PAYS, ms["eager"]) for other in winners - {name})
                for ms in own
            ]
            assert any(behind) or len(winners) == 1
    for bucket, order in ranking.items():
        ms = {"eager": 500.0, **table[bucket]}
        assert ms[order[0]] <= min(ms.values()) * (PAYS if len(table) > 1 else TIE)
        assert order[-1] == "eager"
        assert all(ms[name] <= ms["eager"] * TIE for name in order)
        assert [ms[name] for name in order[1:]] == sorted(ms[name] for name in order[1:])
        if ms["eager"] <= min(ms.values()) * TIE:
            assert order == ["eager"]


@given(st.dictionaries(ENGINES, MS, min_size=2), st.lists(st.floats(0.5, 2), min_size=1, max_size=4))
def test_drift_of_the_machine_between_rounds_changes_no_order(ms: dict[str, float], drift: list[float]) -> None:
    bucket = Bucket(1)
    one = [Round(bucket, {"eager": 500.0, **ms})]
    # The same engines met two at a time, each time on a machine of another speed.
    names = [name for name in ms if name != "eager"]
    many = [
        Round(bucket, {"eager": 500.0 * drift[i % len(drift)], name: ms[name] * drift[i % len(drift)]})
        for i, name in enumerate(names)
    ]
    if names and "eager" not in ms:
        assert rank(one)[bucket][0] == rank(many)[bucket][0]


def test_a_tie_goes_to_the_engine_that_serves_more_buckets_then_to_the_simpler() -> None:
    rounds = [
        Round(Bucket(1), {"eager": 9.0, "onnxruntime": 3.0, "openvino": 2.9}),
        Round(Bucket(2), {"eager": 9.0, "onnxruntime": 3.5, "openvino": 2.9}),
    ]
    assert {b.batch_size: order[0] for b, order in rank(rounds).items()} == {1: "openvino", 2: "openvino"}
    assert rank(rounds[:1])[Bucket(1)] == ["onnxruntime", "openvino", "eager"]
    assert rank([Round(Bucket(1), {"eager": 3.0, "openvino": 2.9})])[Bucket(1)] == ["eager"]
    assert rank([Round(Bucket(1), {"eager": 3.0, "ipex": 4.0})], keep_eager=False)[Bucket(1)][0] == "ipex"


def test_an_engine_beside_another_has_to_pay_for_itself() -> None:
    def winners(ms: float) -> dict[int, str]:
        rounds = [
            Round(Bucket(1), {"eager": 9.0, "onnxruntime": ms, "openvino": 3.0}),
            Round(Bucket(2), {"eager": 9.0, "onnxruntime": 9.0, "openvino": 3.0}),
        ]
        return {bucket.batch_size: order[0] for bucket, order in rank(rounds).items()}

    assert winners(2.8) == {1: "openvino", 2: "openvino"}
    assert winners(2.6) == {1: "onnxruntime", 2: "openvino"}
    # Where eager beats what would stand in, it does not stand in.
    rounds = [
        Round(Bucket(1), {"eager": 3.2, "onnxruntime": 3.0, "openvino": 3.25}),
        Round(Bucket(2), {"eager": 9.0, "openvino": 3.0}),
    ]
    assert rank(rounds)[Bucket(1)] == ["onnxruntime", "eager"]


def test_the_fastest_wins_and_the_report_has_the_rounds() -> None:
    module = models.Mlp().eval()
    section = race("pt2test_slow", "pt2test_faithful", "pt2test_wrong")
    model = compile_model(module, models.features, section, batch_sizes=(1, 4), device="cpu")
    assert model.report.candidates == ["pt2test_slow", "pt2test_faithful", "pt2test_wrong"]
    assert model.report.engines() == {"1": "pt2test_faithful", "4": "pt2test_faithful"}, model.report.to_dict()
    for row in model.report.buckets:
        assert list(row.race[0]) == ["eager"]
        assert any("pt2test_slow" in ms for ms in row.race)
        assert any("pt2test_faithful" in ms for ms in row.race)
        assert [(r.engine, r.stage) for r in row.refusals] == [("pt2test_wrong", "verify")]
    assert not [note for note in model.report.notes if "in this process" in note]
    equal_to_eager(model, module)


@pytest.mark.any_torch
def test_eager_stays_where_nothing_is_faster() -> None:
    section = race("pt2test_slow")
    section["compile"] = {"only_if_faster": True}
    model = compile_model(models.Mlp(), models.features, section, batch_sizes=(1,), device="cpu")
    assert model.report.engines() == {"1": "eager"}
    assert model.report.buckets[0].speedup == 1.0


@pytest.mark.any_torch
def test_what_need_not_be_faster_than_eager_serves_all_buckets_however_slow_it_is() -> None:
    model = compile_model(models.Mlp(), models.features, race("pt2test_slow"), batch_sizes=(1, 2, 4), device="cpu")
    assert model.report.engines() == dict.fromkeys(("1", "2", "4"), "pt2test_slow"), model.report.to_dict()


@pytest.mark.any_torch
def test_a_crash_costs_the_engine_that_crashed() -> None:
    module = models.Mlp().eval()
    section = race("pt2test_crashes", "pt2test_faithful")
    model = compile_model(module, models.features, section, batch_sizes=(1, 2), device="cpu")
    (refusal,) = model.report.refusals
    assert refusal.engine == "pt2test_crashes"
    assert "was killed by SIGSEGV" in refusal.message
    assert set(model.report.engines().values()) == {"pt2test_faithful"}
    equal_to_eager(model, module)


@pytest.mark.any_torch
def test_where_a_crash_leaves_no_process_to_go_on_nothing_is_raced_in_this_one(tmp_path: Path) -> None:
    parent, seen = os.getpid(), tmp_path / "seen"

    class LoadsOnce(models.Mlp):
        def __setstate__(self, state: dict[str, Any]) -> None:
            self.__dict__.update(state)
            if os.getpid() != parent:
                if seen.exists() and seen.read_text() != str(os.getpid()):
                    os._exit(3)
                seen.write_text(str(os.getpid()))

    module = LoadsOnce().eval()
    section = race("pt2test_crashes", "pt2test_faithful", "pt2test_slow")
    model = compile_model(module, models.features, section, batch_sizes=(1,), device="cpu")
    reasons = {r.engine: (r.stage, r.message) for r in model.report.refusals}
    assert "was killed by SIGSEGV" in reasons.pop("pt2test_crashes")[1]
    why = "not tried: the process that was to go on with the race ended with code 3"
    assert [*reasons] == ["pt2test_faithful", "pt2test_slow"]
    assert all(stage == "build" and message.startswith(why) for stage, message in reasons.values())
    assert not [note for note in model.report.notes if "in this process" in note]
    assert model.report.engines() == {"1": "eager"}
    equal_to_eager(model, module)


@pytest.mark.any_torch
def test_what_hangs_past_the_budget_is_left_behind_and_the_rest_is_not_tried() -> None:
    module = models.Mlp().eval()
    section = race("pt2test_faithful", "pt2test_hangs", "pt2test_wrong", budget_s=15)
    model = compile_model(module, models.features, section, batch_sizes=(1,), device="cpu")
    reasons = {r.engine: (r.stage, r.message) for r in model.report.all_refusals()}
    assert "did not end within the" in reasons["pt2test_hangs"][1]
    assert reasons["pt2test_wrong"] == ("budget", "not tried: the race's budget was spent")
    assert model.report.engines() == {"1": "pt2test_faithful"}
    equal_to_eager(model, module)


class Unpicklable(models.Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_module_that_cannot_be_carried_races_in_this_process() -> None:
    module = Unpicklable().eval()
    section = race("pt2test_slow", "pt2test_faithful")
    model = compile_model(module, models.features, section, batch_sizes=(1, 2), device="cpu")
    assert any("the race was held in this process: the module cannot be pickled" in n for n in model.report.notes)
    assert set(model.report.engines().values()) == {"pt2test_faithful"}
    equal_to_eager(model, module)
    assert model.report.after_ready.compilations == 0


def test_what_was_raced_in_this_process_is_built_after_the_race_has_no_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[Budget] = []

    def make(seconds: float) -> Budget:
        held.append(Budget(seconds))
        return held[-1]

    run = Race.run

    def spend(self: Race) -> Standing:
        found = run(self)
        held[0].seconds = 0
        return found

    monkeypatch.setattr("optim.start.Budget", make)
    monkeypatch.setattr("optim.race.CLOSE", 1e9)  # so that what was raced is still there
    monkeypatch.setattr(Race, "run", spend)
    module = Unpicklable().eval()
    sizes = tuple(range(1, PROBES + 4))
    model = compile_model(module, models.features, race("pt2test_faithful"), batch_sizes=sizes, device="cpu")
    assert [budget.left_s <= 0 for budget in held] == [True]
    assert model.report.engines() == {str(size): "pt2test_faithful" for size in sizes}, model.report.all_refusals()


@pytest.mark.any_torch
@pytest.mark.parametrize("first", [0, 1])
def test_where_a_process_cannot_be_started(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """As at a container's limit of processes: the first one, or the one after an engine's crash."""
    start, started = subprocess.Popen, list[bool]()

    def fail(*args: Any, **more: Any) -> Any:
        if args[0][0] != sys.executable:  # a compiler that is asked for its version
            return start(*args, **more)
        started.append(len(started) < first)
        if not started[-1]:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return start(*args, **more)

    monkeypatch.setattr("optim.child.subprocess.Popen", fail)
    module, descriptors = models.Mlp().eval(), len(os.listdir("/proc/self/fd"))
    section = race(*["pt2test_crashes"][:first], "pt2test_faithful")
    model = compile_model(module, models.features, section, batch_sizes=(1,), device="cpu")
    why = "could not be started (Resource temporarily unavailable)"
    if first == 0:
        assert f"the race was held in this process: the process that was to hold the race {why}" in model.report.notes
        assert model.report.engines() == {"1": "pt2test_faithful"}
    else:
        refusals = {r.engine: r.message for r in model.report.refusals}
        assert refusals["pt2test_faithful"] == f"not tried: the process that was to go on with the race {why}"
    assert started == [*[True] * first, False]
    equal_to_eager(model, module)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@pytest.mark.any_torch
def test_a_process_with_many_open_files() -> None:
    """A replica has one for each caller; from 1024 on select(2) knows none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"a process may have {hard} open files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        section = race("pt2test_slow", "pt2test_faithful")
        model = compile_model(models.Mlp(), models.features, section, batch_sizes=(1,), device="cpu")
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert model.report.engines() == {"1": "pt2test_faithful"}, model.report.all_refusals()
    assert not [note for note in model.report.notes if "in this process" in note]


@pytest.mark.any_torch
def test_what_lies_in_the_working_directory_is_not_imported(tmp_path: Path) -> None:
    program, elsewhere = tmp_path / "program" / "main.py", tmp_path / "elsewhere"
    program.parent.mkdir()
    program.write_text(
        """
import torch
from optim import compile_model
from tests.support import models
section = {"tune": {"engines": ["channels_last"]}, "compile": {"only_if_faster": False}}
model = compile_model(models.SmallCnn(), models.images, section, batch_sizes=(1,), device="cpu")
assert model.report.engines() == {"1": "channels_last"}, model.report
assert not [note for note in model.report.notes if "in this process" in note], model.report.notes
"""
    )
    (elsewhere / "optim").mkdir(parents=True)
    (elsewhere / "optim" / "__init__.py").write_text("raise ImportError('not this one')")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-W", "ignore", program], check=True, cwd=elsewhere, env=environment)


@pytest.mark.any_torch
def test_a_class_of_a_script_is_carried_over() -> None:
    class Local(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    section = race("pt2test_faithful")
    model = compile_model(Local(), models.features, section, batch_sizes=(1,), device="cpu")
    assert model.report.engines() == {"1": "pt2test_faithful"}
    assert not [note for note in model.report.notes if "in this process" in note]


@pytest.mark.any_torch
def test_no_process_and_no_file_is_left(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    section = race("pt2test_crashes", "pt2test_faithful")
    compile_model(models.Mlp(), models.features, section, batch_sizes=(1,), device="cpu")
    (home,) = tmp_path.glob("pt2-*")  # others than we may leave files of their own
    assert list(home.iterdir()) == []
    found = subprocess.run(["ps", "-ax", "-o", "ppid,args"], capture_output=True, text=True, check=True).stdout
    mine = [line for line in found.splitlines() if line.split()[0] == str(os.getpid())]
    assert not [line for line in mine if "optim.arena" in line]


@pytest.mark.any_torch
def test_the_race_is_shown_as_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "optim"):
        compile_model(models.Mlp(), models.features, race("pt2test_faithful"), batch_sizes=(1,), device="cpu")
    lines = [record.message for record in caplog.records]
    assert "race: pt2test_faithful" in lines
    assert any(line.startswith("race: bucket 1: eager ") for line in lines)


@pytest.mark.any_torch
@pytest.mark.slow
def test_a_loser_leaves_no_library_behind() -> None:
    script = """
import sys
from optim import compile_model
from tests.support import models
model = compile_model(models.Noop(), models.features, None, batch_sizes=(1,), device="cpu")
assert model.report.engines() == {"1": "eager"}, model.report
assert model.report.candidates
assert not [n for n in sys.modules if n in ("openvino", "intel_extension_for_pytorch")]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


assert backends.BACKENDS  # importing the module registers them


class Lengths(nn.Module):
    """[B, L] -> [B]; it notes the lengths that it is asked for, and may refuse those that are not in `only`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.only: tuple[int, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.only and x.shape[1] not in self.only:
            raise RuntimeError("only some lengths")
        self.asked.append(x.shape[1])
        return x.sum(1)


@pytest.mark.parametrize(("lengths", "typical"), [((16, 32), {12, 24}), ((32,), {32})])
def test_what_takes_requests_as_they_are_is_timed_on_their_average_length(
    lengths: tuple[int, ...], typical: set[int]
) -> None:
    def example(rows: int, length: int | None) -> tuple[torch.Tensor, ...]:
        return (torch.ones(rows, length or 0),)

    def asked(reference: Reference, name: str, *, takes_any_size: bool = False, only: tuple[int, ...] = ()) -> set[int]:
        run, found = Lengths(), set[int]()
        job = EngineJob.of(run, Pt2Config.parse(None), reference, device, "forward")
        race, engine = Race(job, reference, [], Budget(60)), Engine(job)
        engine.takes_any_size, run.only = takes_any_size, only
        race.trials["some"] = Trial(engine, reference, 60, proven={b: Proven(run, Difference()) for b in job.samples})
        for bucket, inputs in job.samples.items():
            timed = race._runner(name, bucket)
            run.asked.clear()
            timed(*inputs)
            found.update(run.asked)
        return found

    module, device = Lengths().eval(), torch.device("cpu")
    reference = Reference(module, example, make_grid((1, 2), lengths), device)
    # Another process has no function that makes examples.
    for known in (reference.of_copy(Lengths().eval()), reference):
        assert asked(known, "some", takes_any_size=True) == typical
        assert asked(known, "some", takes_any_size=True, only=lengths) == set(lengths)
        assert asked(known, "some") == set(lengths)
        assert asked(known, "eager") == set(lengths)
