"""OpenAI's API for text: what requests to /v1/completions and /v1/chat/completions ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import BadRequest, Unsupported
from deployments.messages import is_whole, read_texts
from deployments.sampling import Sampling

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0, 2
LEAST_SEED, MOST_SEED = -(2**63), 2**63 - 1
MOST_STOPS = 16  # OpenAI takes 4; lm-evaluation-harness sends more
MOST_CHOICES = 128
MOST_PENALTY = 2
MOST_BIAS, MOST_BIASES = 100, 1024
#: The likeliest tokens that are told of, in a completion and in a chat.
MOST_LOGPROBS, MOST_CHAT_LOGPROBS = 5, 20
#: OpenAI's own for completions; a chat's answer may fill what there is.
_DEFAULT_MOST = 16
#: Fields of completions and chats alike.
_COMMON = (
    *("model", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "n"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "ignore_eos"),
)
#: Fields that are taken where they ask for nothing: their value that does so, beside null.
_IDLE: Mapping[str, Any] = {
    "echo": False,
    "suffix": "",
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
#: Fields that change no answer.
_IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
)
#: Fields of a chat's message that are taken where they are null or empty.
_OF_TOOLS = ("tool_calls", "tool_call_id", "function_call", "audio")


@dataclass(frozen=True)
class TextRequest:
    """What a request asks for: prompts (text, or token ids), or a chat's messages; `most` None is all that fits."""

    model: str | None
    prompts: list[Any] = field(default_factory=list)
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    most: int | None = None
    stops: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    stream: bool = False
    with_usage: bool = False
    """Whether a stream's last event has the numbers of tokens."""
    choices: int = 1
    """How many answers each prompt is to have."""
    echo: bool = False
    """Whether an answer begins with its prompt, which log-probabilities are told of too."""
    ignore_eos: bool = False
    """Whether the model's own end tokens end no answer, as those who measure want it."""

    @property
    def size(self) -> int:
        """About how many bytes are to be tokenised; a message of a chat costs its template something too."""
        prompts = sum(len(p) if isinstance(p, str) else 8 * len(p) for p in self.prompts)
        return prompts + sum(200 + len(m["role"]) + len(m["content"]) for m in self.messages)


def read_completion(message: Any) -> TextRequest:
    """Return what a request to /v1/completions asks for; BadRequest names the field, the value and what is allowed."""
    fields = _Fields(message, ("prompt", "logprobs", "max_tokens", "best_of", "echo"))
    best_of, choices = fields.whole("best_of", 1), fields.whole("n", 1, MOST_CHOICES)
    if best_of not in (None, choices or 1):  # as many are answered with as are made
        raise Unsupported(f"best_of: {best_of} is not served; leave it out")
    count = fields.whole("logprobs", 0, MOST_LOGPROBS)
    echo = fields.flag("echo")
    most = fields.whole("max_tokens", 0 if echo else 1)
    prompts = read_texts("prompt", fields.take("prompt"))
    return fields.request(prompts=prompts, most=_DEFAULT_MOST if most is None else most, logprobs=count, echo=echo)


def read_chat(message: Any) -> TextRequest:
    """Return what a request to /v1/chat/completions asks for; as `read_completion`."""
    own = ("messages", "logprobs", "top_logprobs", "max_tokens", "max_completion_tokens")
    fields = _Fields(message, own)
    wanted, count = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MOST_CHAT_LOGPROBS)
    if count is not None and not wanted:
        raise BadRequest(f"top_logprobs: {count} needs logprobs, which is not true")
    most, newer = fields.whole("max_tokens", 1), fields.whole("max_completion_tokens", 1)
    return fields.request(
        messages=_read_messages(fields.take("messages")),
        most=most if newer is None else newer,
        logprobs=(count or 0) if wanted else None,
    )


def read_payload(payload: Any) -> TextRequest:
    """Return what a payload asks for: a prompt as text, or the fields of a request to /v1/completions.

    `max_new_tokens` may be said for `max_tokens`, as TorchServe's examples do; an answer to a payload is whole.
    """
    if isinstance(payload, bytes | bytearray | memoryview):
        try:
            payload = bytes(payload).decode()
        except UnicodeDecodeError as error:
            raise BadRequest(f"the prompt is not UTF-8: {error}") from error
    if isinstance(payload, str):
        payload = {"prompt": payload}
    if isinstance(payload, dict) and "max_new_tokens" in payload:
        payload = {"max_tokens": payload["max_new_tokens"], **payload}
        del payload["max_new_tokens"]
    wanted = read_completion(payload)
    asks_for_more = wanted.stream or wanted.echo or wanted.sampling.logprobs is not None
    if len(wanted.prompts) * wanted.choices > 1 or asks_for_more:
        raise BadRequest("one prompt at a time, without `n`, `stream`, `echo` and `logprobs`; /v1/completions has them")
    return wanted


