"""Bodies that are packed, too large, or slow, as a replica's own server meets them."""

from __future__ import annotations

import gzip
import json
import socket
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from deployments.body import pack, unpack
from deployments.errors import BadRequest, BodyTooLarge
from deployments.http import make_app
from deployments.service import ModelService
from tests.support.http_server import listen
from tests.support.local import serve_locally

ROW = json.dumps([0.5, -1, 2, 0, 1, 3, -2, 0.25]).encode()
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def service() -> Iterator[ModelService]:
    args = {
        "model": "tests.support.servables:Tiny",
        "pt2": {"compile": {"enable": False}},
        "limits": {"body_bytes": 4000, "body_s": 1},
    }
    with serve_locally(args) as found:
        yield found


@given(st.binary(max_size=2000), st.sampled_from(["gzip", "deflate"]))
def test_what_is_packed_is_unpacked(content: bytes, coding: str) -> None:
    assert unpack(pack(content, coding), coding, 2000) == content
    assert unpack({"gzip": gzip, "deflate": zlib}[coding].compress(content), coding, 2000) == content


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate"]))
def test_anything_else_is_a_bad_request(content: bytes, coding: str) -> None:
    with pytest.raises(BadRequest):
        unpack(b"\0" + content, coding, 1000)


def test_gzip_of_several_members_is_one_body() -> None:
    assert unpack(gzip.compress(b"a") + gzip.compress(b"b"), "gzip", 2) == b"ab"
    with pytest.raises(BadRequest, match="follow its end"):
        unpack(zlib.compress(b"a") + zlib.compress(b"b"), "deflate", 2)
    assert unpack(gzip.compress(b"a") * 100, "gzip", 100) == b"a" * 100
    with pytest.raises(BadRequest, match="follow its end"):  # each member costs a copy of what follows it
        unpack(gzip.compress(b"") * 101, "gzip", 100)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_the_limit_holds_for_what_is_unpacked(coding: str) -> None:
    assert len(unpack(pack(b"\0" * 1000, coding), coding, 1000)) == 1000
    with pytest.raises(BodyTooLarge, match="over the limit of 999 bytes when it is unpacked"):
        unpack(pack(b"\0" * 1000, coding), coding, 999)
    bomb = pack(b"\0" * 50_000_000, coding)
    with pytest.raises(BodyTooLarge):
        unpack(bomb, coding, len(bomb))
    with pytest.raises(BodyTooLarge):  # one that lies in its second member
        unpack(gzip.compress(b"x" * 900) + gzip.compress(b"x" * 900), "gzip", 1000)


def test_packed_bodies_over_http(service: ModelService) -> None:
    with TestClient(make_app(service)) as client:
        path = "/predictions/tiny"
        assert client.post(path, content=gzip.compress(ROW), headers={**JSON, "content-encoding": "gzip"}).is_success
        reply = client.post(path, content=gzip.compress(b" " * 4001), headers={**JSON, "content-encoding": "gzip"})
        assert (reply.status_code, reply.json()["type"]) == (413, "RequestEntityTooLargeException")
        reply = client.post(path, content=ROW, headers={**JSON, "content-encoding": "gzip"})
        assert (reply.status_code, reply.json()["message"].startswith("the body is not gzip")) == (400, True)
        reply = client.post(path, content=ROW, headers={**JSON, "content-encoding": "br"})
        assert (reply.status_code, reply.json()["code"]) == (415, 415)
        assert reply.headers["accept-encoding"] == "gzip, deflate"
    assert service.admission.bytes == 0


def test_a_slow_sender_is_cut_off_and_costs_nobody_else(service: ModelService) -> None:
    head = b"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    with listen(make_app(service)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
            slow.sendall(head + b"[")
            answer = b""
            while chunk := slow.recv(4096):  # ends, since the server closes the connection
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"limits.body_s" in answer
        with socket.create_connection(("127.0.0.1", port), timeout=30) as good:
            good.sendall(head.replace(b"99", str(len(ROW)).encode()) + ROW)
            assert good.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert service.admission.bytes == 0
