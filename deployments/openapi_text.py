"""The part of the OpenAPI description that is of models which generate text."""

from __future__ import annotations

from typing import Any

from deployments.completions import (
    LEAST_SEED,
    LEAST_TEMPERATURE,
    MOST_BIAS,
    MOST_BIASES,
    MOST_CHAT_LOGPROBS,
    MOST_CHOICES,
    MOST_LOGPROBS,
    MOST_PENALTY,
    MOST_SEED,
    MOST_STOPS,
    MOST_TEMPERATURE,
)
from deployments.generation_service import GenerationService

Json = dict[str, Any]
_TEXT: Json = {"type": "string"}
_WHOLE: Json = {"type": "integer", "minimum": 1}
#: One event; `data` is JSON, or `[DONE]`.
_EVENT: Json = {"type": "object", "properties": {"data": _TEXT}, "required": ["data"]}
_USAGE: Json = {
    "type": "object",
    "properties": {
        **{key: {"type": "integer"} for key in ("prompt_tokens", "completion_tokens", "total_tokens")},
        "prompt_tokens_details": {"type": "object", "properties": {"cached_tokens": {"type": "integer"}}},
    },
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
}


def completion_body(service: GenerationService) -> Json:
    """Return the schema of what /v1/completions takes."""
    token = {"type": "integer", "minimum": 0, "maximum": service.generator.config.vocabulary - 1}
    tokens = {"type": "array", "items": token, "minItems": 1, "maxItems": service.generator.length - 1}
    most = {"minItems": 1, "maxItems": service.most_answers}
    prompt = {
        "oneOf": [
            _TEXT,
            {"type": "array", "items": _TEXT, **most},
            tokens,
            {"type": "array", "items": tokens, **most},
        ]
    }
    return _body(
        service,
        {"prompt": prompt},
        logprobs={"type": ["integer", "null"], "minimum": 0, "maximum": MOST_LOGPROBS},
        echo={"type": "boolean"},
        max_tokens={"type": "integer", "minimum": 0, "description": "0 with `echo` alone"},
    )


def chat_body(service: GenerationService) -> Json:
    """Return the schema of what /v1/chat/completions takes."""
    part = {
        "type": "object",
        "properties": {"type": {"type": "string", "enum": ["text"]}, "text": _TEXT},
        "required": ["type", "text"],
    }
    content = {"oneOf": [_TEXT, {"type": "array", "items": part}]}
    message = {"type": "object", "properties": {"role": _TEXT, "content": content}, "required": ["role", "content"]}
    return _body(
        service,
        {"messages": {"type": "array", "items": message, "minItems": 1}},
        logprobs={"type": ["boolean", "null"]},
        top_logprobs={"type": ["integer", "null"], "minimum": 0, "maximum": MOST_CHAT_LOGPROBS},
        max_completion_tokens=_WHOLE,
    )


def _body(service: GenerationService, needed: Json, **own: Json) -> Json:
    one = {"type": "string", "minLength": 1}
    penalty = {"type": "number", "minimum": -MOST_PENALTY, "maximum": MOST_PENALTY}
    stop = {"oneOf": [one, {"type": "array", "items": one, "maxItems": MOST_STOPS}]}
    properties = {
        "model": {"type": "string", "enum": [service.name]},
        **needed,
        "max_tokens": _WHOLE,
        "temperature": {"type": "number", "minimum": LEAST_TEMPERATURE, "maximum": MOST_TEMPERATURE},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": "integer", "minimum": -1},
        "seed": {"type": "integer", "minimum": LEAST_SEED, "maximum": MOST_SEED},
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
        "logit_bias": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,18}$"},
            "additionalProperties": {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS},
            "maxProperties": MOST_BIASES,
        },
        "n": {"type": "integer", "minimum": 1, "maximum": min(MOST_CHOICES, service.most_answers)},
        "stop": stop,
        "ignore_eos": {"type": "boolean"},
        "stream": {"type": "boolean"},
        "stream_options": {
            "type": "object",
            "properties": {"include_usage": {"type": "boolean"}, "include_obfuscation": {"enum": [False]}},
            "additionalProperties": False,
        },
        "user": _TEXT,
        **own,
    }
    return {
        "type": "object",
        "properties": properties,
        "required": ["model", *needed],
        "additionalProperties": False,
    }


def answer(*, chat: bool) -> Json:
    """Return the content of a reply, whole or as events."""
    message = {"type": "object", "properties": {"role": _TEXT, "content": _TEXT}, "required": ["role", "content"]}
    text = {"message": message} if chat else {"text": _TEXT}
    finish = {"type": "string", "enum": ["stop", "length"]}
    choice = {
        "type": "object",
        "properties": {"index": {"type": "integer"}, "finish_reason": finish, **text},
        "required": ["index", "finish_reason", *text],
    }
    reply = {
        "type": "object",
        "properties": {
            **dict.fromkeys(("id", "object", "model"), _TEXT),
            "created": {"type": "integer"},
            "choices": {"type": "array", "items": choice},
            "usage": _USAGE,
        },
        "required": ["id", "object", "created", "model", "choices", "usage"],
    }
    return {"application/json": {"schema": reply}, "text/event-stream": {"schema": _EVENT}}
