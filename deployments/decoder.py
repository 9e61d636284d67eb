"""`Decoder`: a transformer of Llama's family, small and for inference alone, over a static cache of keys and values.

After gpt-fast (https://github.com/pytorch-labs/gpt-fast): the cache is allocated once, so that every step has the same
shapes and addresses, which CUDA graphs and compiled code need. Each slot of it belongs to one request at a time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

#: On a GPU this many places are summed up by themselves, and then the sums: all places of one output in one loop kept
#: 32 of an H100's 132 processors busy (8.8 us a layer of Llama 3.2 1B at 512 places, 6.6 so).
_PART = 32
#: What the checkpoints of a family have beyond Llama's: biases of the projections to queries, keys and values.
_FAMILIES = {"llama": False, "mistral": False, "qwen2": True}


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's scaling of rotary frequencies (config.json: `rope_scaling` with `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Return the frequencies as Llama 3.1 uses them: long waves are stretched, short ones are not. [D / 2]."""
        waves = 2 * math.pi / frequencies
        context = self.original_max_position_embeddings
        smooth = (context / waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - smooth) * frequencies / self.factor + smooth * frequencies
        scaled = torch.where(waves > context / self.low_freq_factor, frequencies / self.factor, between)
        return torch.where(waves < context / self.high_freq_factor, frequencies, scaled)


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder, by the names of its parts."""

    vocabulary: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    eps: float
    positions: int
    rope_theta: float
    rope_scaling: Llama3Scaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Return what a checkpoint's config.json says; ValueError names what of it cannot be served, and why."""
        family = config.get("model_type")
        if family not in _FAMILIES:
            raise ValueError(f"config.json: model_type {family!r} is not one of {', '.join(_FAMILIES)}")
        # Where the key is missing, transformers has a window of 4096 for both families.
        slides = family == "mistral" or (family == "qwen2" and config.get("use_sliding_window", False))
        window = config.get("sliding_window", 4096) if slides else None
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: hidden_act {config['hidden_act']!r} is not served; 'silu' is")
        dim, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        theta, scaling = _read_rope(config)
        is_llama = family == "llama"
        few = {"mistral": 8, "qwen2": 32}.get(family, heads)  # transformers' own where the key is missing
        attention_bias = is_llama and bool(config.get("attention_bias", False))
        found = cls(
            vocabulary=_size(config, "vocab_size"),
            dim=dim,
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", heads if "num_key_value_heads" in config else few),
            head_dim=_size(config, "head_dim", dim // heads),
            hidden=_size(config, "intermediate_size"),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            # Within a window's length it changes nothing, and longer requests are not served.
            positions=min(_size(config, "max_position_embeddings"), window or sys.maxsize),
            rope_theta=theta,
            rope_scaling=scaling,
            qkv_bias=_FAMILIES[family] or attention_bias,
            out_bias=attention_bias,
            mlp_bias=is_llama and bool(config.get("mlp_bias", False)),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
        if found.heads % found.kv_heads:
            raise ValueError(f"config.json: {found.heads} heads are no multiple of {found.kv_heads} key-value heads")
        return found


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}; a whole number from 1 is needed")
    return value


def _read_rope(config: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Return base and scaling of the rotary embedding; newer transformers write both below `rope_parameters`."""
    rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ValueError("config.json: partial_rotary_factor is not served; whole heads are rotated")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"config.json: rope_type {kind!r} is not served; 'default' and 'llama3' are")
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in rope]
    if missing:
        raise ValueError(f"config.json: rope_type 'llama3' needs {', '.join(missing)}")
    return theta, Llama3Scaling(*(rope[name] for name in names))


class Decoder(nn.Module):
    """Tokens to what the last layer makes of them; the cache (`make_cache`) is filled on the way.

    Shapes: B rows, T tokens a row, K places of the cache that are looked at. `slots` of the B rows differ; a row's
    tokens are written to `positions` of its slot, and each sees the places that the mask says. Calling it again with
    the same changes nothing: the same is written to the same place.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        #: How many requests the cache holds.
        self.slots = 0
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.eps)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        self.tie()

    def tie(self) -> None:
        """Let head and embedding be one tensor where the checkpoint's are; needed again after `to_empty`."""
        if self.config.tied:
            self.head.weight = self.embedding.weight

    def fuse_attention(self, fuse: bool) -> None:
        """Say who makes attention in compiled decoding: Inductor (the policy `math`), or a kernel of PyTorch's."""
        for layer in self.layers:
            layer.attention.fuse = fuse  # type: ignore[union-attr]

    def make_cache(self, slots: int, length: int) -> None:
        """Allocate the cache: `slots` requests of `length` tokens, in the weights' dtype and on their device."""
        config, weight, self.slots = self.config, self.embedding.weight, slots
        for layer in self.layers:
            shape = (slots, config.kv_heads, length, config.head_dim)
            for name in ("keys", "values"):
                layer.attention.register_buffer(  # type: ignore[union-attr]
                    name, torch.zeros(shape, dtype=weight.dtype, device=weight.device), persistent=False
                )
        cos, sin = _make_rotation(config, length)
        self.register_buffer("cos", cos.to(weight), persistent=False)
        self.register_buffer("sin", sin.to(weight), persistent=False)

    def clear(self, slot: int, start: int = 0) -> None:
        """Empty a slot from a place on: what is no number makes none of all that is multiplied with it, by 0 too."""
        for cache in self._caches():
            cache[slot, :, start:].zero_()

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first places of a slot to another."""
        for cache in self._caches():
            cache[target, :, :count].copy_(cache[source, :, :count])

    def _caches(self) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            yield layer.attention.keys  # type: ignore[union-attr, misc]
            yield layer.attention.values  # type: ignore[misc]

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the normed state of every token. tokens, positions [B, T], slots [B], mask [B, T, K] -> [B, T, D]."""
        hidden = self.embedding(tokens)
        rotation = (self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2))  # type: ignore[index]
        for layer in self.layers:
            hidden = layer(hidden, rotation, positions, slots, mask)
        normed: torch.Tensor = _write(self.norm(hidden))
        return normed


