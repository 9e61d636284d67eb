"""The endpoints of a model that generates text: OpenAI's, whole or streamed by server-sent events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments import openai
from deployments.body import read_body
from deployments.completion_replies import ChatReply, CompletionReply, Json, Reply
from deployments.completions import TextRequest, read_chat, read_completion
from deployments.deadline import time_left
from deployments.errors import BadRequest, RequestError
from deployments.generation_service import GenerationService
from deployments.messages import read_json, to_json_bytes, weigh_json, write_answer
from deployments.replies import internal_error


class EventStream(StreamingResponse):
    """A reply of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).

    `held` is let go when it ends, however it does. Not sse-starlette's: importing that changes how uvicorn ends, and
    cuts streams off then, which Ray Serve waits for.
    """

    media_type = "text/event-stream"

    def __init__(self, request: Request, events: AsyncIterator[Json], held: ExitStack) -> None:
        super().__init__(_write(request, events), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; where the caller hangs up it ends at once."""
        # From 2.4 on Starlette learns of that from a failing send alone, so not while a request waits for its slot.
        with self._held:
            await super().__call__({**scope, "asgi": {**scope["asgi"], "spec_version": "2.3"}}, receive, send)


async def _write(request: Request, events: AsyncIterator[Json]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield _event(event)
    except RequestError as error:  # the status has gone out: OpenAI's clients raise what such an event says
        yield _event(openai.error_body(error, error.status))
        return
    except Exception:  # as `guard` has it, for what comes when the status has gone out
        yield _event(openai.error_body(internal_error(request), RequestError.status))
        return
    yield b"data: [DONE]\n\n"


def _event(content: Json) -> bytes:
    return b"data: " + to_json_bytes(content) + b"\n\n"


def _read(read: Callable[[Any], TextRequest], body: bytes | memoryview) -> TextRequest:
    try:
        return read(read_json(body))
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply") from error


async def complete(service: GenerationService, request: Request) -> Response:
    """Answer POST /v1/completions."""
    return await _answer(service, request, read_completion, CompletionReply)


async def chat(service: GenerationService, request: Request) -> Response:
    """Answer POST /v1/chat/completions."""
    return await _answer(service, request, read_chat, ChatReply)


async def _answer(
    service: GenerationService, request: Request, read: Callable[[Any], TextRequest], make_reply: type[Reply]
) -> Response:
    started = time.monotonic()
    with ExitStack() as stack:
        held = stack.enter_context(service.admission.hold_bytes())
        body = await read_body(request, service.limits, held)
        held.grow_to(weigh_json(body))
        wanted = await service.aside(len(body), _read, read, body)
        if wanted.model is None:
            raise BadRequest("model: the name of a model is needed")
        service.check_model(wanted.model)
        deadline = service.deadline(time_left(request, started))
        answers = stack.enter_context(await service.start(wanted))
        reply = make_reply(service, wanted)
        if wanted.stream:
            return EventStream(request, reply.events(answers, deadline), stack.pop_all())
        content = write_answer(await reply.whole(answers, deadline))
    return Response(content, media_type="application/json")
