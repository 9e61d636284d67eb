"""Weights of eight bits: near float's, and held against it before they are served."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deployments.args import ModelArgs
from deployments.compile import compile_generator, slots_of
from deployments.decoder import DecodeOne
from deployments.decoder_functions import _rehearse
from deployments.generate import TextGenerator
from deployments.generation import Generation
from deployments.int8 import Int8Linear, perplexity
from deployments.sampling import Sampler, Sampling
from tests.support.checkpoints import make_checkpoint


def change(folder: Path, how: Any) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({name: how(name, tensor) for name, tensor in load_file(path).items()}, path)


def calm(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 1 else (tensor * 0.5).contiguous()


def load(folder: Path) -> tuple[TextGenerator, Any]:
    generator = TextGenerator(str(folder), length=64, quantize="int8")
    return generator, generator.load(torch.device("cpu"), 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [8, 24, 96, 100])
def test_products_are_near_those_of_floats(columns: int, bias: bool) -> None:
    """Also where a row is no multiple of what torch's kernel reads at a time: it would read past the end."""
    torch.manual_seed(0)
    linear = nn.Linear(columns, 40, bias=bias)
    x = torch.randn(2, 3, columns)
    expected = linear(x).detach()
    layer = Int8Linear(linear).to(torch.bfloat16)
    for multiply in (layer, torch.compile(layer)):
        with torch.no_grad():
            found = multiply(x.to(torch.bfloat16))
        assert found.shape == expected.shape
        assert float((found - expected).abs().max() / expected.abs().max()) < 0.03


@pytest.mark.parametrize("columns", [8, 16])
def test_a_row_of_zeros_stays_one(columns: int) -> None:
    linear = nn.Linear(columns, 4, bias=False)
    nn.init.zeros_(linear.weight)
    assert Int8Linear(linear).to(torch.bfloat16)(torch.ones(1, columns, dtype=torch.bfloat16)).abs().sum() == 0


def test_perplexity_is_that_of_transformers(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path)
    decoder = TextGenerator(str(tmp_path), length=64).load(torch.device("cpu"), 1)
    tokens = torch.arange(2, 42)
    with torch.no_grad():
        expected = float(model(tokens.unsqueeze(0), labels=tokens.unsqueeze(0)).loss.exp())
    assert perplexity(decoder, tokens.tolist()) == pytest.approx(expected, rel=1e-4)


def test_a_decoder_that_keeps_its_perplexity_is_served_in_eight_bits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    change(tmp_path, calm)
    generator, decoder = load(tmp_path)
    assert all(isinstance(m, Int8Linear) for m in (decoder.head, decoder.layers[0].down, decoder.layers[1].gate_up))
    assert decoder.layers[0].down.weight.dtype == torch.int8
    assert decoder.layers[0].attention.keys.dtype == decoder.embedding.weight.dtype == torch.bfloat16
    found = re.fullmatch(r"int8: perplexity (\S+) on \d+ tokens, (\S+) in float32", generator.notes[0])
    assert found is not None
    assert float(found[1]) == pytest.approx(float(found[2]), rel=0.0101)


def test_one_that_loses_too_much_is_served_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path)

    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        # What multiplies a channel that is always 0 says nothing, and takes the digits of its whole row.
        if name.endswith("layernorm.weight"):
            tensor[0] = 0.0
        elif tensor.dim() == 2 and ("q_proj" in name or "k_proj" in name or "gate_proj" in name):
            tensor[:, 0] = 10_000.0
        return tensor

    change(tmp_path, spoil)
    generator, decoder = load(tmp_path)
    assert "which is too much: served in torch.float32 instead" in generator.notes[0]
    assert generator.notes[0] in caplog.text
    plain = TextGenerator(str(tmp_path), length=64).load(torch.device("cpu"), 1)
    assert decoder.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(decoder.state_dict()[name], tensor, rtol=0, atol=0)


def test_it_is_compiled_and_answers(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    change(tmp_path, calm)
    args = ModelArgs.parse(
        {
            "model": "deployments.generate:TextGenerator",
            "model_args": {"checkpoint": str(tmp_path), "length": 64, "prefill": [16], "quantize": "int8"},
            "pt2": {
                "compile": {"backend": "inductor", "only_if_faster": False},
                "fallback": "fail",
                "cache": {"enable": False},
            },
            "batching": {"batch_sizes": [2]},
        }
    )
    generator = args.make_model()
    assert isinstance(generator, TextGenerator)
    models = compile_generator(generator, args, "cpu", 2)
    assert generator.notes[0] in models["decode"].report.notes
    decode = models["decode"].module
    assert isinstance(decode, DecodeOne)
    _rehearse(decode.decoder, 40)  # as on a GPU
    slots = slots_of(models, generator, args)
    asked = Generation(generator.encode("hello"), Sampler(Sampling(temperature=0)), 20)
    slots.add(asked)
    while len(slots):
        slots.step()
    assert len(asked.tokens) == 20
    assert models["decode"].report.after_ready.failed_runs == 0


def test_it_goes_with_no_other_dtype(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="dtype: 'float32' does not go with quantize"):
        TextGenerator(str(tmp_path), dtype="float32", quantize="int8")
    with pytest.raises(ValueError, match="quantize: 'int4' is not int8"):
        TextGenerator(str(tmp_path), quantize="int4")
