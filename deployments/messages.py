"""JSON as bodies carry it: by msgspec, which takes an eighth of the standard library's time and less, else by that.

What the two read is the same, and so is what they write but for the form of a few figures (1e-05 is 0.00001). Both
write what msgspec knows beyond JSON's own, such as dates, sets and dataclasses.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from itertools import islice
from typing import Any

import msgspec

from deployments.errors import BadRequest

_MOST_CONTAINERS = 500_000
#: Quotes of a body whose strings are looked for: each takes 80 bytes meanwhile, and nothing else runs.
_MOST_QUOTES = 1_000_000
#: A string of JSON; one without an end goes to the end, else each of its escaped quotes would be looked at as a start.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
#: A figure beyond 1e288 takes msgspec 10 us, 17 times what it takes the standard library: 16 MB of them, half a minute.
#: With more exponents than this, which text has too, a body is searched for such ones.
_MOST_EXPONENTS = 10_000
_LARGE_EXPONENT = re.compile(rb"[eE][+-]?0*[23][0-9]{2}")
_HOW_TO_WRITE: dict[str, Any] = {"allow_nan": False, "separators": (",", ":"), "default": msgspec.to_builtins}
#: Made once: json.dumps makes one for every call that asks for anything but its defaults.
_ENCODER = json.JSONEncoder(ensure_ascii=False, **_HOW_TO_WRITE)
_FAST_ENCODER = msgspec.json.Encoder()
_FAST_DECODER = msgspec.json.Decoder()


def to_json_bytes(content: Any) -> bytes:
    """Return compact JSON in UTF-8; ValueError where there is NaN or infinity, which JSON does not have."""
    try:
        body = _FAST_ENCODER.encode(content)
    except (TypeError, ValueError, RecursionError):  # the other one takes more (NumPy's float64), or says why not
        return _write_slowly(content)
    return _write_slowly(content) if b"null" in body else body  # which msgspec makes of NaN too


def _write_slowly(content: Any) -> bytes:
    # Keys, too, are then as msgspec writes them. What is beyond that the other one takes, or says why not.
    with suppress(TypeError, ValueError, RecursionError):
        content = msgspec.to_builtins(content, str_keys=True)
    text = _ENCODER.encode(content)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from a request that had one: only escapes can carry it
        return json.dumps(content, **_HOW_TO_WRITE).encode()


def write_answer(answer: Any) -> bytes:
    """Return a model's answer in JSON; BadRequest where it has NaN or infinity, as models give for some inputs."""
    try:
        return to_json_bytes(answer)
    except ValueError as error:
        raise BadRequest("the answer to this has NaN or infinity, which JSON cannot carry") from error


def weigh_json(body: bytes | memoryview) -> int:
    """Return the bytes that a JSON body and what it becomes take, at most: a number of Python's takes 32, a list 88."""
    text = bytes(body)
    return len(text) + 32 * text.count(b",") + 88 * _count_containers(text)


def read_json(body: bytes | memoryview, *, with_nan: bool = False) -> Any:
    """Return what a body's JSON holds; BadRequest where it is none, or (unless `with_nan`) has NaN or infinity.

    And where it has more lists and objects than any request needs: 16 MB of `[1],` took 3 s.
    """
    text = bytes(body)
    if _has_too_many_containers(text):
        raise BadRequest(f"the body has more than {_MOST_CONTAINERS} lists and objects")
    if not _takes_long(text):
        try:
            return _FAST_DECODER.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pass  # the other one takes more, such as a byte order mark, or says why not as people know it
    try:
        # Not as json.loads reads bytes, which may be UTF-16: strings are told from lists above by the bytes of UTF-8.
        return json.loads(text.decode("utf-8-sig"), parse_constant=None if with_nan else _refuse)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error


def _takes_long(text: bytes) -> bool:
    """Say whether a body has so many figures beyond what msgspec reads fast."""
    if text.count(b"e") + text.count(b"E") <= _MOST_EXPONENTS:
        return False
    return next(islice(_LARGE_EXPONENT.finditer(text), _MOST_EXPONENTS, None), None) is not None


def _has_too_many_containers(text: bytes) -> bool:
    if _count_containers(text) <= _MOST_CONTAINERS:
        return False
    return text.count(b'"') > _MOST_QUOTES or _count_containers(_STRING.sub(b"", text)) > _MOST_CONTAINERS


def _count_containers(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def is_whole(value: Any) -> bool:
    """Say whether JSON has a whole number there; Python takes true and false for numbers too."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_texts(key: str, given: Any) -> list[Any]:
    """Return the list of texts, or of lists of token ids, that a field is short for; BadRequest names it."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(isinstance(item, str) for item in given):
            return given
        if all(map(is_whole, given)):
            return [given]
        if all(isinstance(item, list) and item and all(map(is_whole, item)) for item in given):
            return given
    raise BadRequest(f"{key}: a text, a list of texts, a list of token ids, or a list of those is needed, none empty")
