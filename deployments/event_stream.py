"""`EventStream`: a reply of server-sent events, with errors as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments import openai
from deployments.errors import RequestError
from deployments.messages import to_json_bytes
from deployments.replies import internal_error

#: What Python takes for the end of a line (str.splitlines), as httpx does where it reads lines, beside what SSE does.
_LINE_ENDS = {character.encode(): b"\\u%04x" % ord(character) for character in "\x85\u2028\u2029"}


class EventStream(StreamingResponse):
    """A reply of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).

    `held` is let go when it ends, however it does. Not sse-starlette's: importing that changes how uvicorn ends, and
    cuts streams off then, which Ray Serve waits for.
    """

    media_type = "text/event-stream"

    def __init__(self, request: Request, events: AsyncIterator[bytes], held: ExitStack) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_tell_errors(request, events), headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; where the caller hangs up it ends at once."""
        # From 2.4 on Starlette learns of that from a failing send alone, so not while a request waits for its slot.
        with self._held:
            await super().__call__({**scope, "asgi": {**scope["asgi"], "spec_version": "2.3"}}, receive, send)


def write_event(content: Any) -> bytes:
    """Return an event with its content in JSON."""
    text = to_json_bytes(content)
    for character, escaped in _LINE_ENDS.items():
        text = text.replace(character, escaped)
    return b"data: " + text + b"\n\n"


async def _tell_errors(request: Request, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the events; the status has gone out, so that an error is the last: OpenAI's clients raise what it says."""
    try:
        async for event in events:
            yield event
    except RequestError as error:
        yield write_event(openai.error_body(error, error.status))
    except Exception:  # as `guard` has it
        yield write_event(openai.error_body(internal_error(request), RequestError.status))
