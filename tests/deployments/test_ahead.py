"""Compiling into the cache ahead of the first replica."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deployments.ahead import main
from deployments.args import ModelArgs
from deployments.compile import compile_servable, resources

ARGS = {
    "model": "tests.support.servables:Tiny",
    "name": "tiny",
    "pt2": {"compile": {"backend": "pt2test_faithful", "only_if_faster": False}},
    "batching": {"batch_sizes": [1, 4]},
}


def write(folder: Path, **changes: object) -> str:
    application = {
        "name": "tiny",
        "import_path": "deployments.app:build",
        "args": {**ARGS, **changes},
        "deployments": [{"name": "tiny", "ray_actor_options": {"num_cpus": 2}}],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return str(path)


def test_a_replica_finds_what_was_compiled_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "tiny: cpu, 2 threads" in told
    assert "is there now" in told
    assert "bucket 4: pt2test_faithful" in told
    args = ModelArgs.parse(ARGS)
    model = compile_servable(args.make_servable(), args, *resources(args, cpus=2, gpus=0))
    assert model.report.start == "warm"
    assert main([write(tmp_path)]) == 0
    assert "was there already" in capsys.readouterr().out
    assert main([write(tmp_path), "--anew"]) == 0
    assert "is there now" in capsys.readouterr().out


def test_what_would_be_compiled_in_the_background_is_compiled_ahead_too(tmp_path: Path) -> None:
    pt2 = {"compile": {**ARGS["pt2"]["compile"], "when": "background"}}  # type: ignore[index]
    assert main([write(tmp_path, pt2=pt2)]) == 0
    args = ModelArgs.parse({**ARGS, "pt2": pt2})
    model = compile_servable(args.make_servable(), args, *resources(args, cpus=2, gpus=0))
    assert (model.report.start, model.background) == ("warm", None)


def test_what_is_not_kept_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write(tmp_path, pt2="pt2test_raises_at_call")]) == 1
    told = capsys.readouterr().err
    assert "tiny: nothing is kept; notes: " in told
    assert "no plan is kept: bucket 1 is eager, and pt2test_raises_at_call was refused" in told


def test_a_mistake_is_told_and_nothing_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write(tmp_path, pt2={"cash": {}})]) == 1
    assert "pt2.cash" in capsys.readouterr().err
