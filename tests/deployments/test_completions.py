"""What requests for text may say, and how what they may not is named."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.completions import TextRequest, read_chat, read_completion, read_payload
from deployments.errors import BadRequest, Unsupported
from deployments.sampling import Sampling

ASKED = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def test_all_fields_of_a_completion_are_read() -> None:
    wanted = read_completion(
        {
            **ASKED,
            "prompt": ["a", "b"],
            "max_tokens": 5,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "seed": 7,
            "stop": ["x", "y"],
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": 2,
            "n": 3,
            "best_of": 3,
            "presence_penalty": -1,
            "frequency_penalty": 0.5,
            "logit_bias": {"5": -100, "17": 2.5},
            "user": "me",
        }
    )
    assert wanted == TextRequest(
        model="m",
        prompts=["a", "b"],
        most=5,
        stops=("x", "y"),
        sampling=Sampling(0.5, 3, 0.9, 7, 2, -1.0, 0.5, ((5, -100.0), (17, 2.5))),
        stream=True,
        with_usage=True,
        choices=3,
    )


def test_what_is_left_out_is_openais_default() -> None:
    assert read_completion(ASKED) == TextRequest("m", ["x"], [], 16, (), Sampling(1.0, 0, 1.0, None, None))
    assert read_chat(CHAT) == TextRequest("m", [], [{"role": "user", "content": "x"}])
    assert read_chat({**CHAT, "max_tokens": 3, "max_completion_tokens": 4}).most == 4
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_chat({**CHAT, "messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "ab"


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2], [3]]])
def test_prompts_may_be_token_ids(prompt: list[Any]) -> None:
    assert read_completion({**ASKED, "prompt": prompt}).prompts in ([[1, 2]], [[1, 2], [3]])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt: a text"),
    ({"prompt": []}, "prompt: a text"),
    ({"prompt": [True]}, "prompt: a text"),
    ({"prompt": ["a", 1]}, "prompt: a text"),
    ({"model": 5}, "model: 5 is not the name of a model"),
    ({"max_tokens": 0}, "max_tokens: 0 is not a whole number from 1"),
    ({"max_tokens": True}, "max_tokens: True is not a whole number from 1"),
    ({"max_tokens": 2.5}, "max_tokens: 2.5 is not a whole number"),
    ({"temperature": -0.1}, "temperature: -0.1 is not a number from 0 to 2"),
    ({"temperature": "hot"}, "temperature: 'hot' is not a number from 0 to 2"),
    ({"temperature": 10**400}, "temperature: 10+ is not a number from 0 to 2"),
    ({"top_p": 0}, "top_p: 0 is not a number above 0, up to 1"),
    ({"top_k": -2}, "top_k: -2 is not a whole number from -1"),
    ({"seed": 2**63}, "seed: 9223372036854775808 is not a whole number from"),
    ({"logprobs": 6}, "logprobs: 6 is not a whole number from 0 to 5"),
    ({"stop": ""}, "stop: ''"),
    ({"stop": ["a"] * 17}, "stop: .* up to 16"),
    ({"stop": [""]}, "stop: "),
    ({"stop": 0}, "stop: 0 is not a text"),
    ({"stop": {}}, "stop: {} is not a text"),
    ({"n": 0}, "n: 0 is not a whole number from 1 to 128"),
    ({"n": 129}, "n: 129 is not a whole number from 1 to 128"),
    ({"presence_penalty": 2.1}, "presence_penalty: 2.1 is not a number from -2 to 2"),
    ({"frequency_penalty": "x"}, "frequency_penalty: 'x' is not a number from -2 to 2"),
    ({"logit_bias": [5]}, r"logit_bias: \[5\] is not an object of at most 1024 tokens"),
    ({"logit_bias": {"a": 1}}, "logit_bias: .* by their ids, with numbers from -100 to 100"),
    ({"logit_bias": {"5": 101}}, "logit_bias: .* from -100 to 100"),
    ({"logit_bias": {"5": True}}, "logit_bias: "),
    ({"logit_bias": {"\u0665": 1}}, "logit_bias: "),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias: .* at most 1024"),
    ({"stream": "yes"}, "stream: 'yes' is not true or false"),
    ({"stream_options": {}}, "stream_options: {} is not an object, or `stream` is not true"),
    ({"stream": True, "stream_options": []}, r"stream_options: \[\] is not an object"),
    ({"stream": True, "stream_options": {"include_usage": "false"}}, "stream_options: .* include_usage, true or false"),
    ({"stream": True, "stream_options": {"surprise": 1}}, "stream_options: .* has more than include_usage"),
    ({"echo": "yes"}, "echo: 'yes' is not true or false"),
    ({"echo": False, "max_tokens": 0}, "max_tokens: 0 is not a whole number from 1"),
    ({"ignore_eos": 1}, "ignore_eos: 1 is not true or false"),
    ({"beams": 4}, "beams: unknown here; allowed are prompt, "),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_field_is_named_with_what_is_allowed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read_completion({**ASKED, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": None}, "messages: a list with at least one message"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\]: an object with a role"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\]\.content: 5 is not a text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"messages\[0\]\.content: .* not a text"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, r"messages\[0\]\.name: 5 is not a text"),
        ({"top_logprobs": 3}, "top_logprobs: 3 needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: 21 is not a whole number from 0 to 20"),
        ({"prompt": "x"}, "prompt: unknown here"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read_chat({**CHAT, **change})


@pytest.mark.parametrize("change", [{"best_of": 3}, {"best_of": 1, "n": 2}, {"suffix": "x"}])
def test_what_openai_has_and_this_server_has_not_is_said(change: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match=f"{next(iter(change))}: .* is not served; leave it out"):
        read_completion({**ASKED, **change})


def test_what_changes_nothing_is_taken() -> None:
    wanted = read_completion({**ASKED, "top_k": -1, "parallel_tool_calls": True, "prompt_cache_retention": "24h"})
    assert wanted == read_completion(ASKED)
    options = {"include_usage": True, "include_obfuscation": False}
    assert read_completion({**ASKED, "stream": True, "stream_options": options}).with_usage


def test_a_name_goes_to_the_template_and_a_tool_is_not_served() -> None:
    message = {"role": "user", "content": "x", "name": "Bob", "type": "text"}  # the last by lm-evaluation-harness
    assert read_chat({**CHAT, "messages": [message]}).messages == [{"role": "user", "content": "x", "name": "Bob"}]
    calls: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    with pytest.raises(Unsupported, match=r"messages\[0\]\.tool_calls: .* is not served"):
        read_chat({**CHAT, "messages": [calls]})


def test_images_in_a_chat_are_not_served() -> None:
    content = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(Unsupported, match="parts of type image_url are not served; text is"):
        read_chat({**CHAT, "messages": [{"role": "user", "content": content}]})


def test_a_payload_is_a_prompt_or_a_completions_fields() -> None:
    assert read_payload(b"hello").prompts == read_payload("hello").prompts == ["hello"]
    assert read_payload({"prompt": "x", "max_new_tokens": 7}).most == 7
    for payload in ({"prompt": ["a", "b"]}, {"prompt": "a", "stream": True}, {"prompt": "a", "n": 2}):
        with pytest.raises(BadRequest, match="one prompt at a time"):
            read_payload(payload)
    with pytest.raises(BadRequest, match="not UTF-8"):
        read_payload(b"\xff")
    with pytest.raises(BadRequest, match="must be a JSON object"):
        read_payload([1, 2])
