"""The models that engines are measured on: weights from packages, examples as requests would bring them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from deployments.text import SentenceEncoder
from deployments.vision import ImageClassifier


@dataclass(frozen=True)
class Subject:
    """A model to measure: how to load it, its examples, and its buckets."""

    title: str
    load: Callable[[], nn.Module]
    example: Callable[[int, int | None], Any]
    batch_sizes: tuple[int, ...]
    lengths: tuple[int, ...] | None = None


SUBJECTS = {
    "efficientnet-lite0": Subject(
        "EfficientNet-Lite0, 224 x 224", ImageClassifier().load, ImageClassifier().example, (1, 2, 4, 8)
    ),
    "minilm": Subject("MiniLM-L6 with pooling", SentenceEncoder().load, SentenceEncoder().example, (1, 8), (16, 64)),
}