class _Fields:
    """The fields of a request, each looked at once."""

    def __init__(self, message: Any, own: tuple[str, ...]) -> None:
        if not isinstance(message, dict):
            raise BadRequest("the body must be a JSON object")
        unknown = [key for key in message if key not in {*own, *_COMMON, *_IDLE, *_IGNORED}]
        if unknown:
            raise BadRequest(f"{', '.join(unknown)}: unknown here; allowed are {', '.join((*own, *_COMMON))}")
        for key, idle in _IDLE.items():
            if key not in own and message.get(key) not in (None, idle):
                raise Unsupported(f"{key}: {message[key]!r} is not served; leave it out")
        self._message = message

    def take(self, key: str) -> Any:
        """Return a field as it is."""
        return self._message.get(key)

    def whole(self, key: str, least: int, most: float = math.inf) -> int | None:
        """Return a whole number within bounds, or None."""
        value = self.take(key)
        if value is not None and not (is_whole(value) and least <= value <= most):
            raise BadRequest(f"{key}: {value!r} is not a whole number {_within(least, most)}")
        return None if value is None else int(value)

    def number(self, key: str, default: float, allowed: Callable[[float], bool], what: str) -> float:
        """Return a number for which `allowed` holds."""
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not allowed(value):
            raise BadRequest(f"{key}: {value!r} is not a number {what}")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return true or false; null is false."""
        value = self.take(key)
        if not isinstance(value, bool | None):
            raise BadRequest(f"{key}: {value!r} is not true or false")
        return bool(value)

    def request(self, *, most: int | None, logprobs: int | None, **what: Any) -> TextRequest:
        """Return the request with the fields that both kinds have."""
        model = self.take("model")
        if not isinstance(model, str | None):
            raise BadRequest(f"model: {model!r} is not the name of a model")
        stream = self.flag("stream")
        sampling = Sampling(
            temperature=self.number(
                "temperature", 1.0, _is_temperature, f"from {LEAST_TEMPERATURE} to {MOST_TEMPERATURE}"
            ),
            top_k=max(self.whole("top_k", -1) or 0, 0),  # -1 is vLLM's own for all
            top_p=self.number("top_p", 1.0, lambda p: 0 < p <= 1, "above 0, up to 1"),
            seed=self.whole("seed", LEAST_SEED, MOST_SEED),
            logprobs=logprobs,
            presence_penalty=self._penalty("presence_penalty"),
            frequency_penalty=self._penalty("frequency_penalty"),
            logit_bias=self._biases(),
        )
        return TextRequest(
            model,
            most=most,
            stops=self._stops(),
            sampling=sampling,
            stream=stream,
            with_usage=self._wants_usage(stream=stream),
            choices=self.whole("n", 1, MOST_CHOICES) or 1,
            ignore_eos=self.flag("ignore_eos"),
            **what,
        )

    def _wants_usage(self, *, stream: bool) -> bool:
        options, key = self.take("stream_options"), "include_usage"
        if options is None:
            return False
        if not isinstance(options, dict) or not stream:
            raise BadRequest(f"stream_options: {options!r} is not an object, or `stream` is not true")
        others = [other for other in options if other != key and options[other] not in (None, False)]
        if others or not isinstance(options.get(key), bool | None):
            raise BadRequest(f"stream_options: {options!r} has more than {key}, true or false")
        return bool(options.get(key))

    def _penalty(self, key: str) -> float:
        most = MOST_PENALTY
        return self.number(key, 0.0, lambda value: -most <= value <= most, f"from {-most} to {most}")

    def _biases(self) -> tuple[tuple[int, float], ...]:
        value = self.take("logit_bias")
        if value is None:
            return ()
        if not isinstance(value, dict) or len(value) > MOST_BIASES or not all(map(_is_bias, value.items())):
            allowed = f"at most {MOST_BIASES} tokens, by their ids, with numbers from {-MOST_BIAS} to {MOST_BIAS}"
            raise BadRequest(f"logit_bias: {str(value)[:200]} is not an object of {allowed}")
        return tuple((int(token), float(bias)) for token, bias in value.items())

    def _stops(self) -> tuple[str, ...]:
        value = self.take("stop")
        stops = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(s and isinstance(s, str) for s in stops):
            raise BadRequest(f"stop: {value!r} is not a text, or a list of up to {MOST_STOPS}, none empty")
        return tuple(stops)


def _is_temperature(value: float) -> bool:
    return LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE


def _is_bias(item: tuple[Any, Any]) -> bool:
    token, bias = str(item[0]), item[1]  # over a handle ids may be whole numbers
    is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
    return token.isascii() and token.isdigit() and len(token) < 19 and is_number and -MOST_BIAS <= bias <= MOST_BIAS


def _within(least: float, most: float) -> str:
    return f"from {least}" if most == math.inf else f"from {least} to {most}"


def _read_messages(given: Any) -> list[Mapping[str, Any]]:
    """Return a chat's messages with their contents as text."""
    if not isinstance(given, list) or not given:
        raise BadRequest("messages: a list with at least one message is needed")
    messages: list[Mapping[str, Any]] = []
    for index, message in enumerate(given):
        path = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"{path}: an object with a role is needed")
        for key in _OF_TOOLS:
            if message.get(key):
                raise Unsupported(f"{path}.{key}: {message[key]!r} is not served; leave it out")
        name = message.get("name")
        if not isinstance(name, str | None):
            raise BadRequest(f"{path}.name: {name!r} is not a text")
        read = {"role": message["role"], "content": _read_content(path, message.get("content"))}
        messages.append(read if name is None else {**read, "name": name})
    return messages


def _read_content(path: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = {str(part.get("type")) for part in content} - {"text"}
        if kinds:
            raise Unsupported(f"{path}.content: parts of type {', '.join(sorted(kinds))} are not served; text is")
        if all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
    raise BadRequest(f"{path}.content: {str(content)[:200]} is not a text, or a list of parts with one")
