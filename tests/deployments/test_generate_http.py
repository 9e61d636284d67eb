"""OpenAI's API for text over HTTP: whole and streamed, alone and beside others, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from starlette.routing import Route

from deployments.event_stream import write_event
from deployments.generation_service import GenerationService
from deployments.http import make_app
from deployments.openapi import describe
from tests.support.checkpoints import greedy, make_checkpoint
from tests.support.http_server import listen
from tests.support.local import generate_locally

NAME = "text-generator"
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return make_checkpoint(folder)


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": "deployments.generate:TextGenerator",
        "model_args": {"checkpoint": str(folder)},
        "pt2": {"compile": {"enable": False}},
        "batching": {"batch_sizes": [1, 4], "max_queue": 12},
        **more,
    }


@pytest.fixture(scope="module")
def service(folder: Path, model: Any) -> Iterator[GenerationService]:
    with generate_locally(arguments(folder)) as found:
        yield found


@pytest.fixture(scope="module")
def url(service: GenerationService) -> Iterator[str]:
    with listen(make_app(service)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def wait_until_free(service: GenerationService) -> None:
    for _ in range(3000):
        if not service.slots_in_use() and not service.admission.rows and not service.admission.bytes:  # type: ignore[attr-defined]
            return
        time.sleep(0.01)
    raise AssertionError("what was held is not given back")


def test_a_completion_is_what_transformers_generates(
    client: openai.OpenAI, service: GenerationService, model: Any
) -> None:
    prompt = service.generator.encode("hello world")
    assert prompt[0] == 0  # what the tokenizer puts before a text
    expected = service.generator.tokenizer.decode(greedy(model, prompt, 30))
    found = client.completions.create(model=NAME, prompt="hello world", max_tokens=30, temperature=0)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "length")
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), 30)
    by_ids = client.completions.create(model=NAME, prompt=prompt, max_tokens=30, temperature=0)
    assert by_ids.choices[0].text == expected


def test_a_stream_has_the_same_text_and_its_usage_at_the_end(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**how)
    events = list(client.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].text for e in events if e.choices) == whole.choices[0].text
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert len(events) > 5
    assert (events[-1].choices, events[-1].usage) == ([], whole.usage)


def test_a_chat_goes_by_the_tokenizers_template(client: openai.OpenAI, service: GenerationService, model: Any) -> None:
    prompt = service.generator.tokenizer.encode("<s>user: hi\nassistant:", add_special_tokens=False).ids
    expected = service.generator.tokenizer.decode(greedy(model, prompt, 12))
    how: dict[str, Any] = {"model": NAME, "messages": CHAT, "max_tokens": 12, "temperature": 0}
    found = client.chat.completions.create(**how)
    assert found.choices[0].message.content == expected
    assert found.usage is not None and found.usage.prompt_tokens == len(prompt)
    events = list(client.chat.completions.create(**how, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in events) == expected
    assert events[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="messages: no such role: judge"):
        client.chat.completions.create(model=NAME, messages=[{"role": "judge", "content": "x"}])  # type: ignore[list-item, misc]


def test_eight_streams_at_once_have_the_texts_that_each_has_alone(url: str) -> None:
    async def stream(client: openai.AsyncOpenAI, number: int) -> str:
        text = ""
        how: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 50 + number, "max_tokens": 20 + 9 * number}
        events = await client.completions.create(model=NAME, prompt="hello " * (number + 1), stream=True, **how)
        async for event in events:
            text += event.choices[0].text
        return text

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            alone = [await stream(client, number) for number in range(8)]
            assert await asyncio.gather(*(stream(client, number) for number in range(8))) == alone
            assert len(set(alone)) == 8

    asyncio.run(run())


def test_an_event_is_one_line_to_everybody() -> None:
    text = "a\x85b\u2028c\u2029d\r\ne\x0bf"
    line, *rest = write_event({"text": text}).decode().splitlines()
    assert rest == [""]
    assert json.loads(line.removeprefix("data: ")) == {"text": text}


def test_several_prompts_are_answered_in_their_order(client: openai.OpenAI) -> None:
    prompts = ["a", "b b b b", "hello"]
    how: dict[str, Any] = {"model": NAME, "max_tokens": 9, "temperature": 0}
    alone = [client.completions.create(prompt=prompt, **how).choices[0].text for prompt in prompts]
    found = client.completions.create(prompt=prompts, **how)
    assert [(c.index, c.text) for c in found.choices] == list(enumerate(alone))
    texts = ["", "", ""]
    for event in client.completions.create(prompt=prompts, stream=True, **how):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == alone


def test_usage_tells_what_of_the_prompts_was_there(client: openai.OpenAI) -> None:
    def ask(prompt: list[list[int]], n: int) -> tuple[int, int | None]:
        found = client.completions.create(model=NAME, prompt=prompt, n=n, max_tokens=4, temperature=0).usage
        assert found is not None and found.prompt_tokens_details is not None
        return found.prompt_tokens, found.prompt_tokens_details.cached_tokens

    one, other = [[start + i % 90 for i in range(80)] for start in (20, 150)]
    assert ask([one, other], 2) == (160, 0), "each prompt counts once, and each was run once"
    assert ask([one], 1) == (80, 64)
    assert ask([[*one, *other]], 1) == (160, 64)
    assert ask([other[1:]], 1) == (79, 0)


def test_a_prompt_may_have_several_answers_each_with_a_seed_of_its_own(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": NAME, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    alone = [client.completions.create(**how, prompt="hello", seed=seed).choices[0].text for seed in (5, 6, 7)]
    reply = client.completions.create(**how, prompt=["hello", "world"], seed=5, n=3)
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert [choice.text for choice in reply.choices[:3]] == alone
    assert len(set(alone)) > 1
    one = client.completions.create(**how, prompt=["hello", "world"], seed=5)
    assert reply.usage and one.usage
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (one.usage.prompt_tokens, 48)
    texts, roles = ["", ""], [0, 0]
    chat: dict[str, Any] = {**how, "messages": CHAT, "seed": 5, "n": 2}
    for event in client.chat.completions.create(**chat, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role == "assistant"
    whole = client.chat.completions.create(**chat)
    assert (texts, roles) == ([choice.message.content for choice in whole.choices], [1, 1])
    with pytest.raises(openai.BadRequestError, match="n: 14 answers to one request; at most 12 are allowed") as e:
        client.completions.create(**how, prompt=["a", "b"], n=7)
    assert e.value.param == "n"


def test_penalties_and_biases_are_heeded(client: openai.OpenAI, service: GenerationService) -> None:
    how: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": 12, "temperature": 0}
    token = service.generator.tokenizer.encode("m", add_special_tokens=False).ids[0]
    bias = {str(token): 20}
    assert client.completions.create(**how, logit_bias=bias).choices[0].text == "m" * 12
    plain = client.completions.create(**how).choices[0].text
    for field in ("presence_penalty", "frequency_penalty"):
        penalty: dict[str, Any] = {field: 2}
        assert client.completions.create(**how, **penalty).choices[0].text != plain
    often = client.completions.create(**how, logit_bias=bias, frequency_penalty=2).choices[0].text
    assert "mm" in often
    assert often != "m" * 12
    with pytest.raises(openai.BadRequestError, match="logit_bias: token 300 is not in the vocabulary"):
        client.completions.create(**how, logit_bias={"300": 1})


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI, service: GenerationService) -> None:
    how: dict[str, Any] = {"model": NAME, "prompt": "hello", "temperature": 0}
    text = client.completions.create(max_tokens=60, **how).choices[0].text
    stop = text[20:23]
    found = client.completions.create(max_tokens=400, stop=[stop, "never so"], **how)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    events = list(client.completions.create(max_tokens=400, stop=stop, stream=True, **how))
    assert "".join(e.choices[0].text for e in events) == text[: text.index(stop)]
    wait_until_free(service)


def test_an_end_token_ends_the_answer(folder: Path, model: Any) -> None:
    prompt = [0, 5, 6]
    expected = greedy(model, prompt, 5)
    with generate_locally(arguments(folder)) as service:
        service.generator.ends = frozenset([expected[3]])
        with listen(make_app(service)) as port:
            body = {"model": NAME, "prompt": prompt, "max_tokens": 50, "temperature": 0}
            reply = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == expected.index(expected[3])


def test_a_special_token_may_be_a_stop_string(client: openai.OpenAI) -> None:
    """As the end of a turn is one in some checkpoints; it is in no text."""
    how: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": 5, "logit_bias": {"0": 100}}
    for stop, finish, tokens in ((None, "length", 5), (["never so", "<s>"], "stop", 0)):
        found = client.completions.create(**how, stop=stop)
        assert found.usage and found.usage.completion_tokens == tokens
        assert (found.choices[0].text, found.choices[0].finish_reason) == ("", finish)


def test_an_end_token_may_be_ignored(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": 5, "logit_bias": {"1": 100}, "logprobs": 2}
    (found,) = client.completions.create(**how).choices
    assert (found.finish_reason, found.logprobs and found.logprobs.tokens) == ("stop", [])
    (found,) = client.completions.create(**how, extra_body={"ignore_eos": True}).choices
    assert (found.finish_reason, found.logprobs and found.logprobs.tokens) == ("length", ["</s>"] * 5)


def test_the_token_that_was_drawn_is_among_the_likeliest_and_where_its_text_begins(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": 60, "temperature": 2, "seed": 3}
    (found,) = client.completions.create(**how, logprobs=1).choices
    told = found.logprobs
    assert told and told.tokens and told.top_logprobs and told.token_logprobs and told.text_offset
    assert {len(top) for top in told.top_logprobs} == {1, 2}, "else this shows nothing"
    for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        if token not in ("", "\ufffd"):  # as several tokens read
            assert top[token] == value
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        if "\ufffd" not in token and token not in ("<s>", "</s>"):
            assert found.text[offset : offset + len(token)] == token
    events = list(client.completions.create(**how, logprobs=1, stream=True))
    streamed = [e.choices[0].logprobs for e in events if e.choices[0].logprobs]
    assert [offset for one in streamed for offset in one.text_offset or []] == told.text_offset


@pytest.mark.parametrize("with_others", [False, True])
def test_a_prompts_own_tokens_are_scored(client: openai.OpenAI, model: Any, with_others: bool) -> None:
    """As lm-evaluation-harness asks: the log-likelihood of a continuation, and whether it is the greedy one."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 300, (size,), generator=generator).tolist() for size in (1, 40, 300)]
    how: dict[str, Any] = {"model": NAME, "max_tokens": 1, "temperature": 0, "logprobs": 2, "echo": True}
    with ExitStack() as stack:
        if with_others:
            for _ in range(2):
                asked = client.completions.create(model=NAME, prompt="hello", max_tokens=400, stream=True)
                next(iter(stack.enter_context(asked)))
        choices = client.completions.create(prompt=prompts, **how).choices
    for prompt, choice in zip(prompts, choices, strict=True):
        with torch.no_grad():
            right = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        told = choice.logprobs
        assert told and told.token_logprobs and told.top_logprobs and told.tokens and told.text_offset
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(prompt) + 1
        assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
        expected = right[:-1].gather(-1, torch.tensor(prompt[1:]).unsqueeze(-1)).squeeze(-1).tolist()
        assert told.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
        likeliest = right.amax(-1).tolist()
        assert [max(top.values()) for top in told.top_logprobs[1:]] == pytest.approx(likeliest, abs=1e-4)
        assert told.token_logprobs[-1] == pytest.approx(likeliest[-1], abs=1e-4)
        assert told.text_offset == sorted(told.text_offset)


