"""OpenAI's embeddings as its own client asks for them, over real sockets."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from deployments.http import make_app
from deployments.service import ModelService
from deployments.text import SentenceEncoder
from tests.support.http_server import listen
from tests.support.local import serve_locally

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own are not ours to judge

NAME = "sentence-encoder"
TEXTS = ["A cat sat.", "", "Zwei Hunde liefen über die Straße.", "word " * 300]


@pytest.fixture(scope="module")
def encoder() -> Iterator[ModelService]:
    args = {
        "model": "deployments.text:SentenceEncoder",
        "pt2": {"compile": {"enable": False}},
        "batching": {"batch_sizes": [1, 4], "lengths": [16, 64, 256]},
    }
    with serve_locally(args) as service:
        yield service


@pytest.fixture(scope="module")
def http(encoder: ModelService) -> Iterator[TestClient]:
    with TestClient(make_app(encoder)) as client:
        yield client


@pytest.fixture(scope="module")
def client(encoder: ModelService) -> Iterator[openai.OpenAI]:
    with (
        listen(make_app(encoder)) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0) as found,
    ):
        yield found


@pytest.fixture(scope="module")
def expected(encoder: ModelService) -> Any:
    async def ask() -> list[Any]:
        return await asyncio.gather(*map(encoder.predict, TEXTS))

    return np.array(asyncio.run(ask()), np.float32)


def numbers_of(reply: Any) -> Any:
    assert [item.index for item in reply.data] == list(range(len(reply.data)))
    return np.array([item.embedding for item in reply.data], np.float32)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_embeddings_are_those_of_predictions(client: openai.OpenAI, expected: Any, encoding: Any) -> None:
    given = {} if encoding is None else {"encoding_format": encoding}  # without it the client asks for base64 itself
    reply = client.embeddings.create(model=NAME, input=TEXTS, **given)
    if encoding == "base64":  # asked for by name, it is handed on as it came
        found = np.array([np.frombuffer(base64.b64decode(str(item.embedding)), "<f4") for item in reply.data])
    else:
        found = numbers_of(reply)
    assert found == pytest.approx(expected, abs=1e-5)
    assert reply.model == NAME
    single = client.embeddings.create(model=NAME, input=TEXTS[0], encoding_format="float")
    assert numbers_of(single)[0] == pytest.approx(expected[0], abs=1e-5)


def test_tokens_are_counted_and_taken_in_place_of_texts(client: openai.OpenAI, expected: Any) -> None:
    reader = SentenceEncoder()
    reader.load()
    tokens = [reader.preprocess(text)[0].tolist() for text in TEXTS]
    assert [len(row) for row in tokens][1] == 2  # an empty text is [CLS] [SEP]
    reply = client.embeddings.create(model=NAME, input=tokens, encoding_format="float")
    assert numbers_of(reply) == pytest.approx(expected, abs=1e-5)
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, tokens))
    assert client.embeddings.create(model=NAME, input=TEXTS).usage.prompt_tokens == sum(map(len, tokens))
    assert numbers_of(client.embeddings.create(model=NAME, input=tokens[0]))[0] == pytest.approx(expected[0], abs=1e-5)


def test_dimensions_are_the_first_ones_at_length_one(client: openai.OpenAI, expected: Any) -> None:
    found = numbers_of(client.embeddings.create(model=NAME, input=TEXTS, dimensions=64))
    cut = expected[:, :64]
    assert found == pytest.approx(cut / np.linalg.norm(cut, axis=1, keepdims=True), abs=1e-5)


def test_a_list_longer_than_the_queue_is_answered_whole(client: openai.OpenAI, encoder: ModelService) -> None:
    texts = [f"text number {n}" for n in range(3 * encoder.args.batching.max_queue)]
    found = numbers_of(client.embeddings.create(model=NAME, input=texts))
    alone = numbers_of(client.embeddings.create(model=NAME, input=texts[-1]))
    assert found[-1] == pytest.approx(alone[0], abs=1e-5)
    assert encoder.admission.rows == encoder.admission.bytes == 0


def test_the_asynchronous_client(encoder: ModelService, expected: Any) -> None:
    async def ask(port: int) -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused") as client:
            return await asyncio.gather(*(client.embeddings.create(model=NAME, input=text) for text in TEXTS))

    with listen(make_app(encoder)) as port:
        replies = asyncio.run(ask(port))
    assert np.concatenate([numbers_of(reply) for reply in replies]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"input": []}, "input", "none empty"),
        ({"input": [[]]}, "input", "none empty"),
        ({"input": ["a", 1]}, "input", "a list of texts"),
        ({"input": [True]}, "input", "a list of texts"),
        ({"input": None}, "input", "a text"),
        (
            {"input": [1, 2, 10**9]},
            "input",
            "input[0]: input input_ids: 1000000000 is not allowed; use whole numbers from 0, below 30522",
        ),
        ({"input": [[101, 102], [-1]]}, "input", "input[1]: input input_ids: -1 is not allowed"),
        ({"input": [101] * 257}, "input", "257 tokens; 1 to 256 are allowed"),
        ({"input": ["a"] * 2049}, "input", "2049 in one request; at most 2048 are allowed (limits.items)"),
        ({"dimensions": 0}, "dimensions", "not a whole number from 1"),
        ({"dimensions": 385}, "dimensions", "385 is more than the 384"),
        ({"dimensions": True}, "dimensions", "True"),
        ({"encoding_format": "int8"}, "encoding_format", "'int8' is not one of float, base64"),
        ({"model": None}, "model", "not the name of a model"),
        ({"top_k": 3}, "top_k", "top_k: unknown here"),
    ],
)
def test_errors_in_openais_shape(http: TestClient, change: dict[str, Any], param: str | None, message: str) -> None:
    reply = http.post("/v1/embeddings", json={"model": NAME, "input": "a", **change})
    assert reply.status_code == 400
    (error,) = reply.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_other_errors_in_openais_shape(http: TestClient) -> None:
    for content in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"input": "a", "model": NaN}'):
        reply = http.post("/v1/embeddings", content=content)
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    for path, status in (("/v1/chat/completions", 404), ("/v1/models/other", 404)):
        assert "error" in http.get(path).json()
        assert http.get(path).status_code == status
    assert http.get("/v1/embeddings").status_code == 405


def test_a_model_that_makes_no_embeddings_says_so() -> None:
    with (
        serve_locally({"model": "tests.support.servables:Tiny", "pt2": {"compile": {"enable": False}}}) as service,
        TestClient(make_app(service)) as client,
    ):
        reply = client.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
        assert (reply.status_code, reply.json()["error"]["message"]) == (400, "model: tiny makes no embeddings")
