"""A model that generates text behind a running server: many streams, callers that hang up, handles, the gateway."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from typing import Any

import openai
import pytest

from tests.e2e.conftest import JSON, ROOT, Server, describe

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # sockets that are closed in the middle, on purpose
]
#: The model's own, and the gateway's.
PREFIXES = ("/writer", "/all")
#: Answers that no end token cuts short.
LONG: dict[str, Any] = {
    **{"model": "writer", "prompt": "hello", "max_tokens": 480, "seed": 1},
    "logit_bias": {"1": -100},
}
#: Streams over a handle; a process of its own, since it joins the server's Ray.
ASK = """
import json, sys, ray
from ray import serve
ray.init(address="auto", namespace="serve", log_to_driver=False)
handle = serve.get_app_handle("writer")
request = json.loads(sys.argv[1])
whole = handle.predict.remote(request).result()
streamed = "".join(e["choices"][0]["text"] for e in handle.options(stream=True).complete.remote(request))
chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
said = list(handle.options(stream=True).chat.remote(chat))
print(json.dumps([whole, streamed, said[0]["choices"][0]["delta"]["role"], said[-1]["choices"][0]["finish_reason"]]))
"""


def client_of(server: Server, prefix: str = "/writer") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}{prefix}/v1", api_key="none", max_retries=0)


def count_steps(server: Server) -> int:
    """Return how many times the model was asked for a token of each request that generates."""
    report = describe(server, "/writer/models/writer")
    found: int = report["functions"]["decode"]["after_ready"]["calls"]
    return found


def test_eight_streams_at_once_have_the_texts_that_each_has_alone(server: Server) -> None:
    async def stream(client: openai.AsyncOpenAI, number: int) -> str:
        text = ""
        how: dict[str, Any] = {"seed": number, "max_tokens": 30 + 9 * number, "stream": True}
        async for event in await client.completions.create(model="writer", prompt="hello " * (number + 1), **how):
            text += event.choices[0].text
        return text

    async def run() -> None:
        url = f"http://127.0.0.1:{server.port}/writer/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            alone = [await stream(client, number) for number in range(8)]
            assert await asyncio.gather(*(stream(client, number) for number in range(8))) == alone
            assert len(set(alone)) == 8

    asyncio.run(run())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_stream_comes_while_it_is_made(server: Server, prefix: str) -> None:
    before = count_steps(server)
    with client_of(server, prefix).completions.create(**LONG, stream=True) as events:
        next(iter(events))
        assert count_steps(server) - before < 0.9 * LONG["max_tokens"]
        assert sum(1 for _ in events) > 0
    assert count_steps(server) - before >= LONG["max_tokens"] - 1


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("stream", [True, False])
def test_callers_that_hang_up_free_their_slots(server: Server, stream: bool, prefix: str) -> None:
    before, body = count_steps(server), json.dumps({**LONG, "stream": stream}).encode()
    for _ in range(12):  # as many as the queue holds
        with socket.create_connection(("127.0.0.1", server.port)) as caller:
            head = f"POST {prefix}/v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            caller.sendall(head.encode() + body)
            time.sleep(0.02)
    end = time.monotonic() + 60
    while True:
        status, _, reply = server.request(
            "/writer/v1/completions", json.dumps({**LONG, "max_tokens": 3}).encode(), JSON
        )
        if status == 200:
            break
        assert status == 503, reply
        assert time.monotonic() < end
        time.sleep(0.1)
    # All of them had asked for three times as many steps as one, four at a time.
    assert count_steps(server) - before < 2 * LONG["max_tokens"]


def test_a_handle_streams_what_openai_would_get(server: Server) -> None:
    request: dict[str, Any] = {"prompt": "hello", "max_tokens": 25, "temperature": 0}
    expected = client_of(server).completions.create(model="writer", **request).choices[0].text
    asked = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(request)], cwd=ROOT, env=server.env, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr[-3000:]
    assert json.loads(asked.stdout.splitlines()[-1]) == [expected, expected, "assistant", "length"]


def test_the_gateway_answers_for_it_too(server: Server) -> None:
    how: dict[str, Any] = {"model": "writer", "prompt": "hello", "max_tokens": 25, "temperature": 0}
    expected = client_of(server).completions.create(**how).choices[0].text
    client = client_of(server, "/all")
    assert client.completions.create(**how).choices[0].text == expected
    assert "".join(e.choices[0].text for e in client.completions.create(**how, stream=True)) == expected
    assert "writer" in {model.id for model in client.models.list()}


def test_a_deadline_is_answered_in_openais_shape(server: Server) -> None:
    headers, later = {**JSON, "x-request-timeout-seconds": "0.1"}, {"x-request-timeout-seconds": "0.2"}
    for prefix in PREFIXES:
        status, _, body = server.request(f"{prefix}/v1/completions", json.dumps(LONG).encode(), headers)
        assert (status, "deadline" in json.loads(body)["error"]["message"]) == (408, True), body
        streamed = json.dumps({**LONG, "stream": True}).encode()
        status, _, body = server.request(f"{prefix}/v1/completions", streamed, {**headers, **later})
        events = [json.loads(event.removeprefix(b"data: ")) for event in body.split(b"\n\n") if event]
        assert "deadline" in events[-1]["error"]["message"], events[-1]
        assert status == 200 or (status == 408 and len(events) == 1)
