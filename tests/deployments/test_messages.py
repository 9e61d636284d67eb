"""JSON is read and written as the standard library does it, whatever is faster."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import date
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.errors import BadRequest
from deployments.messages import read_json, to_json_bytes

NUMBERS = st.one_of(
    st.integers(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), st.booleans()
)
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(st.characters(exclude_categories=()), max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=20,
)
DAMAGE = [*(bytes([byte]) for byte in b'"\\[]{},:.-+eE019nu \x00\xff'), b"NaN", b"1e999", b"0" * 20]
SPACE = st.sampled_from(["", " ", "\n", "\t\r "])


def know(body: bytes) -> Any:
    """Return what the standard library reads; ValueError or RecursionError where that is nothing."""
    return json.loads(body.decode("utf-8-sig"))


def same(one: Any, other: Any) -> bool:
    """Say whether two values are the same, types and signs of zero included."""
    return repr(one) == repr(other)


@given(VALUES, SPACE, st.booleans())
def test_what_python_writes_is_read(value: Any, space: str, ascii_only: bool) -> None:
    text = space + json.dumps(value, ensure_ascii=ascii_only, separators=("," + space, space + ":")) + space
    try:
        body = text.encode()
    except UnicodeEncodeError:
        body = json.dumps(value).encode()
    assert same(read_json(body), value)


@given(VALUES, st.data())
def test_a_damaged_body_is_read_as_the_standard_library_reads_it(value: Any, data: st.DataObject) -> None:
    body = bytearray(json.dumps(value).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body)))
        body[at : at + data.draw(st.integers(0, 1))] = data.draw(st.sampled_from(DAMAGE))
    damaged = bytes(body)
    try:
        want = know(damaged)
    except (ValueError, RecursionError):
        with pytest.raises(BadRequest, match="the body is not JSON"):
            read_json(damaged, with_nan=True)
    else:
        assert same(read_json(damaged, with_nan=True), want)


@given(VALUES)
def test_what_is_written_is_what_it_was(value: Any) -> None:
    assert same(know(to_json_bytes(value)), value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_what_json_does_not_have_is_refused_wherever_it_stands(value: float) -> None:
    for content in (value, [1.0, value], {"a": [None, {"b": value}]}, ["null", value]):
        with pytest.raises(ValueError):
            to_json_bytes(content)


@pytest.mark.parametrize("body", [b"[NaN]", b'{"a":-Infinity}', b"Infinity"])
def test_only_some_readers_take_what_json_does_not_have(body: bytes) -> None:
    with pytest.raises(BadRequest, match="is no JSON value"):
        read_json(body)
    assert same(read_json(body, with_nan=True), know(body))


def test_keys_and_figures_that_python_writes_are_written() -> None:
    assert to_json_bytes({2: np.float64(0.5), None: (2**70,), True: "\u2028\ud800"}) == (
        b'{"2":0.5,"null":[1180591620717411303424],"true":"\\u2028\\ud800"}'
    )
    assert to_json_bytes({"a": [1e-05, 1.0, 1e22, "é", None]}) == '{"a":[1e-05,1.0,1e+22,"é",null]}'.encode()


@dataclass
class Box:
    name: str
    size: float | None


@pytest.mark.parametrize("beside", [0.5, None, np.float64(0.5), "\ud800"])
def test_what_is_beyond_json_is_written_whatever_is_beside_it(beside: Any) -> None:
    """By either writer."""
    day = date(2026, 11, 30)
    given = {"at": day, "box": Box("a", 1.0), "of": {3}, "raw": b"abc", "and": beside}
    found = know(to_json_bytes(given))
    assert found == {"at": "2026-11-30", "box": {"name": "a", "size": 1.0}, "of": [3], "raw": "YWJj", "and": beside}
    if type(beside) is not np.float64:
        assert list(know(to_json_bytes({1: 1, 0.5: 1, day: 1, "and": beside}))) == [
            "1",
            "0.5",
            "2026-11-30",
            "and",
        ]
    with pytest.raises(ValueError):
        to_json_bytes({"box": Box("a", math.nan), "and": beside})


@pytest.mark.parametrize("beside", [0.5, None])
def test_what_cannot_be_written_is_named(beside: Any) -> None:
    for value in (np.zeros(2), np.float32(1)):
        with pytest.raises(TypeError, match=type(value).__name__):
            to_json_bytes({"a": value, "b": beside})


def test_figures_that_take_long_are_left_to_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fast:
        asked: ClassVar[list[int]] = []

        def decode(self, text: bytes) -> Any:
            self.asked.append(len(text))
            return know(text)

    monkeypatch.setattr("deployments.messages._FAST_DECODER", Fast())
    for figure, is_fast in (
        ("1e300", False),
        ("1.5E+291", False),
        ("1e0300", False),
        ("1e-05", True),
        ('"e"', True),
        ("1e300", False),
    ):
        body = f"[{','.join([figure] * 20_000)}]".encode()
        Fast.asked.clear()
        assert read_json(body) == know(body)
        assert Fast.asked == ([len(body)] if is_fast else []), figure
    assert read_json(b"[1e300]") == [1e300] and len(Fast.asked) == 1, "a few do no harm"
