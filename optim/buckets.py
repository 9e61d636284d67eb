"""Buckets: the finite, declared shapes a model is compiled for, and how a batch is covered by them (pure integers)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from optim.errors import ConfigError

#: Buckets that a race is held on where there are more; the others are tried with what won the nearest of them.
PROBES = 6


@dataclass(frozen=True, order=True)
class Bucket:
    """One compiled shape: rows, and tokens a row (0 where the model has no length dimension)."""

    batch_size: int
    length: int = 0

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.length}" if self.length else str(self.batch_size)

    @property
    def tokens(self) -> int:
        """The tokens of a run; rows, where there is no length."""
        return self.batch_size * max(self.length, 1)


def make_grid(
    batch_sizes: Iterable[int], lengths: Iterable[int] | None = None, token_budget: int | None = None
) -> tuple[Bucket, ...]:
    """Return every combination, smallest first, those left out that hold more than `token_budget` tokens.

    The smallest batch size stays at every length. Raises ConfigError for an empty list or anything but whole numbers
    above 0.
    """
    sizes = _check_sizes("batch_sizes", batch_sizes)
    if lengths is None:
        return tuple(Bucket(size) for size in sizes)
    if token_budget is not None:
        _check_sizes("token_budget", [token_budget])
    return tuple(
        Bucket(size, length)
        for size in sizes
        for length in _check_sizes("lengths", lengths)
        if token_budget is None or size == sizes[0] or size * length <= token_budget
    )


def _check_sizes(key: str, sizes: Iterable[int]) -> list[int]:
    given = list(sizes)
    if not given:
        raise ConfigError(key, given, "name at least one size")
    for size in given:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(key, size, "use whole numbers above 0")
    return sorted(set(given))


def pick_probes(buckets: Iterable[Bucket]) -> list[Bucket]:
    """Return the buckets to race on: all where they are few, else some of every size, the ends included."""
    by_size = sorted(buckets, key=lambda b: (b.tokens, b))
    if len(by_size) <= PROBES:
        return sorted(by_size)
    places = {round(i * (len(by_size) - 1) / (PROBES - 1)) for i in range(PROBES)}
    return sorted({by_size[place] for place in places} | {max(by_size)})


def pick_between(buckets: Iterable[Bucket]) -> list[Bucket]:
    """Return sizes between the buckets on which to hold code for any size against eager, the smallest first.

    There are none where there is one length. They are few where they cost much: the first eight lengths of one row,
    rows next to each batch size at the shortest length, and two lengths below each of the buckets that a race is held
    on.
    """
    grid = set(buckets)
    shortest, longest = min(b.length for b in grid), max(b.length for b in grid)
    if shortest == longest:
        return []
    most_rows = max(b.batch_size for b in grid if b.length == shortest)
    found = {Bucket(1, length) for length in range(1, min(8, longest) + 1)}
    found |= {Bucket(n, shortest) for b in grid for n in (b.batch_size - 1, b.batch_size + 1) if 1 <= n <= most_rows}
    for bucket in pick_probes(grid):
        found |= {Bucket(bucket.batch_size, bucket.length - less) for less in (1, bucket.length // 3)}
    return sorted((size for size in found - grid if size.length > 0), key=lambda size: (size.tokens, size))


def pick_typical(bucket: Bucket, buckets: Iterable[Bucket]) -> Bucket | None:
    """Return the size that requests of a bucket have on average, between its length and the next shorter one.

    Those that run together are of similar length. At most a quarter shorter than the bucket: lengths far from each
    other may be all there are; None where there is one.
    """
    lengths = sorted({b.length for b in buckets})
    if len(lengths) < 2:
        return None
    shorter = max((length for length in lengths if length < bucket.length), default=0)
    return Bucket(bucket.batch_size, -(-max(2 * (shorter + bucket.length), 3 * bucket.length) // 4))


def pick_length(length: int, lengths: Iterable[int]) -> int | None:
    """Return the smallest of `lengths` that holds `length`, or None where none does."""
    return min((candidate for candidate in lengths if candidate >= length), default=None)


def cover(rows: int, costs: Mapping[int, float]) -> tuple[int, ...]:
    """Cover `rows` by batch sizes at the least total cost, largest first.

    `costs` maps each batch size to what one run of it costs (ms). The last run may be padded: nine rows may be
    8 + 1 rather than 16. Of equal costs the plan with fewer runs wins.
    """
    if rows < 1 or not costs:
        raise ValueError(f"cannot cover {rows} rows with the batch sizes {sorted(costs)}")
    # best[n] is (cost, runs, size of the last run) of the cheapest cover of n rows.
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]
    for n in range(1, rows + 1):
        rests = ((size, best[max(n - size, 0)]) for size in costs)
        best.append(min((rest[0] + costs[size], rest[1] + 1, size) for size, rest in rests))
    sizes = []
    while rows > 0:
        sizes.append(best[rows][2])
        rows -= sizes[-1]
    return tuple(sorted(sizes, reverse=True))