def test_an_answer_may_begin_with_its_prompt(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": NAME, "prompt": ["hello", "world"], "max_tokens": 6, "temperature": 0, "n": 2}
    plain = [choice.text for choice in client.completions.create(**how).choices]
    expected = [prompt + text for prompt, text in zip(["hello", "hello", "world", "world"], plain, strict=True)]
    for logprobs in (None, 0):
        found = client.completions.create(**how, echo=True, logprobs=logprobs)
        assert [choice.text for choice in found.choices] == expected
        assert found.usage and found.usage.completion_tokens == 24
        texts = [""] * 4
        for event in client.completions.create(**how, echo=True, logprobs=logprobs, stream=True):
            texts[event.choices[0].index] += event.choices[0].text
        assert texts == expected
    (found, *_) = client.completions.create(**how | {"max_tokens": 0}, echo=True, logprobs=1).choices
    assert (found.text, found.finish_reason) == ("hello", "length")
    assert found.logprobs and found.logprobs.tokens and found.logprobs.text_offset
    assert found.logprobs.tokens[0] == "<s>" and "".join(found.logprobs.tokens[1:]) == "hello"
    for token, offset in list(zip(found.logprobs.tokens, found.logprobs.text_offset, strict=True))[1:]:
        assert found.text[offset : offset + len(token)] == token


@pytest.mark.parametrize(
    "prompt",
    [
        "user: <s>na\u00efve \U0001f600 \u4f60\u597d hello world</s>x",
        "a \U0001f600 1 = x",
        "\U0001f600 hello",
        " 1 + 1 = 2",
        "Cafe\u0301 au lait",
    ],
)
def test_where_a_prompts_tokens_begin_in_it(client: openai.OpenAI, prompt: str) -> None:
    how: dict[str, Any] = {"model": NAME, "prompt": prompt, "max_tokens": 2, "temperature": 0, "logprobs": 0}
    found = client.completions.create(**how, echo=True).choices[0]
    told = found.logprobs
    assert found.text.startswith(prompt) and told and told.tokens and told.text_offset
    assert told.text_offset == sorted(told.text_offset)
    for token, offset in list(zip(told.tokens, told.text_offset, strict=True))[1:-2]:
        assert found.text[offset : offset + len(token)] == token or "\ufffd" in token
    assert told.text_offset[-2] == len(prompt)


def test_an_end_token_is_scored_where_the_prompt_is(client: openai.OpenAI) -> None:
    """Else who leaves out the last score, of what was generated, would leave out one of the prompt's."""
    how: dict[str, Any] = {"model": NAME, "prompt": [5, 6, 7], "max_tokens": 1, "logit_bias": {"1": 100}, "logprobs": 1}
    found = client.completions.create(**how, echo=True)
    assert found.usage and found.usage.completion_tokens == 0
    told = found.choices[0].logprobs
    assert told and told.tokens and told.tokens[-1] == "</s>" and len(told.token_logprobs or []) == 4


def test_log_probabilities_come_with_each_token(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": NAME, "max_tokens": 6, "temperature": 0}
    logprobs = client.completions.create(prompt="hello", logprobs=3, **how).choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or []) == len(logprobs.text_offset or []) == 6
    for value, top in zip(logprobs.token_logprobs or [], logprobs.top_logprobs, strict=True):
        assert value == max(top.values()) <= 0
    asked = {**how, "messages": CHAT, "logprobs": True}
    found: Any = client.chat.completions.create(**asked, top_logprobs=2)
    content = found.choices[0].logprobs.content
    assert len(content) == 6
    assert all(one.logprob == one.top_logprobs[0].logprob and len(one.top_logprobs) == 2 for one in content)
    events: Any = list(client.chat.completions.create(**asked, stream=True))
    streamed = [one for e in events if e.choices[0].logprobs for one in e.choices[0].logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in content]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", {"model": NAME, "prompt": "x", "max_tokens": 0}, 400, "max_tokens: 0 is not"),
        ("/v1/completions", {"model": NAME, "prompt": [300]}, 400, "not in the vocabulary (0 to 299)"),
        ("/v1/completions", {"model": NAME, "prompt": [5] * 600}, 400, "prompt: 600 tokens; fewer than 512"),
        ("/v1/completions", {"model": NAME, "prompt": [[5], [300]]}, 400, "prompt[1]: token 300 is not in the voc"),
        ("/v1/completions", {"model": NAME, "prompt": "x" * 100_000}, 400, "prompt: 100000 characters"),
        ("/v1/completions", {"model": NAME, "prompt": "\ud800"}, 400, "half of a surrogate pair"),
        ("/v1/completions", {"model": "other", "prompt": "x"}, 404, "Model not found: other"),
        ("/v1/completions", {"prompt": "x"}, 400, "model: the name of a model is needed"),
        ("/v1/completions", {"model": NAME, "prompt": "x", "suffix": "y"}, 501, "suffix: 'y' is not served"),
        ("/v1/completions", {"model": NAME, "prompt": ["x"] * 13}, 400, "at most 12 are allowed (batching.max_queue)"),
        ("/v1/chat/completions", {"model": NAME, "messages": []}, 400, "messages: a list with at least one"),
        ("/v1/embeddings", {"model": NAME, "input": "x"}, 404, "no such path"),
        ("/v2/models/text-generator/infer", {"inputs": []}, 501, "takes no tensors"),
    ],
)
def test_what_is_wrong_is_said_in_the_protocols_own_shape(
    url: str, service: GenerationService, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    reply = httpx.post(url + path, content=json.dumps(body).encode())
    assert reply.status_code == status
    error = reply.json()["error"]
    assert message in (error if path.startswith("/v2") else error["message"])
    assert reply.headers.get("x-should-retry") == ("false" if path.startswith("/v1") and status == 501 else None)
    wait_until_free(service)


def test_a_payload_is_answered_as_torchserve_would(url: str, client: openai.OpenAI) -> None:
    expected = client.completions.create(model=NAME, prompt="hello", max_tokens=8, temperature=0).choices[0].text
    body = {"prompt": "hello", "max_new_tokens": 8, "temperature": 0}
    reply = httpx.post(f"{url}/predictions/{NAME}", json=body)
    assert (reply.status_code, reply.text, reply.headers["content-type"]) == (
        200,
        expected,
        "text/plain; charset=utf-8",
    )
    assert httpx.post(f"{url}/predictions/{NAME}", content=b"hello").status_code == 200
    description = httpx.get(f"{url}/models/{NAME}").json()[0]
    assert set(description["compileReport"]["functions"]) == {"decode", "prefill 32", "prefill 256"}
    assert httpx.get(f"{url}/v2/models/{NAME}").json()["inputs"] == []


def test_who_hangs_up_frees_the_slot(url: str, service: GenerationService) -> None:
    port = int(url.rpartition(":")[2])
    body = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 500, "stream": True, "seed": 1}).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert b"200 OK" in connection.recv(4096)
        assert service.slots_in_use()  # type: ignore[attr-defined]
    wait_until_free(service)


