"""`TextCheckpoint`: the folder of a Hugging Face text model, looked at without loading it, and its tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deployments.errors import BadRequest
from deployments.tensor_info import check_range
from optim.shapes import Inputs

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

#: Families whose position ids begin behind the padding id (transformers, modeling_roberta.py), so fewer are left.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "roberta-prelayernorm", "xmod")
#: Steps of the default lengths: each costs a bucket, the wider ones padding (not with OpenVINO).
_LENGTHS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 768, 1024, 1536, 2048, 3072, 4096)
#: What transformers' tokenizers say where they know no limit is a number far above this.
_NO_LIMIT = 1_000_000


#: A tokenizer reads the whole text before it cuts: 6 MB took 7 s. What is beyond these is never looked at.
_MOST_CHARACTERS = 1_000_000
#: Tokens behind the cut that show that the ones before it are final.
_SPARE_TOKENS = 64


def read_file(folder: Path, name: str, *, needed: bool = True) -> dict[str, Any]:
    """Return a JSON file of a checkpoint's folder; an empty mapping where it may be missing and is."""
    path = folder / name
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if needed:
            raise ValueError(f"checkpoint: {folder} has no {name}") from None
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read: {error}") from None
    return found


class TextCheckpoint:
    """Reads a folder's configuration files; ValueError says what is missing or cannot be served.

    `encode` may be called from any thread once `load_tokenizer` has run.
    """

    def __init__(self, folder: str | Path, max_length: int | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"checkpoint: {str(folder)!r} is not a folder on this machine")
        self.config = self.read("config.json")
        if not (list(self.folder.glob("*.safetensors")) or list(self.folder.glob("*.safetensors.index.json"))):
            raise ValueError(f"checkpoint: {self.folder} has no safetensors file; other weight files can hold code")
        self.longest = self._find_longest()
        if max_length is not None and not 2 <= max_length <= self.longest:
            raise ValueError(
                f"max_length: {max_length} is not between 2 and {self.longest}, the checkpoint's own limit"
            )
        self.max_length = max_length or self.longest
        text_config = self.config.get("text_config")
        nested = text_config if isinstance(text_config, dict) else {}
        #: How many values each input has; None where that is not known.
        self._sizes: dict[str, int | None] = {
            "input_ids": int(self.config.get("vocab_size") or nested.get("vocab_size") or 0) or None,
            "attention_mask": 2,
            "token_type_ids": None,
        }
        self._tokenizer: Tokenizer | None = None
        self.input_names: tuple[str, ...] = ("input_ids", "attention_mask")

    @property
    def lengths(self) -> list[int]:
        """The default lengths of buckets: steps up to the longest text."""
        return [*(length for length in _LENGTHS if length < self.max_length), self.max_length]

    def read(self, name: str, *, needed: bool = True) -> dict[str, Any]:
        """Return a JSON file of the folder; an empty mapping where it may be missing and is."""
        return read_file(self.folder, name, needed=needed)

    def _find_longest(self) -> int:
        """Return the most tokens a text may have: the least of what the files say."""
        limits = [self.read("sentence_bert_config.json", needed=False).get("max_seq_length")]
        limits.append(self.read("tokenizer_config.json", needed=False).get("model_max_length"))
        positions = self.config.get("max_position_embeddings")
        if isinstance(positions, int):
            pad = self.config.get("pad_token_id") or 0
            limits.append(positions - (pad + 1 if self.config.get("model_type") in _OFFSET_POSITIONS else 0))
        known = [int(limit) for limit in limits if isinstance(limit, int | float) and 2 <= limit < _NO_LIMIT]
        return min(known, default=512)

    def load_tokenizer(self, *, with_types: bool) -> None:
        """Load the tokenizer; `with_types` adds the inputs that tell a text from its pair, where the model has them."""
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
        fast = getattr(loaded, "backend_tokenizer", None)
        if fast is None:
            raise ValueError(f"checkpoint: {self.folder} has no tokenizer of the fast kind (tokenizer.json)")
        # A copy of its own: transformers switches truncation and padding on the shared one from call to call.
        tokenizer = Tokenizer.from_str(fast.to_str())
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length)
        if with_types and "token_type_ids" in loaded.model_input_names:
            self.input_names = ("input_ids", "attention_mask", "token_type_ids")
        self._tokenizer = tokenizer

    def encode(self, text: str, pair: str | None = None) -> Inputs:
        """Return the tokens of a text, or of a pair, cut to `max_length`. -> [T] each, int64."""
        assert self._tokenizer is not None, "load_tokenizer() comes first"
        text = text[:_MOST_CHARACTERS]
        found = self._encode_start(text) if pair is None else self._tokenizer.encode(text, pair[:_MOST_CHARACTERS])
        columns: dict[str, Sequence[int]] = {
            "input_ids": found.ids,
            "attention_mask": found.attention_mask,
            "token_type_ids": found.type_ids,
        }
        if not found.ids:
            raise BadRequest("the text has no tokens")
        return tuple(torch.tensor(columns[name], dtype=torch.int64) for name in self.input_names)

    def _encode_start(self, text: str) -> Encoding:
        """Return the encoding of a text, without looking at much more of it than its first `max_length` tokens."""
        assert self._tokenizer is not None
        size = 32 * self.max_length
        while size < len(text):
            # Between words, so that none is seen in halves; without blanks, the spare tokens make up for the last ones.
            cut = max(text.rfind(blank, 0, size) for blank in " \n\t")
            found = self._tokenizer.encode(text[: cut if cut > 0 else size])
            if sum(len(rest) for rest in found.overflowing) >= _SPARE_TOKENS:
                return found
            size *= 8
        return self._tokenizer.encode(text)

    def take(self, tokens: Sequence[int]) -> Inputs:
        """Return token ids as inputs; BadRequest where they are too many, or beyond 64 bits. -> [T] each."""
        self._check_length(len(tokens))
        try:
            return self._without_padding(torch.tensor(tokens, dtype=torch.int64))
        except RuntimeError as error:  # whole numbers beyond 64 bits
            raise BadRequest(f"the tokens are not in the vocabulary: {error}") from error

    def take_sizes(self, network: nn.Module) -> None:
        """Look at a loaded network for how many tokens, and types of them, its tables have."""
        with contextlib.suppress(NotImplementedError):  # transformers' word for a network that has not one table
            table = network.get_input_embeddings()  # type: ignore[operator]
            self._sizes["input_ids"] = getattr(table, "num_embeddings", self._sizes["input_ids"])
        self._sizes["token_type_ids"] = getattr(network.config, "type_vocab_size", None)

    def check(self, inputs: Inputs) -> None:
        """Raise BadRequest for tokens that are too many, or that the network's tables do not have. [B, T] each."""
        self._check_length(inputs[0].shape[1])
        for name, tensor in zip(self.input_names, inputs, strict=True):
            size = self._sizes[name]
            if size:  # no types: the network ignores them
                check_range(name, tensor, 0, size)

    def _check_length(self, length: int) -> None:
        if not 1 <= length <= self.max_length:
            raise BadRequest(f"{length} tokens; 1 to {self.max_length} are allowed")

    def example(self, batch_size: int, length: int | None) -> Inputs:
        """Return full rows of tokens, their mask of ones and, where needed, types of zero. -> [B, T] each."""
        assert length is not None
        generator = torch.Generator().manual_seed(1000 * batch_size + length)
        vocabulary = self._sizes["input_ids"] or 1000
        # The first tokens of a vocabulary are special ones.
        ids = torch.randint(vocabulary // 20, vocabulary, (batch_size, length), generator=generator)
        return self._without_padding(ids)

    def _without_padding(self, ids: torch.Tensor) -> Inputs:
        columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        return tuple(columns[name] for name in self.input_names)


def read_text(payload: Any) -> tuple[str, str | None]:
    """Return a request's text and, where it has one, its pair.

    Text, UTF-8 bytes, or an object with `text` (TorchServe's clients also say `data` or `body`) and `text_pair`.
    """
    pair = None
    if isinstance(payload, dict):
        keys = [key for key in ("text", "data", "body") if key in payload]
        if len(keys) != 1 or set(payload) - {*keys, "text_pair"}:
            raise BadRequest(f"the object needs one key `text` and may have `text_pair`; it has {', '.join(payload)}")
        payload, pair = payload[keys[0]], payload.get("text_pair")
    if isinstance(payload, bytes | bytearray | memoryview):
        try:
            payload = bytes(payload).decode()
        except UnicodeDecodeError as error:
            raise BadRequest(f"the text is not UTF-8: {error}") from error
    if not isinstance(payload, str) or not isinstance(pair, str | None):
        kind = type(payload if not isinstance(payload, str) else pair).__name__
        raise BadRequest(f"one text is needed, as text or as an object with `text`, not {kind}")
    return payload, pair
