"""Bars side by side, for the plots of all benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def draw_bars(axis: Any, groups: Sequence[str], heights: Mapping[str, Sequence[float]], *, ours: str) -> None:
    """Draw one bar a series in every group on a matplotlib axis; `ours` is black."""
    width = 0.8 / len(heights)
    for i, (name, values) in enumerate(heights.items()):
        places = [group + (i - len(heights) / 2 + 0.5) * width for group in range(len(groups))]
        axis.bar(places, values, width, label=name, color="black" if name == ours else f"C{i}")
    axis.set_xticks(range(len(groups)), groups)