def test_a_deadline_ends_a_reply_and_a_stream(
    url: str, service: GenerationService, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots: Any = service.running  # type: ignore[attr-defined]
    step = slots.step

    def take_a_while() -> Any:
        time.sleep(0.01)  # else a fast machine is through with 500 tokens before the deadline
        return step()

    monkeypatch.setattr(slots, "step", take_a_while)
    body = {"model": NAME, "prompt": "x", "max_tokens": 500, "seed": 1}
    headers = {"x-request-timeout-seconds": "0.2"}
    reply = httpx.post(f"{url}/v1/completions", json=body, headers=headers)
    assert (reply.status_code, "deadline" in reply.json()["error"]["message"]) == (408, True)
    reply = httpx.post(f"{url}/v1/completions", json={**body, "stream": True}, headers=headers)
    events = [line for line in reply.text.split("\n\n") if line]
    assert reply.status_code == 200
    assert "deadline" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]
    assert "data: [DONE]" not in events
    wait_until_free(service)


def test_what_is_over_the_queue_is_refused_at_once(client: openai.OpenAI, service: GenerationService) -> None:
    streams = [
        client.completions.create(model=NAME, prompt=["x"] * 4, max_tokens=500, stream=True, seed=1) for _ in range(3)
    ]
    with pytest.raises(openai.InternalServerError, match="the queue is full") as refused:
        client.completions.create(model=NAME, prompt="x")
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) >= 1
    for stream in streams:
        stream.close()
    wait_until_free(service)
    assert client.completions.create(model=NAME, prompt="x").choices


