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
    """Items to run together: their places in the queue, oldest first, their rows, and the length of the run.

    `padded_rows` is what runs: what the buckets that hold them have in all, or the rows, where nothing is padded; 0
    where no bucket holds them, and they run eager.
    """

    items: tuple[int, ...]
    rows: int
    length: int
    padded_rows: int = 0


class Planner:
    """Puts queued items into groups at the least total cost.

    `costs` maps every bucket to what one run of it costs (ms). An item is never split between groups; one of more rows
    than the largest bucket, or longer than the longest, is a group of its own. With `any_size` nothing is padded to its
    bucket: runs of sizes between buckets cost what lies between, and a group is as long as its longest item.
    """

    def __init__(self, costs: Mapping[Bucket, float], *, any_size: bool = False) -> None:
        self._any_size = any_size
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
        # How long a run of the n shortest is.
        lengths = [items[i].length if self._any_size else sizes[i] or 0 for i in fitting]
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
                cost = best[start][0] + self._cover(rows, lengths[end - 1])[0]
                if cost * _SAME < found[0]:
                    found = (cost, end - start)
            best.append(found)
        end = len(fitting)
        while end:
            start = end - best[end][1]
            members = tuple(sorted(fitting[start:end]))
            length = lengths[end - 1]
            rows = sum(items[i].rows for i in members)
            groups.append(Group(members, rows, length, self._cover(rows, length)[1]))
            end = start
        return sorted(groups, key=lambda group: group.items)

    def cost(self, groups: Sequence[Group]) -> float:
        """Return the total ms of groups; those that run eager count as nothing."""
        return sum(self._cover(group.rows, group.length)[0] for group in groups if group.padded_rows)

    def _find_cover(self, rows: int, length: int) -> tuple[float, int]:
        bucket_length = pick_length(length, self._lengths)
        assert bucket_length is not None
        costs = self._by_length[bucket_length]
        if self._any_size and rows <= max(costs):
            return self._between(rows, length, bucket_length), rows
        runs = cover(rows, costs)
        if self._any_size:  # several runs, the last with what is left
            sizes = [min(size, rows - sum(runs[:n])) for n, size in enumerate(runs)]
            return sum(self._between(size, length, bucket_length) for size in sizes), rows
        return sum(costs[size] for size in runs), sum(runs)

    def _between(self, rows: int, length: int, bucket_length: int) -> float:
        """Return the cost of a run between buckets: linear in rows and length; below the smallest, as there."""
        sizes = sorted(self._by_length[bucket_length])
        upper = min(size for size in sizes if size >= rows)
        above = self._at(upper, length, bucket_length)
        lower = max((size for size in sizes if size < rows), default=upper)
        if lower == upper:
            return above
        below = self._at(lower, length, bucket_length)
        return below + (above - below) * (rows - lower) / (upper - lower)

    def _at(self, size: int, length: int, bucket_length: int) -> float:
        """Return the cost of a run of a bucket's rows at a length between it and the next shorter one of these rows."""
        above = self._by_length[bucket_length][size]
        shorter = [n for n in self._lengths if n < bucket_length and size in self._by_length[n]]
        if not shorter:
            return above
        below = self._by_length[shorter[-1]][size]
        return below + (above - below) * (length - shorter[-1]) / (bucket_length - shorter[-1])
