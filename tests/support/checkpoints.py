"""Checkpoint folders of small decoders with random weights, and a tokenizer of bytes with a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + m.role) }}{% endif %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
#: Of each family that is served, one with what only it has; heads, sizes and layers differ.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama-3": {
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "rope_theta": 500_000.0,
    },
    "mistral": {"head_dim": 24, "sliding_window": None},
    "qwen2": {"num_hidden_layers": 3, "num_key_value_heads": 1},
}


def make_model(shape: str, **config: Any) -> Any:
    """Return transformers' own model of a shape, its weights drawn so that the likeliest token is clear."""
    import transformers

    names = {"llama": "Llama", "llama-3": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    made = getattr(transformers, f"{names[shape]}Config")(**{**sizes, **SHAPES[shape], **config})
    torch.manual_seed(0)
    model = getattr(transformers, f"{names[shape]}ForCausalLM")(made).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.min() == 1 else 0.0, std=0.1)
    return model


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Return a tokenizer whose tokens are bytes and a few pieces of words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    words.train_from_iterator(["hello world and more text"] * 5, trainer)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made: Any = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")  # type: ignore[no-untyped-call]
    made.chat_template = template
    return made


def make_checkpoint(folder: Path, shape: str = "llama", *, template: str | None = TEMPLATE, **config: Any) -> Any:
    """Write a checkpoint folder, its weights in several files; return transformers' own model."""
    model = make_model(shape, **config)
    model.save_pretrained(folder, max_shard_size="100KB")
    make_tokenizer(template).save_pretrained(folder)
    return model


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return what transformers' own `generate` makes of a prompt, greedily, up to an end token."""
    tokens = torch.tensor([prompt])
    found = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, pad_token_id=1
    )
    return [int(token) for token in found[0, len(prompt) :] if token != 1]
