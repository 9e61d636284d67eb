"""The README is true where a test can tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from deployments.options import make_table
from deployments.servable import Servable
from optim import Pt2Config

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_table_of_options_is_the_codes_own() -> None:
    begin, end = "<!-- options: written by `python -m deployments.options` -->\n", "\n<!-- options end -->"
    assert begin + make_table() + end in README


def test_every_pt2_section_is_accepted() -> None:
    (block,) = [block for block in blocks("yaml") if block.startswith("pt2:")]
    sections = [yaml.safe_load(line)["pt2"] for line in block.splitlines()]
    assert len(sections) == 4
    for section in sections:
        assert Pt2Config.parse(section)


def test_the_servable_is_one() -> None:
    (code,) = [block for block in blocks("python") if "class Ranker" in block]
    names = {"torch": torch, "make_ranker": lambda: torch.nn.Linear(128, 1)}
    exec(code, names)
    ranker = names["Ranker"]()  # type: ignore[operator]
    assert isinstance(ranker, Servable)
    (batch,) = ranker.example(4, None)
    assert ranker.load()(batch).shape == (4, 1)
    (row,) = ranker.preprocess({"features": [0.5] * 128})
    assert ranker.postprocess(ranker.load()(row)) == pytest.approx({"score": ranker.load()(row).item()}, abs=10)


@pytest.mark.any_torch
def test_the_library_example_runs() -> None:
    (code,) = [block for block in blocks("python") if "compile_model(module" in block]
    module = torch.nn.Linear(4, 2).eval()

    def example(batch_size: int, length: int | None) -> tuple[torch.Tensor, ...]:
        return (torch.randn(batch_size, 4),)

    names = {"module": module, "example": example, "inputs": example(3, None)}
    exec(code, names)
    outputs = names["outputs"]
    assert isinstance(outputs, torch.Tensor)
    assert outputs.shape == (3, 2)
