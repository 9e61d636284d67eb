"""The endpoints of a model that generates text: OpenAI's, whole or streamed by server-sent events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from deployments.body import read_body
from deployments.completion_replies import ChatReply, CompletionReply, Json, Reply
from deployments.completions import TextRequest, read_chat, read_completion
from deployments.deadline import time_left
from deployments.errors import BadRequest
from deployments.event_stream import EventStream, write_event
from deployments.generation_service import GenerationService
from deployments.messages import read_json, weigh_json, write_answer


async def _write(events: AsyncIterator[Json]) -> AsyncIterator[bytes]:
    async for event in events:
        yield write_event(event)
    yield b"data: [DONE]\n\n"


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
            return EventStream(request, _write(reply.events(answers, deadline)), stack.pop_all())
        content = write_answer(await reply.whole(answers, deadline))
    return Response(content, media_type="application/json")
