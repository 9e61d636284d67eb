"""Weights of a Hugging Face checkpoint folder (safetensors, sharded or not) as a `Decoder` has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from deployments.decoder import Decoder

#: Of a layer's tensors in a checkpoint, those that are one here, in this order.
_JOINED = {
    "self_attn.q_proj": "attention.qkv",
    "self_attn.k_proj": "attention.qkv",
    "self_attn.v_proj": "attention.qkv",
    "mlp.gate_proj": "gate_up",
    "mlp.up_proj": "gate_up",
}
_RENAMED = {
    "self_attn.o_proj": "attention.out",
    "mlp.down_proj": "down",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
}
_OUTSIDE = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}


def load_weights(decoder: Decoder, folder: Path) -> None:
    """Fill a decoder from a folder's files, in the decoder's dtype; ValueError where tensors are missing or unknown.

    The parts of a joined tensor are copied into their places one by one, so that no second copy of it is held.
    """
    state = decoder.state_dict(keep_vars=True)
    is_tied = decoder.config.tied  # then two names of a checkpoint are one tensor, and it may have either, or both
    if is_tied:
        del state["head.weight"]
    filled: dict[str, int] = dict.fromkeys(state, 0)
    seen: set[tuple[str, int]] = set()
    unknown = []
    with torch.no_grad():
        for name, tensor in _read_tensors(folder):
            place = _place(name, decoder)
            if place is None:
                unknown.append(name)
                continue
            ours, start = place
            if is_tied and ours == "head.weight":
                ours = "embedding.weight"
            target = state.get(ours)
            if target is None or target[start : start + len(tensor)].shape != tensor.shape:
                unknown.append(f"{name} {list(tensor.shape)}")
                continue
            part = target[start : start + len(tensor)]
            if (ours, start) not in seen:
                part.copy_(tensor)
                seen.add((ours, start))
                filled[ours] += len(tensor)
            elif not torch.equal(part, tensor.to(part)):
                raise ValueError(f"checkpoint: {folder}: {name} is in it twice, with other values")
    missing = [name for name, rows in filled.items() if rows < len(state[name])]
    wrong = {"unknown": unknown, "missing": missing}
    if any(wrong.values()):
        parts = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in wrong.items() if names)
        raise ValueError(f"checkpoint: {folder}: its tensors do not fit its config.json ({parts})")


def _read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for path in _find_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if not name.endswith("rotary_emb.inv_freq"):  # older files have it; it follows from config.json
                    yield name, file.get_tensor(name)


def _find_files(folder: Path) -> list[Path]:
    """Return the files that belong together: those of the index, else the one of the usual name, else all."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _place(name: str, decoder: Decoder) -> tuple[str, int] | None:
    """Return the name here of a checkpoint's tensor, and the row where it begins; None for one that is unknown."""
    module, _, kind = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{kind}", 0
    parts = module.split(".", 3)
    if len(parts) != 4 or parts[:2] != ["model", "layers"]:
        return None
    layer, part = f"layers.{parts[2]}", parts[3]
    if part in _RENAMED:
        return f"{layer}.{_RENAMED[part]}.{kind}", 0
    if part in _JOINED:
        config = decoder.config
        size = config.head_dim
        starts = {"q": 0, "k": config.heads * size, "v": (config.heads + config.kv_heads) * size}
        starts |= {"gate": 0, "up": config.hidden}
        return f"{layer}.{_JOINED[part]}.{kind}", starts[part.rpartition(".")[2].removesuffix("_proj")]
    return None
