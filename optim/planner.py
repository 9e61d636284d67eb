"""The planner: which queued items run together, in which bucket's shape (pure integers, and measured costs)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from optim.buckets import Bucket, cover, pick_length

#: Plans whose costs differ by less than this are the same: sums of the same figures in another order.
_SAME = 1 + 1e-9


@dataclass(frozen=True)
class Item:
    """What is known of a queued request: its rows, and their length (0 where the model has none)."""

    rows: int
    length: int = 0


@dataclass(frozen=True)
class Group:
    """Items to run together: their places in the queue, oldest first, their rows, and the length they are padded to.

    `padded_rows` is what the buckets that hold them have in all; 0 where no bucket does, and the items run eager.
    """

    items: tuple[int, ...]
    rows: int
    length: int
    padded_rows: int = 0


class Planner:
    """Puts queued items into groups at the least total cost.

    `costs` maps every bucket to what one run of it costs (ms). An item is never split between groups; one of more rows
    than the largest bucket, or longer than the longest, is a group of its own.
    """

    def __init__(self, costs: Mapping[Bucket, float]) -> None:
        self._by_length: dict[int, dict[int, float]] = {}
        for bucket, ms in costs.items():
            self._by_length.setdefault(bucket.length, {})[bucket.batch_size] = ms
        self._lengths = sorted(self._by_length)
        self._cover = lru_cache(maxsize=4096)(self._find_cover)

    def plan(self, items: Sequence[Item], most_rows: int | None = None) -> list[Group]:
        """Return groups that hold every item once; each is the cheapest way for its items, and so is the whole.

        Items of similar length share a group where a bigger run costs less than several small ones. Of plans that cost
        the same the one with smaller groups wins, since its first answers are there sooner. With `most_rows` groups of
        several items have no more rows than that.
        """
        sizes = [pick_length(item.length, self._lengths) for item in items]
        fitting = sorted((i for i in range(len(items)) if sizes[i] is not None), key=lambda i: (items[i].length, i))
        groups = [Group((i,), items[i].rows, items[i].length) for i in range(len(items)) if sizes[i] is None]
        # best[n] is (cost of the cheapest plan for the n shortest items, the number of items in its last group).
        best: list[tuple[float, int]] = [(0.0, 0)]
        for end in range(1, len(fitting) + 1):
            length = sizes[fitting[end - 1]]
            assert length is not None
            largest = min(max(self._by_length[length]), most_rows or sys.maxsize)
            rows, found = 0, (float("inf"), 0)
            for start in range(end - 1, -1, -1):
                rows += items[fitting[start]].rows
                if rows > largest and start < end - 1:
                    break
                cost = best[start][0] + self._cover(rows, length)[0]
                if cost * _SAME < found[0]:
                    found = (cost, end - start)
            best.append(found)
        end = len(fitting)
        while end:
            start = end - best[end][1]
            members = tuple(sorted(fitting[start:end]))
            length = sizes[fitting[end - 1]]
            assert length is not None
            rows = sum(items[i].rows for i in members)
            groups.append(Group(members, rows, length, self._cover(rows, length)[1]))
            end = start
        return sorted(groups, key=lambda group: group.items)

    def cost(self, groups: Sequence[Group]) -> float:
        """Return the total ms of groups; those that run eager count as nothing."""
        return sum(self._cover(group.rows, group.length)[0] for group in groups if group.padded_rows)

    def _find_cover(self, rows: int, length: int) -> tuple[float, int]:
        costs = self._by_length[length]
        runs = cover(rows, costs)
        return sum(costs[size] for size in runs), sum(runs)
