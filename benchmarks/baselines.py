"""What people run without us, for comparison: Ray Serve with `@serve.batch` as documented, and no batching at all.

With the servables of this package for pre- and postprocessing, so that the difference is serving and compiling.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from ray import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deployments.servable import Servable
from deployments.text import SentenceEncoder
from deployments.vision import ImageClassifier

SERVABLES: dict[str, type[Servable]] = {"photos": ImageClassifier, "texts": SentenceEncoder}


class Eager:
    """A servable's model, eager or with torch.compile, on lists of bodies; texts are padded to the longest."""

    def __init__(self, workload: str, threads: int, *, compiled: bool = False) -> None:
        torch.set_num_threads(threads)
        self._servable = SERVABLES[workload]()
        self._model = self._servable.load().eval()
        if compiled:
            self._model.compile()

    def __call__(self, bodies: Sequence[bytes]) -> list[Any]:
        """Answer every body."""
        rows = [self._servable.preprocess(body) for body in bodies]
        columns = zip(*rows, strict=True)
        with torch.no_grad():
            output = self._model(*(torch.nn.utils.rnn.pad_sequence(list(c), batch_first=True) for c in columns))
        return [self._servable.postprocess(row) for row in output]


@serve.deployment(max_ongoing_requests=128)
class PlainRayServe:
    """`@serve.batch` as Ray's documentation shows it."""

    def __init__(self, workload: str, threads: int) -> None:
        self._answer = Eager(workload, threads)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.005)
    async def _run(self, bodies: list[bytes]) -> list[Any]:
        return self._answer(bodies)

    async def __call__(self, request: Request) -> Any:
        """Answer one request."""
        return await self._run(await request.body())


def plain_ray_serve(args: dict[str, Any]) -> serve.Application:
    """Build the application for `serve run`."""
    app: serve.Application = PlainRayServe.bind(args["workload"], args["threads"])  # type: ignore[attr-defined]
    return app


def unbatched(workload: str, threads: int) -> Starlette:
    """Return an application that runs each request by itself, as a FastAPI tutorial would."""
    answer = Eager(workload, threads)

    async def predict(request: Request) -> Response:
        return JSONResponse(answer([await request.body()])[0])

    return Starlette(routes=[Route("/", predict, methods=["POST"])])


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=SERVABLES)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(unbatched(options.workload, options.threads), port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
