"""`FreeSlots`: which slots of a cache are free, and which tokens each still has the keys and values of.

A token's keys and values come of it and of those before it alone. So a request that begins as another one did, as a
chat's next turn does, has them copied, or is given the very slot; and a prompt of several answers is run once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The slot that a request gets, and the slot that has the first `count` tokens of its prompt: maybe the same."""

    slot: int
    source: int
    count: int


class FreeSlots:
    """The slots that nobody has, the one that has been free for longest first; `piece` is the least that is reused.

    What is reused ends where a piece would, so that the rest is run in the pieces that it would be run in.
    """

    def __init__(self, slots: int, piece: int) -> None:
        self._piece = piece
        self._kept: dict[int, Sequence[int]] = dict.fromkeys(range(slots), ())

    def __bool__(self) -> bool:
        return bool(self._kept)

    def give_back(self, slot: int, tokens: Sequence[int]) -> None:
        """Take a slot back, with the tokens it has."""
        self._kept[slot] = tokens

    def take(self, prompt: Sequence[int], others: Mapping[int, Sequence[int]] | None = None) -> Place:
        """Take a slot out for a prompt, with what it, or another, or one of the `others`, has of it.

        A free slot is given away with what it has where half of that and more is the prompt's; else that is left for
        others, and the slot that has been free for longest is taken. At least one token of the prompt is always left to
        be run: its logits are what comes of it. Without `others` nothing is reused.
        """
        oldest = next(iter(self._kept))
        found = Place(oldest, oldest, 0)
        if others is not None:
            held = {**self._kept, **others}  # free ones first: from there nothing needs to be copied
            counts = {slot: self._common(prompt, tokens) for slot, tokens in held.items()}
            source = max(counts, key=counts.__getitem__)
            if count := counts[source]:
                moves_in = source in self._kept and (2 * count >= len(held[source]) or len(self._kept) == 1)
                target = source if moves_in else next(slot for slot in self._kept if slot != source)
                found = Place(target, source, count)
        del self._kept[found.slot]
        return found

    def _common(self, prompt: Sequence[int], tokens: Sequence[int]) -> int:
        """Return how many tokens both begin with, in whole pieces; one of the prompt's is left."""
        most = min(len(prompt) - 1, len(tokens))
        count = 0
        while count + self._piece <= most and _same(prompt, tokens, count, count + self._piece):
            count += self._piece
        return count


def _same(one: Sequence[int], other: Sequence[int], start: int, end: int) -> bool:
    return list(one[start:end]) == list(other[start:end])
