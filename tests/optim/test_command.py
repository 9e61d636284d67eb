from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from optim.__main__ import main
from tests.support import backends

ROOT = Path(__file__).parents[2]
MLP = ["tests.support.models:Mlp", "tests.support.models:features"]
FAITHFUL = '{"compile": {"backend": "pt2test_faithful", "only_if_faster": false}}'
assert backends.BACKENDS


def test_the_table_and_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    status = main([*MLP, "--pt2", FAITHFUL, "--batch-sizes", "1", "3", "--device", "cpu", "--json", str(path)])
    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["bucket", "engine", "ms", "eager", "ms", "ratio", "max", "error"]
    assert [line.split()[:2] for line in lines[1:3]] == [["1", "pt2test_faithful"], ["3", "pt2test_faithful"]]
    report = json.loads(path.read_text())
    assert [bucket["engine"] for bucket in report["buckets"]] == ["pt2test_faithful"] * 2


def test_it_runs_as_a_command_and_shows_its_progress() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "optim", *MLP, "--pt2", '{"compile": {"enable": false}}']
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "engines by bucket" in done.stderr
    assert "eager" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([*MLP, "--pt2", "inductr"], 2, "pt2.compile.backend: 'inductr' is not allowed; did you mean 'inductor'?"),
        ([*MLP, "--pt2", "{"], 2, "--pt2: '{' is not allowed; use a backend's name or JSON"),
        (["tests.support.models:Nope", MLP[1]], 2, "factory: 'tests.support.models:Nope' is not allowed"),
        (["nope", MLP[1]], 2, "factory: 'nope' is not allowed; use package.module:callable"),
        ([*MLP, "--batch-sizes", "0"], 2, "batch_sizes: 0 is not allowed"),
        (["tests.support.models:Failing", MLP[1]], 1, "ModelError: the model itself fails"),
        (
            [*MLP, "--pt2", '{"compile": {"backend": "pt2test_raises"}, "fallback": "fail"}'],
            1,
            "CompileError: bucket 1 could",
        ),
    ],
)
def test_mistakes_and_failures(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--device", "cpu"]) == status
    assert message in capsys.readouterr().err
