from __future__ import annotations

from collections.abc import Mapping

import pytest

from optim.buckets import Bucket, pick_length
from optim.planner import Item, Planner

pytest.importorskip("hypothesis")  # a GPU machine may have pytest alone

from hypothesis import given
from hypothesis import strategies as st

lengths = st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True)


@st.composite
def grids(draw: st.DrawFn, with_lengths: bool = True) -> Mapping[Bucket, float]:
    sizes = draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4, unique=True))
    found = draw(lengths) if with_lengths else [0]
    return {Bucket(size, length): draw(st.floats(0.1, 100)) for size in sizes for length in found}


def items(longest: int, most_rows: int = 3) -> st.SearchStrategy[list[Item]]:
    return st.lists(st.builds(Item, st.integers(1, most_rows), st.integers(1, longest)), max_size=12)


@given(grids(), items(longest=80, most_rows=12))
def test_every_item_is_in_one_group_that_fits_it(costs: Mapping[Bucket, float], queue: list[Item]) -> None:
    groups = Planner(costs).plan(queue)
    assert sorted(i for group in groups for i in group.items) == list(range(len(queue)))
    for group in groups:
        assert group.rows == sum(queue[i].rows for i in group.items)
        assert all(queue[i].length <= group.length for i in group.items)
        if group.padded_rows:
            sizes = [bucket.batch_size for bucket in costs if bucket.length == group.length]
            assert group.length == pick_length(max(queue[i].length for i in group.items), {b.length for b in costs})
            assert group.rows <= max(sizes) or len(group.items) == 1
            assert group.padded_rows >= group.rows
        else:
            (alone,) = group.items
            assert queue[alone].length > max(bucket.length for bucket in costs)


@given(grids(), items(longest=80, most_rows=12))
def test_where_nothing_is_padded_a_group_is_as_long_as_its_longest_item(
    costs: Mapping[Bucket, float], queue: list[Item]
) -> None:
    groups = Planner(costs, any_size=True).plan(queue)
    assert sorted(i for group in groups for i in group.items) == list(range(len(queue)))
    longest, most = max(bucket.length for bucket in costs), max(bucket.batch_size for bucket in costs)
    for group in groups:
        assert group.length == max(queue[i].length for i in group.items)
        if group.length > longest:
            assert (len(group.items), group.padded_rows) == (1, 0)
        else:
            assert group.padded_rows == group.rows
            assert group.rows <= most or len(group.items) == 1


#: As a token budget leaves it: several rows for short lengths alone. A token costs 1, a run 2.
RAGGED = {b: 2.0 + b.batch_size * b.length for b in [Bucket(1, n) for n in (8, 16, 32)] + [Bucket(2, 8), Bucket(4, 8)]}


@pytest.mark.parametrize(
    ("rows", "length", "ms"),
    [
        (1, 8, 10.0),
        (1, 16, 18.0),
        (1, 12, 14.0),  # between two lengths
        (1, 3, 10.0),  # below the smallest: as that
        (3, 8, 26.0),  # between two numbers of rows
        (3, 5, 26.0),
        (3, 20, 66.0),  # no bucket has so many rows of this length: one row after the other
        (5, 8, 44.0),  # four and one
    ],
)
def test_a_size_between_buckets_costs_what_lies_between_them(rows: int, length: int, ms: float) -> None:
    planner = Planner(RAGGED, any_size=True)
    [group] = planner.plan([Item(rows, length)])
    assert planner.cost([group]) == pytest.approx(ms)
    assert (group.length, group.padded_rows) == (length, rows)


def test_what_would_be_padded_to_one_bucket_is_not_joined_where_nothing_is_padded() -> None:
    costs = {Bucket(1, 16): 2.0, Bucket(2, 16): 3.6, Bucket(1, 32): 4.0, Bucket(2, 32): 7.6}
    queue = [Item(1, 18), Item(1, 31), Item(1, 30)]
    assert [group.items for group in Planner(costs).plan(queue)] == [(0, 2), (1,)]
    assert [group.items for group in Planner(costs, any_size=True).plan(queue)] == [(0,), (1, 2)]


@given(grids(), items(longest=1))
def test_it_never_costs_more_than_one_by_one_nor_than_padding_all_to_one_bucket(
    costs: Mapping[Bucket, float], queue: list[Item]
) -> None:
    planner = Planner(costs)
    cost = planner.cost(planner.plan(queue))
    alone = sum(planner.cost(planner.plan([item])) for item in queue)
    assert cost <= alone * 1.000001
    rows = sum(item.rows for item in queue)
    shortest = min(bucket.length for bucket in costs)
    for bucket, ms in costs.items():
        if bucket.length == shortest and queue and rows <= bucket.batch_size:
            assert cost <= ms * 1.000001


@given(grids(with_lengths=False), st.integers(1, 30))
def test_without_lengths_it_costs_what_the_best_cover_does(costs: Mapping[Bucket, float], rows: int) -> None:
    planner = Planner(costs)
    together = planner.cost(planner.plan([Item(rows)]))  # covered as one item
    assert abs(planner.cost(planner.plan([Item(1)] * rows)) - together) <= 1e-6 * together


def test_items_of_similar_length_run_together() -> None:
    costs = {Bucket(1, 16): 4.0, Bucket(4, 16): 8.0, Bucket(1, 64): 16.0, Bucket(4, 64): 60.0}
    groups = Planner(costs).plan([Item(1, 60), Item(1, 9), Item(1, 50), Item(1, 12), Item(1, 3)])
    assert [(group.items, group.length, group.padded_rows) for group in groups] == [
        ((0,), 64, 1),
        ((1, 3, 4), 16, 4),
        ((2,), 64, 1),
    ]


def test_what_costs_the_same_is_not_joined() -> None:
    groups = Planner({Bucket(1): 10.0, Bucket(2): 20.0}).plan([Item(1)] * 3)
    assert [group.items for group in groups] == [(0,), (1,), (2,)]
    groups = Planner({Bucket(1): 10.0, Bucket(2): 19.0}).plan([Item(1)] * 3)
    assert sorted(len(group.items) for group in groups) == [1, 2]


def test_an_item_that_no_bucket_holds_is_alone_and_marked() -> None:
    groups = Planner({Bucket(1, 8): 1.0, Bucket(2, 8): 1.5}).plan([Item(1, 9), Item(1, 4), Item(5, 4)])
    assert [(group.items, group.padded_rows) for group in groups] == [((0,), 0), ((1,), 1), ((2,), 5)]