def test_fields_of_any_values_get_an_answer_or_an_error_that_names_them(url: str, service: GenerationService) -> None:
    values: list[Any] = [None, True, -1, 0, 1, 2**63, 10**400, -0.5, 1e308, "", "x", "\ud800", "\0", [], {}, [1], [[1]]]
    values += [["a"], {"a": {}}, [None], [[[]]], "\u00e9" * 300, {"role": "user"}, [{"role": 5}], [{"type": "text"}]]
    fields = ("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream")
    more = ("stream_options", "logprobs", "top_logprobs", "n", "tools", "response_format", "surprise")
    newer = ("logit_bias", "presence_penalty", "frequency_penalty", "best_of")
    statuses = set()
    with httpx.Client(timeout=60) as client:
        for number in range(1500):
            r = random.Random(number)
            path = r.choice(["/v1/completions", "/v1/chat/completions"])
            asked = {"prompt": "x"} if path == "/v1/completions" else {"messages": CHAT}
            body: dict[str, Any] = {"model": NAME, **asked, "max_tokens": 2}
            for _ in range(r.choice([1, 1, 2])):
                body[r.choice([*fields, *more, *newer])] = r.choice(values)
            reply = client.post(url + path, content=json.dumps(body).encode())
            statuses.add(reply.status_code)
            assert reply.status_code in (200, 400, 404, 501), (number, reply.text)
            if reply.status_code != 200:
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}, number
            elif body.get("stream"):
                assert reply.text.endswith("data: [DONE]\n\n"), (number, reply.text)
    assert statuses == {200, 400, 404, 501}
    wait_until_free(service)


