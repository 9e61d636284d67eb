"""What a decoder is compiled for: `decode`, one token of each of several rows, and `prefill`, a piece of one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from deployments.decoder import DecodeOne, Decoder, Prefill
from deployments.generation import Run, Slots
from deployments.sampling import Scores, rehearse
from optim import CompiledModel
from optim.shapes import Example, Inputs

#: Places of a prompt whose logits are made at a time: 16 MB of them with 128,256 tokens, and as much to score them.
_SCORED = 32


@dataclass(frozen=True)
class Function:
    """One of them, as `compile_model` takes it."""

    module: nn.Module
    example: Example
    batch_sizes: Sequence[int]
    lengths: Sequence[int]
    phase: str

    @property
    def state(self) -> list[str]:
        """The names of the buffers that calls change: the cache."""
        return [name for name, _ in self.module.named_buffers() if name.endswith((".keys", ".values"))]


def make_functions(
    decoder: Decoder, batch_sizes: Sequence[int], spans: Sequence[int], pieces: Sequence[int]
) -> dict[str, Function]:
    """Return the functions by name: `decode` for rows x places of the cache, and `prefill` for each size of piece."""
    decode = DecodeOne(decoder).eval()
    found = {"decode": Function(decode, _decoding(decoder), batch_sizes, spans, "decode")}
    for size in pieces:
        wide = [span for span in spans if span >= size]
        found[f"prefill {size}"] = Function(Prefill(decoder).eval(), _prefilling(decoder, size), (1,), wide, "prefill")
    return found


def make_slots(
    runs: Mapping[str, Run],
    slots: int,
    spans: Sequence[int],
    pieces: Sequence[int],
    device: torch.device | str,
    *,
    reuse: bool = False,
) -> Slots:
    """Return slots that run the functions, compiled or not; the least piece is run while others generate.

    With `reuse` a request takes over what slots have of the beginning of its prompt.
    """
    prefills = {size: runs[f"prefill {size}"] for size in pieces}
    on_gpu = torch.device(device).type == "cuda"  # a CPU has nothing to do meanwhile
    decode = runs["decode"]
    module = decode.module if isinstance(decode, CompiledModel) else decode
    assert isinstance(module, DecodeOne)
    decoder = module.decoder
    if on_gpu:
        _rehearse(decoder, slots)
    return Slots(
        prefills,
        decode,
        spans,
        slots,
        min(pieces),
        device,
        runs_ahead=on_gpu,
        clear=torch.no_grad()(decoder.clear),
        copy=torch.no_grad()(decoder.copy) if reuse else None,
        score=partial(_score, decoder),
    )


@torch.no_grad()
def _rehearse(decoder: Decoder, slots: int) -> None:
    """Do for the first time what logits are for: picking from as many rows as there are slots, and scoring."""
    weight, vocabulary = decoder.embedding.weight, decoder.config.vocabulary
    rehearse(weight.new_zeros(slots, vocabulary))
    Scores([0] * _SCORED, weight.new_zeros(_SCORED, vocabulary), 20).read()


@torch.no_grad()
def _score(decoder: Decoder, inputs: Inputs, given: Sequence[int], most: int) -> Iterator[Scores]:
    """Yield how the tokens score that follow those of a piece of a prompt, some at a time: logits are many."""
    hidden = decoder(*inputs)[0, : len(given)]
    for i in range(0, len(given), _SCORED):
        yield Scores(given[i : i + _SCORED], decoder.head(hidden[i : i + _SCORED]), most)


def _decoding(decoder: Decoder) -> Example:
    def example(batch_size: int, length: int | None) -> Inputs:
        assert length is not None
        rows = torch.arange(batch_size)
        positions = (rows % decoder.slots + length // 2) % length
        mask = torch.arange(length) <= positions.unsqueeze(-1)
        return _draw(decoder, length, batch_size), positions, rows % decoder.slots, mask

    return example


def _prefilling(decoder: Decoder, size: int) -> Example:
    def example(batch_size: int, length: int | None) -> Inputs:
        assert length is not None
        rows = torch.arange(batch_size)
        positions = torch.arange(size).expand(batch_size, size) + max(length - size, 0)
        mask = torch.arange(length) <= positions.unsqueeze(-1)
        return _draw(decoder, length, batch_size, size), positions, rows % decoder.slots, rows % size, mask

    return example


def _draw(decoder: Decoder, seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(decoder.config.vocabulary, shape, generator=torch.Generator().manual_seed(seed))
