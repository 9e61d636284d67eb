"""What TorchServe's clients send, and what they read of a model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote_plus

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from deployments.errors import BadRequest
from deployments.http import make_app
from deployments.service import ModelService
from deployments.torchserve import decode_payload, model_description
from tests.support.local import serve_locally

FORM = "application/x-www-form-urlencoded"
#: No text in any charset that would be guessed, with line breaks of every kind.
PHOTO = bytes(range(256)) + b"\r\n\n\r--"
ROW = [0.5, -1, 2, 0, 1, 3, -2, 0.25]


def decode(body: bytes, content_type: str) -> Any:
    """What the servable gets of a body."""
    return decode_payload(content_type, body)


def decode_sent(**sent: Any) -> Any:
    """What the servable gets of what a client was told to send."""
    request = httpx2.Request("POST", "http://127.0.0.1", **sent)
    return decode(request.read(), request.headers["content-type"])


def test_the_field_of_a_form_is_the_payload() -> None:
    assert decode_sent(data={"data": "what a fine day, 5 % more & größer = better"}) == (
        "what a fine day, 5 % more & größer = better"
    )
    assert decode_sent(data={"top": "3", "body": "a+b"}) == "a+b"
    assert decode_sent(data={"body": "one", "data": "two"}) == "two"
    assert decode(b"data=" + quote_plus(PHOTO).encode(), FORM) == PHOTO  # curl --data-urlencode data@cat.jpg
    assert decode(b"data=not escaped", FORM + "; charset=utf-8") == "not escaped"
    assert decode(b"data=", FORM) == ""


@given(st.binary(), st.booleans())
def test_escapes_stand_for_every_byte(content: bytes, lower: bool) -> None:
    sent = quote_plus(content).encode()
    if lower:
        sent = re.sub(rb"%..", lambda escape: escape[0].lower(), sent)
    found = decode(b"x=1&data=" + sent, FORM)
    assert (found.encode() if isinstance(found, str) else found) == content


@pytest.mark.parametrize(
    "body",
    [
        b"what a fine day",
        b"",
        b"data",
        b"100 % = all & data=5",
        b'{"url": "http://example.org/?a=1&data=2"}',
        b"http://example.org/?a=1&data=2",
        b"data=R&D",
        b"data=100 %",
        b"text=other fields",
        PHOTO,
        PHOTO + b"&data=5",
        b"&".join([b"a=1"] * 16 + [b"data=5"]),
        b"&" * 1_000_000,
    ],
)
def test_what_is_no_form_stays_as_it_is(body: bytes) -> None:
    assert decode(body, FORM) == body


@pytest.mark.parametrize("content", [PHOTO, b"what a fine day", "größer".encode(), b"", PHOTO * 8000])
@pytest.mark.parametrize("name", ["data", "body"])
def test_a_part_without_a_file_name_is_text_where_it_is_any(name: str, content: bytes) -> None:
    is_photo = content.startswith(PHOTO)
    assert decode_sent(files={name: (None, content)}) == (content if is_photo else content.decode())
    assert decode_sent(files={name: ("cat.jpg", content, "image/jpeg")}) == content


def test_other_parts_and_odd_names_do_no_harm() -> None:
    parts = {"größe": (None, PHOTO), "data": ("Kätzchen \u732b.jpg", PHOTO), "body": (None, b"5")}
    assert decode_sent(files=parts) == PHOTO
    with pytest.raises(BadRequest, match="data or body; it has größe"):
        decode_sent(files={"größe": (None, b"x")})


def test_a_part_is_what_its_own_type_says() -> None:
    row = json.dumps(ROW).encode()
    for name in (None, "row.json"):
        assert decode_sent(files={"data": (name, row, "application/json")}) == ROW
        assert decode_sent(files={"data": (name, row, "Text/Plain; charset=utf-8")}) == row.decode()
        assert decode_sent(files={"data": (name, row, "application/octet-stream")}) == row
        with pytest.raises(BadRequest, match="not UTF-8"):
            decode_sent(files={"data": (name, PHOTO, "text/plain")})


HEAD = b'--x\r\nContent-Disposition: form-data; name="data"\r\n\r\n'


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (HEAD + b"1\r\n--x--", "multipart/form-data", "no boundary"),
        (HEAD + b"1\r\n--x--", "multipart/form-data; boundary=" + "x" * 300, "cannot be read"),
        (b"no form", "multipart/form-data; boundary=x", "cannot be read"),
        (HEAD + b"1\r\n--x--", 'multipart/form-data; boundary=x; y="' + ";" * 1000 + '"', "Content-Type has 1037"),
        (b"", "multipart/form-data; boundary=x", "it has none"),
        (HEAD + b"cut off", "multipart/form-data; boundary=x", "it has none"),
        (b"--x\r\nContent-Type: text/plain\r\n\r\n1\r\n--x--", "multipart/form-data; boundary=x", "has no name"),
        ((HEAD + b"1\r\n") * 17 + b"--x--", "multipart/form-data; boundary=x", "more than 16 parts"),
    ],
)
def test_a_broken_form_is_a_bad_request(body: bytes, content_type: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        decode(body, content_type)


@pytest.fixture(scope="module")
def service() -> Iterator[ModelService]:
    args = {
        "model": "tests.support.servables:Tiny",
        "pt2": {"compile": {"enable": False}},
        "batching": {"wait_ms": 0.5},
    }
    with serve_locally(args) as service:
        yield service


def test_a_replica_takes_parts_up_to_its_own_limit(service: ModelService) -> None:
    padded = json.dumps(ROW).encode() + b" " * 2_000_000
    with TestClient(make_app(service)) as client:
        reply = client.post("/predictions/tiny", files={"data": (None, padded, "application/json")})
    assert reply.status_code == 200, reply.text


def test_a_model_has_the_worker_that_answers(service: ModelService, monkeypatch: pytest.MonkeyPatch) -> None:
    with TestClient(make_app(service)) as client:
        (worker,) = client.get("/models/tiny").json()[0]["workers"]
    assert set(worker) == {"id", "startTime", "status", "gpu", "pid", "memoryUsage"}
    assert (worker["status"], worker["gpu"], worker["pid"]) == ("READY", False, os.getpid())
    assert isinstance(worker["id"], str)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", worker["startTime"])
    assert 50_000_000 < worker["memoryUsage"] < 100_000_000_000
    monkeypatch.setattr(service, "failure", lambda: "CUDA error: device-side assert triggered")
    monkeypatch.setattr(service, "report", lambda: {"device": {"device": "cuda:0"}})
    (worker,) = model_description(service)[0]["workers"]
    assert (worker["status"], worker["gpu"]) == ("UNLOADED", True)


def test_times_are_whole_numbers(service: ModelService, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = model_description(service)
    assert (found["maxBatchDelay"], found["responseTimeout"]) == (1, None)
    assert type(found["maxBatchDelay"]) is int
    for seconds, whole in ((1.2, 2), (30.0, 30), (float("inf"), None)):
        monkeypatch.setattr(service, "limits", type(service.limits)(timeout_s=seconds))
        assert model_description(service)[0]["responseTimeout"] == whole