def test_the_field_that_is_wrong_is_named(url: str) -> None:
    body = {"model": NAME, "prompt": "x", "temperature": 9}
    error = httpx.post(f"{url}/v1/completions", json=body).json()["error"]
    assert (error["param"], error["type"]) == ("temperature", "invalid_request_error")


def test_a_prompt_is_neither_cut_off_nor_filled_up_by_how_the_tokenizer_was_saved(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with generate_locally(arguments(tmp_path)) as service:
        assert len(service.generator.encode("a")) == 2
        assert len(service.generator.encode("abcdefgh")) == 9


def test_what_a_template_raises_is_the_requests_fault(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, template="{{ messages[0].content + 1 }}")
    with generate_locally(arguments(tmp_path)) as service, listen(make_app(service)) as port:
        body = {"model": NAME, "messages": CHAT}
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")


def test_a_tokenizer_without_letters_serves_too(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["pre_tokenizer"] = file["decoder"] = file["post_processor"] = None
    file["model"].update(vocab={"<s>": 0, "</s>": 1, **{letter: 2 + i for i, letter in enumerate("ACGT")}}, merges=[])
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with generate_locally(arguments(tmp_path)) as service, listen(make_app(service)) as port:
        body = {"model": NAME, "prompt": "ACGT", "max_tokens": 3, "temperature": 0, "logprobs": 1}
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body)
    assert (reply.status_code, reply.json()["usage"]["prompt_tokens"]) == (200, 4)
    assert len(reply.json()["choices"][0]["logprobs"]["tokens"]) == 3


def test_a_model_without_a_template_has_no_chat(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, template=None)
    with generate_locally(arguments(tmp_path)) as service, listen(make_app(service)) as port:
        body = {"model": NAME, "messages": CHAT}
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert "no chat template; ask /v1/completions" in reply.json()["error"]["message"]


def test_every_route_is_described(service: GenerationService) -> None:
    described = {(path, method) for path, methods in describe(service)["paths"].items() for method in methods}
    routes = [route for route in make_app(service).routes if isinstance(route, Route)]
    served = {(r.path, m.lower()) for r in routes for m in (r.methods or ()) if m != "HEAD"}
    assert {path.rpartition("/")[2] for path, _ in served - described} == {"openapi.json", "infer"}
    assert described <= served


def test_a_broken_device_is_told_to_all_and_the_replica_is_not_healthy(folder: Path, model: Any) -> None:
    with generate_locally(arguments(folder)) as service, listen(make_app(service)) as port:
        with httpx.stream(
            "POST",
            f"http://127.0.0.1:{port}/v1/completions",
            json={"model": NAME, "prompt": "x", "max_tokens": 500, "stream": True},
        ) as reply:
            lines = reply.iter_lines()
            next(lines)

            def fail(*inputs: Any) -> Any:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

            service.running._decode = fail  # type: ignore[attr-defined]
            last = [line for line in lines if line][-1]
        assert "the device failed" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert httpx.get(f"http://127.0.0.1:{port}/v2/health/ready").status_code == 503
        body = {"model": NAME, "prompt": "x"}
        assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body).status_code == 503
