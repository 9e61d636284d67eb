"""Requests that nobody should send, for every path: `python -m tests.support.fuzz URL [COUNT]` asks a running server.

Each is made from its number, so a failure can be asked for again. What may come back is an answer or an error in the
protocol's own shape; of the server's own errors 503 alone.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
import socket
import struct
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

LENGTH = "Inference-Header-Content-Length"
#: Status codes that a malformed request may get; 200 where what was wrong does not matter.
ALLOWED = {200, 400, 404, 405, 408, 411, 413, 415, 431, 501, 503}
_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, -0.5, 1e308, "", "x", "\ud800", "\0", [], [[]], {}, [1], ["a"],
    {"a": {}}, [None], [[1], [2, 3]], [[[[[1]]]]], "é" * 300,
]  # fmt: skip
_KINDS = ["FP32", "FP16", "BF16", "INT64", "UINT8", "BOOL", "BYTES", "FP33", "", None, 5]


@dataclass
class Request:
    """A method, a path, headers and a body."""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def make_request(number: int, model: str, inputs: list[dict[str, Any]]) -> Request:
    """Return the malformed request of this number, for a model with inputs as its metadata describe them."""
    r = random.Random(number)
    path = r.choice(
        [
            f"/predictions/{model}",
            f"/v2/models/{model}/infer",
            f"/v2/models/{model}/infer",
            f"/v2/models/{model}/versions/1/infer",
            "/v1/embeddings",
            f"/v2/models/{r.choice(['', '..', '%00', 'x' * 3000, '%ff', model + '%2f'])}",
            r.choice(
                ["/", "//", "/v1", "/v2/", "/v2/health/ready", "/models/%2e%2e", "/\u00ff".encode().decode("latin-1")]
            ),
        ]
    )
    body = _make_body(r, path, inputs)
    headers = {}
    if r.random() < 0.5:
        headers["Content-Type"] = r.choice(
            [
                "application/json",
                "text/plain",
                "multipart/form-data",
                "multipart/form-data; boundary=x",
                "application/x-www-form-urlencoded",
                "a/b",
                "\xff",
            ]
        )
    if "infer" in path and r.random() < 0.6:
        headers[LENGTH] = r.choice([str(r.randrange(len(body) + 2)), "0", "-1", "x", "9" * 25, " 5", "1e3"])
    if r.random() < 0.2:
        coding = r.choice(["gzip", "deflate", "br", "gzip, gzip", "x"])
        headers["Content-Encoding"] = coding
        body = r.choice([body, gzip.compress(body), zlib.compress(body), gzip.compress(body)[:-5], _BOMB])
    if r.random() < 0.1:
        headers["x-request-timeout-seconds"] = r.choice(["nan", "-1", "0", "inf", "1e-9", "x", "5"])
    if r.random() < 0.05:
        headers["x-request-id"] = r.choice(["i", "\xff", "é"]) * r.choice([1, 100, 3000])
    if r.random() < 0.02:
        headers[r.choice(["x-request-disconnect-disabled", "x-session-id", "serve_multiplexed_model_id"])] = "\xff"
    return Request(r.choice(["POST"] * 16 + ["PUT", "GET", "DELETE", "PATCH"]), path, body, headers)


_BOMB = gzip.compress(b"\0" * 40_000_000, 9)


def _make_body(r: random.Random, path: str, inputs: list[dict[str, Any]]) -> bytes:
    kind = r.random()
    if kind < 0.1:
        return r.randbytes(r.choice([0, 1, 7, 100, 5000]))
    if kind < 0.15:
        return r.choice([b"[", b'{"a":']) * r.choice([10, 2000, 100_000])
    if kind < 0.2:
        return r.choice(
            [b"{", b"[1,]", b'"\xff"', b"NaN", b"1e999", b"\xef\xbb\xbf{}", b'{"inputs": [', b"null", b"{}"]
        )
    if "predictions" in path and kind < 0.5:  # a row that is nearly one, a text, a form
        odd = r.choice(["NaN", "1e999", "-Infinity", "1" + "0" * 400, "1e308", '"x"', "null", "true", "[]", "{}"])
        row = f"[{odd}{',0.5' * r.choice([0, 7, 8, 100])}]"
        return r.choice(
            [row, f'{{"text": {odd}}}', f'{{"data": {odd}}}', f"data={odd}", f'"{"QUJD" * 9}"', "[" * 3 + odd]
        ).encode()
    if "embeddings" in path:
        message: Any = {
            "model": r.choice(["sentence-encoder", "x", None]),
            "input": copy.deepcopy(r.choice([*_VALUES, ["a"] * 9])),
        }
    else:
        message = {"inputs": [_make_tensor(r, given) for given in inputs]}
    for _ in range(r.randrange(3)):
        _spoil(r, message)
    text = json.dumps(message).encode()
    raw = r.choice([b"", struct.pack("<I", r.choice([0, 1, 2**32 - 1])) + b"a", r.randbytes(r.choice([3, 64, 6144]))])
    return text[: r.randrange(len(text) + 1)] if kind < 0.3 else text + raw


def _make_tensor(r: random.Random, given: dict[str, Any]) -> dict[str, Any]:
    shape = [r.choice([1, 2, 0, 3]) if size == -1 else size for size in given["shape"]]
    count = 1
    for size in shape:
        count *= size
    tensor = {"name": given["name"], "datatype": r.choice([given["datatype"], *_KINDS]), "shape": shape}
    if r.random() < 0.2:
        tensor["name"] = "payload"
    if r.random() < 0.5:
        tensor["data"] = [r.choice([0, 1, 0.5, -1, 10**9, 10**20])] * min(count, 3000)
    else:
        tensor["parameters"] = {"binary_data_size": copy.deepcopy(r.choice([*_VALUES, 5, 64, 6144]))}
    return tensor


def _spoil(r: random.Random, message: Any) -> None:
    """Put a value that does not belong there somewhere into a message, or take one away."""
    while isinstance(message, dict | list) and message:
        key = r.choice(list(message)) if isinstance(message, dict) else r.randrange(len(message))
        if isinstance(message[key], dict | list) and message[key] and r.random() < 0.7:
            message = message[key]
        elif r.random() < 0.2:
            del message[key]
            return
        else:
            message[key] = copy.deepcopy(r.choice(_VALUES))
            return


class Client:
    """One connection, made anew where the server has closed it; it sends what no library would."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._socket: socket.socket | None = None
        self._rest = b""

    def ask(self, request: Request, prefix: str = "") -> tuple[int, bytes]:
        """Return status and body."""
        headers = {"Host": "x", "Content-Length": str(len(request.body)), **request.headers}
        lines = [
            f"{request.method} {prefix}{request.path} HTTP/1.1",
            *(f"{k}: {v}" for k, v in headers.items()),
            "",
            "",
        ]
        message = "\r\n".join(lines).encode("latin-1") + request.body
        for attempt in (0, 1):
            try:
                if self._socket is None:
                    self._socket, self._rest = socket.create_connection(self._address, timeout=60), b""
                self._socket.sendall(message)
                return self._read()
            except (ConnectionError, EOFError):
                self.close()
                if attempt:
                    raise
        raise AssertionError

    def _read(self) -> tuple[int, bytes]:
        while b"\r\n\r\n" not in self._rest:
            self._more()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        body = b""
        if headers.get("transfer-encoding", "") == "chunked":
            while (size := int(self._take_line(), 16)) > 0:
                body += self._take(size + 2)[:-2]
            self._take_line()
        else:
            body = self._take(int(headers.get("content-length", 0)))
        if headers.get("connection", "").lower() == "close":
            self.close()
        return int(lines[0].split()[1]), body

    def _take(self, size: int) -> bytes:
        while len(self._rest) < size:
            self._more()
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def _take_line(self) -> bytes:
        while b"\r\n" not in self._rest:
            self._more()
        line, _, self._rest = self._rest.partition(b"\r\n")
        return line

    def _more(self) -> None:
        assert self._socket is not None
        chunk = self._socket.recv(65536)
        if not chunk:
            raise EOFError
        self._rest += chunk

    def close(self) -> None:
        """Give the connection up."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None


def main(url: str, count: int = 100_000, start: int = 0) -> int:
    """Ask a server; print how often each status came, and every answer that may not be; return how many those are."""
    parts = urlsplit(url)
    client = Client(parts.hostname or "127.0.0.1", parts.port or 80)
    prefix = parts.path.rstrip("/")
    status, body = client.ask(Request("GET", "/models"), prefix)
    assert status == 200, body
    model = json.loads(body)["models"][0]["modelName"]
    inputs = json.loads(client.ask(Request("GET", f"/v2/models/{model}"), prefix)[1])["inputs"]
    found: Counter[int] = Counter()
    wrong = 0
    for number in range(start, start + count):
        request = make_request(number, model, inputs)
        status, body = client.ask(request, prefix)
        found[status] += 1
        if status not in ALLOWED:
            wrong += 1
            print(number, status, request.method, request.path[:80], body[:300], flush=True)
        if number % 10_000 == 9_999:
            print(number + 1, dict(found), flush=True)
    client.close()
    print(dict(found), f"{wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1], *map(int, sys.argv[2:]))))
