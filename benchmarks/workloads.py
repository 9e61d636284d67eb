"""Requests to measure servers with, and what eager answers to them."""

from __future__ import annotations

import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.baselines import Eager

_SENTENCE = "the cat sat on a mat and looked at two large dogs that did not care about it in any way at all"


@dataclass
class Workload:
    """Requests, and what eager answers to them."""

    name: str
    payloads: list[bytes]
    answers: list[Any]

    @classmethod
    def make(cls, name: str) -> Workload:
        """Make the requests, and ask eager."""
        payloads = make_payloads(name)
        eager = Eager(name, torch.get_num_threads())
        return cls(name, payloads, [eager([payload])[0] for payload in payloads])

    def check(self, index: int, body: bytes) -> bool:
        """Say whether a reply is eager's, up to 1e-3."""
        want, found = self.answers[index], json.loads(body)
        if isinstance(want, dict):
            same: bool = next(iter(want)) == next(iter(found)) and set(want) == set(found)
            return same and all(abs(want[key] - found[key]) < 1e-3 for key in want)
        return len(want) == len(found) and all(abs(a - b) < 1e-3 for a, b in zip(want, found, strict=True))


def make_payloads(name: str) -> list[bytes]:
    """Return the requests of a workload."""
    return make_photos() if name == "photos" else make_texts()


def make_photos() -> list[bytes]:
    """Return the sample photo in sixteen other views, as JPEG of about its size."""
    cat = Image.open(Path(__file__).parents[1] / "examples" / "cat.jpg").convert("RGB")
    payloads = []
    for turn in range(16):
        buffer = io.BytesIO()
        cat.rotate(3 * turn - 24).save(buffer, "JPEG", quality=90)
        payloads.append(buffer.getvalue())
    return payloads


def make_texts() -> list[bytes]:
    """Return 128 texts of 5 to 200 tokens, 53 on average: twice as long is half as likely."""
    dice = random.Random(5)
    words = _SENTENCE.split()
    lengths = [round(5 * 40 ** dice.random()) - 2 for _ in range(128)]  # without the two tokens around a text
    return [" ".join(dice.choices(words, k=length)).encode() for length in lengths]
