from __future__ import annotations

import itertools

import pytest

from optim.buckets import Bucket, cover, make_grid, pick_between, pick_length, pick_typical
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


@given(
    st.lists(st.integers(1, 16), min_size=1, max_size=4),
    st.lists(st.integers(1, 300), min_size=2, max_size=12, unique=True),
    st.integers(1, 400),
)
def test_sizes_between_buckets_are_of_none_and_within_the_grid(
    batch_sizes: list[int], lengths: list[int], token_budget: int
) -> None:
    grid = make_grid(batch_sizes, lengths, token_budget)
    between = pick_between(grid)
    for size in between:
        assert size not in grid
        held = pick_length(size.length, lengths)
        assert held is not None
        assert any(bucket.length == held and bucket.batch_size >= size.batch_size for bucket in grid)
    if max(lengths) > len(lengths):
        assert between


def test_sizes_between_the_buckets_of_texts() -> None:
    grid = make_grid((1, 2, 4), (16, 32, 64), token_budget=64)
    short = "1x1 1x2 1x3 1x4 1x5 1x6 1x7 1x8 1x11 1x15"
    assert " ".join(map(str, pick_between(grid))) == f"{short} 1x22 2x11 2x15 1x31 1x43 2x22 4x11 3x16 4x15 2x31 1x63"


def test_a_buckets_requests_are_half_way_down_to_the_next_shorter_one_and_at_most_a_quarter() -> None:
    grid = [Bucket(rows, length) for rows in (1, 8) for length in (16, 32, 48)]
    assert [pick_typical(Bucket(8, length), grid) for length in (16, 32, 48)] == [Bucket(8, n) for n in (12, 24, 40)]
    assert pick_typical(Bucket(1, 512), [Bucket(1, 128), Bucket(1, 512)]) == Bucket(1, 384)
    assert pick_typical(Bucket(1, 16), [Bucket(1, 16), Bucket(2, 16)]) is None
    assert pick_typical(Bucket(1), [Bucket(1), Bucket(2)]) is None
