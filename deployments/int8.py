"""Weights of eight bits: a quarter of float32's memory, and what one step of decoding has to read.

After gpt-fast's weight-only quantisation (https://github.com/pytorch-labs/gpt-fast, quantize.py): each row of a weight
has one scale, its largest absolute value by 127; activations stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from deployments.decoder import Decoder

#: What perplexity is measured on: the beginning of Jane Austen's "Pride and Prejudice" (1813).
TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered the rightful property of "
    'some one or other of their daughters. "My dear Mr. Bennet," said his lady to him one day, "have you heard that '
    'Netherfield Park is let at last?" Mr. Bennet replied that he had not. "But it is," returned she; "for Mrs. Long '
    'has just been here, and she told me all about it." Mr. Bennet made no answer. "Do you not want to know who has '
    'taken it?" cried his wife impatiently. "You want to tell me, and I have no objection to hearing it." This was '
    "invitation enough."
)

#: torch's kernel for a CPU reads this many columns at a time, and past the end of a row of any other width: what it
#: finds there goes into the product, and the process may die of it (ATen/native/cpu/int8mm_kernel.cpp, BLOCK_K; seen
#: with torch 2.8 and 2.13). So rows are filled up with zeros; another product than the kernel's would not help, since
#: Inductor knows that pattern and calls the kernel for it.
_KERNEL_COLUMNS = 16


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with a scale for each row; its input is bfloat16 on a CPU."""

    weight: torch.Tensor  # [N, K'], K' being K filled up to a multiple of 16
    scale: torch.Tensor  # [N]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self._fill = -weight.shape[1] % _KERNEL_COLUMNS
        weight = (weight / scale.unsqueeze(1)).round().to(torch.int8)
        self.register_buffer("weight", F.pad(weight, (0, self._fill)))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the products of the last dimension, as nn.Linear does. [..., K] -> [..., N]."""
        if self._fill:
            x = F.pad(x, (0, self._fill))
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            # torch's own kernel; what F.linear makes of a weight that is converted first took 64 ms instead of 8 (88M
            # parameters, one row, AVX2, 2 threads).
            rows = x.reshape(-1, x.shape[-1])
            found = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
            found = found.view(*x.shape[:-1], -1)
        else:
            found = F.linear(x, self.weight.to(x.dtype)) * self.scale
        result: torch.Tensor = found if self.bias is None else found + self.bias
        return result


def quantize(decoder: Decoder) -> dict[str, nn.Linear]:
    """Replace a decoder's linear layers; return what they were, by name, for `restore`."""
    found = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in found.items():
        _set(decoder, name, Int8Linear(linear))
    return found


def restore(decoder: Decoder, linear: dict[str, nn.Linear]) -> None:
    """Undo `quantize`."""
    for name, module in linear.items():
        _set(decoder, name, module)


def _set(decoder: Decoder, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(decoder.get_submodule(parent), child, module)


def perplexity(decoder: Decoder, tokens: Sequence[int]) -> float:
    """Return the perplexity of a text: e to the mean negative log-likelihood of each token behind those before it."""
    head = decoder.head
    device = decoder.embedding.weight.device
    row = torch.tensor([tokens], device=device)
    positions = torch.arange(row.shape[1], device=device).unsqueeze(0)
    mask = positions.unsqueeze(1) <= positions.unsqueeze(-1)  # [1, T, T]
    with torch.no_grad():
        logits = head(decoder(row, positions, torch.zeros(1, dtype=torch.int64, device=device), mask))[0, :-1]
        loss = F.cross_entropy(logits.float(), row[0, 1:])
    return math.exp(float(loss))
