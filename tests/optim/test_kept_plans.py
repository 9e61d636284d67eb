"""Which plans are kept, and that the next start does by them what the first one did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optim import CompileError, compile_model
from optim.buckets import PROBES
from optim.cache import default_folder
from optim.report import CompileReport
from tests.support import backends, models

assert backends.BACKENDS, "imported, so that they are registered"


def start(section: dict[str, Any], *sizes: int) -> CompileReport:
    return compile_model(models.Mlp(), models.features, section, batch_sizes=sizes or (1,), device="cpu").report


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