class Prefill(nn.Module):
    """One piece of a prompt through a decoder: T tokens of one row, what came before them in the cache."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        last: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Return the logits behind one token of each row. [B, T], [B, T], [B], [B], [B, T, K] -> [B, V]."""
        hidden = self.decoder(tokens, positions, slots, mask)
        rows = torch.arange(len(last), device=last.device)
        logits: torch.Tensor = self.decoder.head(hidden[rows, last])
        return logits


class DecodeOne(nn.Module):
    """One token of each of several rows through a decoder."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits behind the token. [B], [B], [B], [B, K] -> [B, V]."""
        hidden = self.decoder(tokens.unsqueeze(1), positions.unsqueeze(1), slots, mask.unsqueeze(1))
        logits: torch.Tensor = self.decoder.head(hidden[:, 0])
        return logits


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.eps)
        self.attention = _Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.eps)
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden, bias=config.mlp_bias)
        self.down = nn.Linear(config.hidden, config.dim, bias=config.mlp_bias)

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        slots: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        hidden = hidden + self.attention(_write(self.attention_norm(hidden)), rotation, positions, slots, mask)
        gate, up = self.gate_up(_write(self.mlp_norm(hidden))).chunk(2, -1)
        result: torch.Tensor = hidden + self.down(_write(F.silu(gate) * up))
        return result


class _Attention(nn.Module):
    keys: torch.Tensor  # [S, H, L, D]: slots, key-value heads, places, a head's size
    values: torch.Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        #: Whether compiled decoding has its attention written by Inductor, instead of by a kernel.
        self.fuse = True
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.dim, rows, bias=config.qkv_bias)
        self.out = nn.Linear(config.heads * config.head_dim, config.dim, bias=config.out_bias)

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        slots: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        rows, tokens, _ = hidden.shape
        heads = self.qkv(hidden).view(rows, tokens, -1, self.head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), 2)
        q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        where = (slots[:, None], slice(None), positions)  # advanced indices apart: [B, T] comes first
        self.keys[where] = k
        self.values[where] = v
        span = mask.shape[-1]
        found = _attend(
            q.transpose(1, 2), self.keys[slots, :, :span], self.values[slots, :, :span], mask, fuse=self.fuse
        )
        result: torch.Tensor = self.out(found.transpose(1, 2).reshape(rows, tokens, -1))
        return result


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, fuse: bool
) -> torch.Tensor:
    """Return what each token sees. q [B, G * H, T, D], keys, values [B, H, K, D], mask [B, T, K] -> as q."""
    rows, heads, tokens, size = q.shape
    groups = heads // keys.shape[1]
    if tokens == 1 and fuse and torch.compiler.is_compiling():
        # Products and sums that Inductor writes as two loops, which read keys and values where they lie in the cache;
        # matrix products would first copy them out of it, once for each query head.
        grouped = q.view(rows, -1, groups, 1, size)
        scores = (grouped * keys.unsqueeze(2)).sum(-1, dtype=torch.float32) / math.sqrt(size)  # [B, H, G, K]
        weights = _write(scores.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1).to(values.dtype))
        products = weights.unsqueeze(-1) * values.unsqueeze(2)  # [B, H, G, K, D]
        if values.is_cuda and values.shape[-2] % _PART == 0:
            found = products.unflatten(-2, (-1, _PART)).sum(-2, dtype=torch.float32).sum(-2).to(values.dtype)
        else:
            found = products.sum(-2)
        result: torch.Tensor = found.view(rows, heads, 1, size)
        return result
    # The query heads of a key-value head as one head of so many more tokens: kernels need no copy of it for each
    # then. With `enable_gqa` a CPU takes the math of every score, for which torch 2.8's Inductor writes C++ that does
    # not compile (a transposed load through `slots`).
    grouped = q.reshape(rows, -1, groups * tokens, size)
    seen = mask.unsqueeze(1).repeat(1, 1, groups, 1)  # [B, 1, G * T, K]
    return F.scaled_dot_product_attention(grouped, keys, values, seen).reshape(rows, heads, tokens, size)


def _write(x: torch.Tensor) -> torch.Tensor:
    """Have code compiled for a GPU compute a tensor once, in a kernel of its own; it is returned as it is.

    Where the product of one row is made of products and sums, each block of threads would compute all of the row again
    (`down` of Llama 3.2 1B, with the SiLU in it, took an H100 14 to 22 us, without 12.6).
    """
    if x.is_cuda and torch.compiler.is_compiling():
        # Inductor needs the operand of as_strided in memory (torch/_inductor/lowering.py), else it changes nothing.
        return torch.as_strided(x, x.shape, x.stride())
    return x


def _make_rotation(config: DecoderConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of every position's angles (RoFormer, arXiv 2104.09864). [L, D] each, float32."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**steps
    if config.rope_scaling is not None:
        frequencies = config.rope_scaling.scale(frequencies)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the halves of each head by its position's angles, as Hugging Face's checkpoints have them. [B, T, H, D]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
