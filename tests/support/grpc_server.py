"""The gRPC calls of a model on a port of this machine, without Ray: its context, and what it does around a call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import grpc
from ray.serve.grpc_util import RayServegRPCContext

from deployments.grpc import add_inference_service
from deployments.grpc_calls import InferenceServicer
from deployments.inference_messages import CALLS
from deployments.keys import Keys
from deployments.service import ModelService


class _Servicer:
    """Calls as Ray Serve does: its own context goes in, and what was set on it goes out."""

    def __init__(self, ours: InferenceServicer) -> None:
        for call in CALLS:
            setattr(self, call, self._wrap(getattr(ours, call)))

    @staticmethod
    def _wrap(call: Any) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            ray_context = RayServegRPCContext(context)
            reply = await call(request, grpc_context=ray_context)
            ray_context._set_on_grpc_context(context)
            return reply

        return answer


@contextmanager
def listen_grpc(service: ModelService, keys: Keys) -> Iterator[int]:
    """Answer for a model on a thread; yield the port."""
    servicer = InferenceServicer()
    servicer._service, servicer._keys = service, keys
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        server = grpc.aio.server()
        add_inference_service(_Servicer(servicer), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stop = asyncio.Event()
        started.set_result((port, asyncio.get_running_loop(), stop))
        await stop.wait()
        await server.stop(None)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="grpc-server")
    thread.start()
    port, loop, stop = started.result()
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
