"""`FreeSlots`: which slots of a cache are free, and which tokens each still has the keys and values of.

A token's keys and values come of it and of those before it alone. So a request that begins as another one did, as a
chat's next turn does, has them copied, or is given the very slot; and a prompt of several answers is run once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The slot that a request gets, and the slot that has the first `count` tokens of its prompt: maybe the same."""

    slot: int
    source: int
    count: int


class FreeSlots:
    """The slots that nobody has, and what they hold.

    What is reused of a prompt is whole pieces of so many tokens, so that the pieces that are run begin where pieces
    begin: code that was compiled for aligned positions gets no others.
    """

    def __init__(self, slots: int, piece: int) -> None:
        self._piece = piece
        #: Of each free slot the tokens it has, the one that has been free for longest first.
        self._kept: dict[int, list[int]] = {slot: [] for slot in range(slots)}

    def __bool__(self) -> bool:
        return bool(self._kept)

    def give_back(self, slot: int, tokens: list[int]) -> None:
        """Take a slot back, with the tokens it has."""
        self._kept[slot] = tokens

    def take(self, prompt: list[int], others: Mapping[int, list[int]] | None = None) -> Place:
        """Take a slot out for a prompt, with what it, or another, or one of the `others`, has of it.

        A free slot is given away with what it has where next to all of that is the prompt's, as at a chat's next turn.
        Else that is left for others: an empty slot is taken, or the one that has been free for longest. At least one
        token of the prompt is always left to be run: its logits are what comes of it. Without `others` nothing is
        reused.
        """
        source, count = -1, 0
        if others is not None:
            held = {**self._kept, **others}
            counts = {slot: self._common(prompt, tokens) for slot, tokens in held.items()}
            # Of equal ones the free one that has least beside it: that it may be given away, and nothing be copied.
            best = max(held, key=lambda slot: (counts[slot], slot in self._kept, -len(held[slot])))
            if counts[best]:
                source, count = best, counts[best]
        if source in self._kept and len(self._kept[source]) - count < 2 * self._piece:
            slot = source
        else:
            left = [slot for slot in self._kept if slot != source] or [source]
            slot = min(left, key=lambda slot: len(self._kept[slot]) > 0)
        del self._kept[slot]
        return Place(slot, source if count else slot, count)

    def _common(self, prompt: list[int], tokens: list[int]) -> int:
        """Return how many tokens both begin with, in whole pieces; one of the prompt's is left."""
        same, most = 0, min(len(prompt) - 1, len(tokens)) // self._piece
        while same < most:  # halving what is left, so that it is all compared about once, and not in Python
            middle = (same + most + 1) // 2
            start, end = same * self._piece, middle * self._piece
            if prompt[start:end] == tokens[start:end]:
                same = middle
            else:
                most = middle - 1
        return same * self._piece
