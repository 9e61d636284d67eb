"""The decoder is transformers' own models of each family that it serves, and refuses what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.decoder import DecodeOne, Decoder, DecoderConfig, Prefill
from deployments.decoder_weights import load_weights
from deployments.generate import TextGenerator
from tests.support.checkpoints import SHAPES, make_checkpoint

LENGTH, SLOTS = 96, 3


def load(folder: Path) -> Decoder:
    return TextGenerator(str(folder), length=LENGTH, prefill=[16]).load(torch.device("cpu"), SLOTS)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(tmp_path: Path, shape: str) -> None:
    model = make_checkpoint(tmp_path, shape)
    decoder = load(tmp_path)
    prefill, decode = Prefill(decoder).eval(), DecodeOne(decoder).eval()
    torch.manual_seed(1)
    prompts = torch.randint(300, (2, 32))
    with torch.no_grad():
        for slot, prompt in zip((2, 0), prompts, strict=True):
            expected = model(prompt.unsqueeze(0)).logits[0]
            for start in (0, 16):  # in two pieces, the second over the cache of the first
                positions = torch.arange(start, start + 16).unsqueeze(0)
                mask = torch.arange(LENGTH) <= positions.unsqueeze(-1)
                piece = prompt[start : start + 16].unsqueeze(0)
                logits = prefill(piece, positions, torch.tensor([slot]), torch.tensor([15]), mask)
                torch.testing.assert_close(logits[0], expected[start + 15], atol=1e-4, rtol=0)
        more = torch.randint(300, (2, 8))
        expected = model(torch.cat((prompts, more), 1)).logits[:, 32:]
        for step in range(8):
            positions = torch.full((2,), 32 + step)
            logits = decode(
                more[:, step], positions, torch.tensor([2, 0]), torch.arange(LENGTH) <= positions.unsqueeze(-1)
            )
            torch.testing.assert_close(logits, expected[:, step], atol=1e-4, rtol=0)


def test_half_precision_is_near_transformers_own(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path).to(torch.bfloat16)
    decoder = TextGenerator(str(tmp_path), length=LENGTH, dtype="bfloat16").load(torch.device("cpu"), SLOTS)
    tokens = torch.arange(16).unsqueeze(0)
    positions = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        mask = torch.arange(LENGTH) <= positions.unsqueeze(-1)
        logits = Prefill(decoder)(tokens, positions, torch.tensor([1]), torch.tensor([15]), mask)
        expected = model(tokens).logits[0, -1]
    assert logits.dtype == torch.bfloat16
    assert float((logits[0] - expected).abs().max() / expected.abs().max()) < 0.05


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama, mistral, qwen2"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not served"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type 'yarn' is not served"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "needs low_freq_factor"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is not served"),
    ({"num_key_value_heads": 3}, "4 heads are no multiple of 3 key-value heads"),
    ({"hidden_size": 0}, "hidden_size is 0; a whole number from 1 is needed"),
]


CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "mistral", "sliding_window": None}, 8192),
        ({"model_type": "mistral"}, 4096),  # transformers' own default
        ({"model_type": "qwen2", "sliding_window": 64}, 8192),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, 64),
        ({"model_type": "qwen2", "use_sliding_window": True}, 4096),
        ({"sliding_window": 64}, 8192),  # Llama has none
    ],
)
def test_requests_may_be_as_long_as_a_window_that_slides(changes: dict[str, Any], positions: int) -> None:
    assert DecoderConfig.read({**CONFIG, "num_key_value_heads": 2, **changes}).positions == positions


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_a_checkpoint_that_cannot_be_served_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    DecoderConfig.read(CONFIG)
    with pytest.raises(ValueError, match=reason):
        DecoderConfig.read({**CONFIG, **changes})


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    path = next(p for p in sorted(tmp_path.glob("*.safetensors")) if "model.norm.weight" in load_file(p))
    tensors = load_file(path)
    tensors["model.surprise.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, path)
    decoder = Decoder(DecoderConfig.read(json.loads((tmp_path / "config.json").read_text())))
    with pytest.raises(ValueError, match=r"unknown: model\.surprise\.weight; missing: norm\.weight"):
        load_weights(decoder, tmp_path)


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    expected = load(tmp_path).state_dict()
    save_file({"layers.0.attention.wk.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    torch.testing.assert_close(load(tmp_path).state_dict(), expected)


def test_a_tensor_that_comes_twice_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    load(tmp_path)
    save_file({"model.layers.0.self_attn.k_proj.weight": torch.zeros(32, 64)}, tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match=r"k_proj\.weight is in it twice, with other values"):
        load(tmp_path)


def test_a_tied_head_may_be_stored_under_either_name_and_must_be_the_same(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    expected = load(tmp_path).state_dict()
    (tmp_path / "model.safetensors.index.json").unlink()
    path = next(p for p in tmp_path.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(p))
    tensors = load_file(path)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": embedding}, path)
    torch.testing.assert_close(load(tmp_path).state_dict(), expected)
    save_file({**tensors, "lm_head.weight": embedding, "model.embed_tokens.weight": embedding + 1}, path)
    with pytest.raises(ValueError, match="is in it twice, with other values"):
        load(tmp_path)


def test_texts_are_split_as_tokenizer_json_says(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    make_checkpoint(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, file["pre_tokenizer"]],
    }
    file["model"]["vocab"]["12"] = 299
    file["model"]["merges"].append(["1", "2"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    generator = TextGenerator(str(tmp_path), length=LENGTH)
    generator.load(torch.device("cpu"), 1)
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a 12 b").ids
    assert 299 not in expected
    assert generator.encode("a 12 b") == expected


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_folder_without_a_file_is_refused(tmp_path: Path, missing: str) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"has no {missing}"):
        TextGenerator(str(tmp_path))


@pytest.mark.parametrize(
    ("model_args", "reason"),
    [
        ({"length": 1000}, "length: 1000 is not between 2 and 512"),
        ({"dtype": "int4"}, "dtype: 'int4' is not one of float32, bfloat16, float16"),
        ({"prefill": []}, "prefill: "),
    ],
)
def test_arguments_are_checked(tmp_path: Path, model_args: dict[str, Any], reason: str) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=reason):
        TextGenerator(str(tmp_path), **model_args)
