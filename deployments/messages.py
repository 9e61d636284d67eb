"""JSON as bodies carry it."""

from __future__ import annotations

import json
from typing import Any

from deployments.errors import BadRequest


#: Made once: json.dumps makes one for every call that asks for anything but its defaults.
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def to_json_bytes(content: Any) -> bytes:
    """Return compact JSON in UTF-8; ValueError where there is NaN or infinity, which JSON does not have."""
    text = _ENCODER.encode(content)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from a request that had one: only escapes can carry it
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def read_json(body: bytes | memoryview, *, with_nan: bool = False) -> Any:
    """Return what a body's JSON holds; BadRequest where it is none, or (unless `with_nan`) has NaN or infinity."""
    try:
        return json.loads(bytes(body), parse_constant=None if with_nan else _refuse)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")
