"""CPU time of a binary infer request beside an echo of the same body: python -m benchmarks.binary.

One process serves both with uvicorn: Starlette alone, which reads the body and sends it back, and a model that does
next to nothing, asked for 3 x 224 x 224 floats in binary form and in JSON. The client is another process; counted is
the CPU time of the serving one, in turns. Without Ray, so that its housekeeping is in neither figure.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from torch import nn

from benchmarks.machine import describe_machine
from deployments.http import make_app
from deployments.oip import HEADER_LENGTH
from deployments.servable import Servable
from optim.shapes import Inputs
from tests.support.http_server import listen
from tests.support.local import serve_locally

SHAPE = (1, 3, 224, 224)


class _First(nn.Module):
    """[B, 3, 224, 224] -> [B, 1]."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image[:, 0, 0, :1].clone()


class FirstPixel(Servable):
    """Answers a figure of the tensor that was sent."""

    input_names = ("image",)

    def load(self) -> nn.Module:
        """Return a module that does next to nothing."""
        return _First().eval()

    def example(self, batch_size: int, length: int | None) -> Inputs:
        """Return ones. [B, 3, 224, 224]."""
        return (torch.ones(batch_size, *SHAPE[1:]),)


async def _echo(request: Request) -> Response:
    return Response(await request.body(), media_type="application/octet-stream")


def _serve(pipe: Connection) -> None:
    """Serve both; say the ports, then answer every question with the CPU seconds that were used so far."""
    args = {"model": "benchmarks.binary:FirstPixel", "name": "first", "pt2": {"compile": {"enable": False}}}
    echo = Starlette(routes=[Route("/", _echo, methods=["POST"])])
    with serve_locally(args) as service, listen(echo) as echo_port, listen(make_app(service)) as port:
        pipe.send((echo_port, port))
        while pipe.recv():
            pipe.send(time.process_time())


def _bodies() -> dict[str, tuple[str, bytes, dict[str, str]]]:
    """Return path, body and headers of each kind of request."""
    pixels = np.random.default_rng(0).random(SHAPE, dtype=np.float32)
    tensor: dict[str, Any] = {"name": "image", "shape": list(SHAPE), "datatype": "FP32"}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": pixels.nbytes}}]}).encode()
    binary = head + pixels.tobytes()
    as_json = json.dumps({"inputs": [{**tensor, "data": pixels.reshape(-1).tolist()}]}).encode()
    infer = "/v2/models/first/infer"
    return {
        "echo by Starlette": ("/", binary, {}),
        "infer, binary": (infer, binary, {HEADER_LENGTH: str(len(head))}),
        "infer, JSON": (infer, as_json, {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    ports = dict(zip((True, False), ours.recv(), strict=True))
    found: dict[str, list[float]] = {}
    for turn in range(options.rounds + 1):  # the first warms up
        for name, (path, body, headers) in _bodies().items():
            count = options.requests if "JSON" not in name else max(1, options.requests // 10)
            connection = http.client.HTTPConnection("127.0.0.1", ports[path == "/"])
            ours.send(True)
            before = ours.recv()
            for _ in range(count):
                connection.request("POST", path, body, headers)
                reply = connection.getresponse()
                if reply.status != 200 or not reply.read():
                    raise RuntimeError(f"{name}: {reply.status}")
            ours.send(True)
            if turn:
                found.setdefault(name, []).append((ours.recv() - before) / count * 1e3)
            else:
                ours.recv()
            connection.close()
    ours.send(False)
    process.join()
    print(f"{describe_machine()}\n\n| request | CPU ms, median of {options.rounds} | least, most | over the echo |")
    print("|---|---|---|---|")
    echo = statistics.median(found["echo by Starlette"])
    for name, taken in found.items():
        median = statistics.median(taken)
        print(f"| {name} | {median:.2f} | {min(taken):.2f}, {max(taken):.2f} | {median - echo:.2f} |")


if __name__ == "__main__":
    main()
