from __future__ import annotations

import itertools

import pytest

from optim.buckets import Bucket, cover, make_grid, pick_length
from optim.errors import ConfigError

pytest.importorskip("hypothesis")  # a GPU machine may have pytest alone

from hypothesis import given
from hypothesis import strategies as st

costs = st.dictionaries(st.integers(1, 16), st.floats(0.1, 100), min_size=1, max_size=5)


@given(rows=st.integers(1, 60), costs=costs)
def test_a_cover_holds_every_row_and_no_run_is_useless(rows: int, costs: dict[int, float]) -> None:
    sizes = cover(rows, costs)
    assert set(sizes) <= set(costs)
    assert sum(sizes) >= rows
    assert list(sizes) == sorted(sizes, reverse=True)
    assert sum(sizes) - min(sizes) < rows  # without its smallest run it would not hold them


@given(rows=st.integers(1, 60), costs=costs)
def test_a_cover_never_costs_more_than_padding_to_the_next_bucket(rows: int, costs: dict[int, float]) -> None:
    total = sum(costs[size] for size in cover(rows, costs))
    fitting = [cost for size, cost in costs.items() if size >= rows]
    if fitting:
        assert total <= min(fitting) + 1e-9


@given(rows=st.integers(1, 9), costs=st.dictionaries(st.integers(1, 5), st.integers(1, 9), min_size=1))
def test_a_cover_is_the_cheapest_there_is(rows: int, costs: dict[int, int]) -> None:
    choices = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(costs, runs) for runs in range(1, rows + 1)
    )
    cheapest = min(sum(costs[s] for s in sizes) for sizes in choices if sum(sizes) >= rows)
    assert sum(costs[size] for size in cover(rows, costs)) == cheapest


def test_nine_rows_may_be_eight_and_one() -> None:
    assert cover(9, {1: 10, 8: 60, 16: 120}) == (8, 1)
    assert cover(9, {1: 100, 8: 60, 16: 120}) == (16,)
    with pytest.raises(ValueError, match="cannot cover 0 rows"):
        cover(0, {1: 1.0})


def test_the_grid() -> None:
    assert make_grid([4, 1, 4]) == (Bucket(1), Bucket(4))
    assert [str(b) for b in make_grid([1, 2], [16, 8])] == ["1x8", "1x16", "2x8", "2x16"]
    for wrong in ([], [0], [1.5], [True], ["2"]):
        with pytest.raises(ConfigError):
            make_grid(wrong)  # type: ignore[arg-type]
    assert pick_length(9, [8, 16, 32]) == 16
    assert pick_length(33, [8, 16, 32]) is None
