"""`TextGenerator`: prompts in, text out, by a checkpoint of Llama's family."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deployments.args import ModelArgs
from deployments.checkpoint import read_file
from deployments.decoder import Decoder, DecoderConfig
from deployments.decoder_weights import load_weights
from deployments.errors import BadRequest, ModelFailed
from deployments.int8 import TEXT, perplexity, quantize, restore
from deployments.messages import is_whole
from deployments.servable import Model
from optim.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
logger = logging.getLogger(__name__)
#: By how much of itself perplexity may change by quantising.
_MOST_CHANGE = 0.01
#: Tokens of the longest requests by default: more cost memory, and a bucket.
_LONGEST = 4096
#: Places of the cache that the least bucket looks at; each further one has four times as many.
_LEAST_SPAN = 256
#: The tokens that end an answer where a checkpoint names none, as transformers' configurations of these models have it.
_ENDS = {"llama": 2, "mistral": 2}


class TextGenerator(Model):
    """Serves a Hugging Face checkpoint folder (config.json, safetensors, tokenizer.json) of a decoder-only transformer.

    Llama (with Llama 3's scaling of rotary frequencies), Mistral, Qwen2, Qwen2.5, SmolLM; where windows slide, requests
    may be as long as that. A request may have `length` tokens, prompt and answer together; by default what the
    checkpoint was made for, 4096 at most. `prefill` are the sizes of the pieces in which prompts are run, the least of
    them while others generate. `dtype` is by default float32 on a CPU and bfloat16 on a GPU. With `quantize: int8`
    weights have eight bits and the rest is bfloat16, where the perplexity of a fixed text stays within 1 % of what it
    is in float32; else it is served as without, which log and report say. With `reuse`, what prompts begin with alike
    is run once, while a slot has it; by the usage of an answer callers can find out what others asked.
    """

    def __init__(
        self,
        checkpoint: str,
        length: int | None = None,
        prefill: Sequence[int] = (32, 256),
        dtype: str | None = None,
        quantize: str | None = None,
        reuse: bool = True,
    ) -> None:
        self.folder = Path(checkpoint)
        if not self.folder.is_dir():
            raise ValueError(f"checkpoint: {checkpoint!r} is not a folder on this machine")
        for name in ("config.json", "tokenizer.json"):
            if not (self.folder / name).is_file():
                raise ValueError(f"checkpoint: {self.folder} has no {name}")
        if not list(self.folder.glob("*.safetensors")):
            raise ValueError(f"checkpoint: {self.folder} has no safetensors file; other weight files can hold code")
        config = read_file(self.folder, "config.json")
        try:
            self.config = DecoderConfig.read(config)
        except ValueError as error:
            raise ValueError(f"checkpoint: {self.folder}: {error}") from None
        longest = self.config.positions
        if length is not None and not (is_whole(length) and 2 <= length <= longest):
            raise ValueError(f"length: {length} is not between 2 and {longest}, the checkpoint's own limit")
        if not prefill or not all(is_whole(size) and size > 0 for size in prefill):
            raise ValueError(f"prefill: {prefill!r} is not a list of whole numbers from 1")
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(_DTYPES)}")
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize: {quantize!r} is not int8")
        if not isinstance(reuse, bool):
            raise ValueError(f"reuse: {reuse!r} is not true or false")
        if quantize is not None and dtype not in (None, "bfloat16"):
            raise ValueError(f"dtype: {dtype!r} does not go with quantize; leave it out, it is bfloat16 then")
        self.length = length or min(longest, _LONGEST)
        #: The sizes of prompts' pieces; more than a request may have is of no use.
        self.pieces = sorted({min(size, self.length) for size in prefill})
        self.default_lengths = _spans(self.length)
        ends = read_file(self.folder, "generation_config.json", needed=False).get("eos_token_id")
        ends = config.get("eos_token_id", _ENDS.get(str(config.get("model_type")))) if ends is None else ends
        #: The tokens that end an answer.
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        #: Whether a request takes over what another one has left of the beginning of its prompt.
        self.reuse = reuse
        self._dtype = dtype
        self._quantize = quantize
        #: What is worth knowing about how it was loaded.
        self.notes: list[str] = []
        self._template: Any = None
        self._most_characters = 0
        self._special: dict[str, int] = {}

    def check_args(self, args: ModelArgs) -> None:
        """Raise ConfigError for what a model that generates cannot do."""
        batching = args.batching
        if max(batching.lengths or [0]) != self.length:
            raise ConfigError("args.batching.lengths", batching.lengths, f"end with model_args.length, {self.length}")
        if batching.streams not in (None, 1):
            raise ConfigError("args.batching.streams", batching.streams, "leave it out: steps follow each other")
        if batching.wait_ms:
            raise ConfigError("args.batching.wait_ms", batching.wait_ms, "leave it out: requests join between steps")
        if args.pt2.compile.when != "start":
            raise ConfigError("args.pt2.compile.when", args.pt2.compile.when, "use start for a model that generates")

    def load(self, device: torch.device, slots: int) -> Decoder:
        """Load weights and tokenizer; nothing is downloaded."""
        from transformers import PreTrainedTokenizerFast

        # Not AutoTokenizer: for some classes (GPT2Tokenizer, which SmolLM names) transformers 5 takes only the
        # vocabulary from tokenizer.json, and splits texts in its own way.
        self._template = PreTrainedTokenizerFast.from_pretrained(str(self.folder), local_files_only=True)
        # As it was saved it may cut texts off, or fill them up.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._most_characters = self.length * max(map(len, self.tokenizer.get_vocab()), default=1)
        added = self.tokenizer.get_added_tokens_decoder()
        self._special = {token.content: index for index, token in added.items() if token.special}
        dtype = _DTYPES[self._dtype or ("bfloat16" if device.type == "cuda" else "float32")]
        with torch.device("meta"):
            decoder = Decoder(self.config).to(torch.float32 if self._quantize else dtype)
        decoder = decoder.to_empty(device=device)
        decoder.tie()
        load_weights(decoder, self.folder)
        decoder.eval()
        if self._quantize:
            self._make_int8(decoder, dtype)
        # A piece of a prompt may end behind the last place; what pads it is written there.
        decoder.make_cache(slots, self.length + max(self.pieces))
        return decoder

    def _make_int8(self, decoder: Decoder, dtype: torch.dtype) -> None:
        """Quantise a decoder that is in float32, and leave it so where that is good enough; else give it `dtype`."""
        tokens = [t for t in self.tokenizer.encode(TEXT).ids if t < self.config.vocabulary][: self.config.positions]
        decoder.make_cache(1, len(tokens))
        before = perplexity(decoder, tokens)
        linear = quantize(decoder)
        decoder.to(torch.bfloat16)
        decoder.make_cache(1, len(tokens))
        after = perplexity(decoder, tokens)
        found = f"int8: perplexity {after:.4g} on {len(tokens)} tokens, {before:.4g} in float32"
        if abs(after - before) <= _MOST_CHANGE * before:
            logger.info(found)
        else:
            found = f"{found}, which is too much: served in {dtype} instead"
            logger.warning(found)
            restore(decoder, linear)
            load_weights(decoder.to(dtype), self.folder)  # what had become bfloat16 has lost digits
        self.notes.append(found)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, callable from any thread; there once `load` has run."""
        found: Tokenizer = self._template.backend_tokenizer
        return found

    def special(self, texts: Sequence[str]) -> frozenset[int]:
        """Return those of the tokenizer's special tokens that have one of these texts."""
        return frozenset(self._special[text] for text in texts if text in self._special)

    def encode(self, prompt: str | Sequence[int], field: str = "prompt") -> list[int]:
        """Return a prompt's tokens, with what the tokenizer puts around a text; BadRequest where they do not fit."""
        return self._check(field, self._tokenize(field, prompt) if isinstance(prompt, str) else list(prompt))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens of a chat by the tokenizer's own template; BadRequest where it has none, or refuses."""
        from jinja2 import TemplateSyntaxError

        if not self._template.chat_template:
            raise BadRequest("messages: this model's tokenizer has no chat template; ask /v1/completions")
        try:
            text = self._template.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateSyntaxError as error:
            raise ModelFailed(f"the checkpoint's chat template is broken: {error}") from error
        except Exception as error:  # of Jinja, by which templates refuse, and of whatever they do with these messages
            raise BadRequest(f"messages: {error}") from error
        return self._check("messages", self._tokenize("messages", text, add_special_tokens=False))

    def _tokenize(self, field: str, text: str, **how: bool) -> list[int]:
        if len(text) > self._most_characters:  # it cannot fit, whatever its tokens are, and reading it takes long
            raise BadRequest(f"{field}: {len(text)} characters; fewer than {self.length} tokens are allowed")
        try:
            text.encode()  # the tokenizer says only that it is no text
        except UnicodeEncodeError as error:
            raise BadRequest(f"{field}: half of a surrogate pair: {error}") from error
        found: list[int] = self.tokenizer.encode(text, **how).ids
        return found

    def _check(self, field: str, tokens: list[int]) -> list[int]:
        vocabulary = self.config.vocabulary
        if not tokens:
            raise BadRequest(f"{field}: there are no tokens; at least one is needed")
        if len(tokens) >= self.length:
            raise BadRequest(f"{field}: {len(tokens)} tokens; fewer than {self.length} are allowed")
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise BadRequest(f"{field}: token {token} is not in the vocabulary (0 to {vocabulary - 1})")
        return tokens


def _spans(length: int) -> list[int]:
    """Return the default places of the cache that a step looks at."""
    found = [length]
    while found[-1] > _LEAST_SPAN:
        found.append(max(-(-found[-1] // 4), _LEAST_SPAN))
    return sorted(found)
