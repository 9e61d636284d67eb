from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.datatypes import NUMPY_TYPES, from_bytes, from_json, to_bytes, to_json
from deployments.errors import BadRequest, Unsupported

KINDS = st.sampled_from([*NUMPY_TYPES, "BF16"])
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@given(KINDS, SHAPES, st.randoms())
def test_what_is_written_in_binary_form_is_read_again(kind: str, shape: list[int], random: object) -> None:
    values = torch.arange(int(np.prod(shape))).reshape(shape)
    dtype = torch.bfloat16 if kind == "BF16" else torch.from_numpy(np.empty(0, NUMPY_TYPES[kind])).dtype
    tensor = values.bool() if dtype == torch.bool else values.to(dtype)
    name, size, raw = to_bytes(tensor)
    assert (name, size) == (kind, shape)
    again = torch.as_tensor(from_bytes("x", memoryview(bytearray(raw)), kind, size))
    assert again.dtype == dtype
    assert torch.equal(again, tensor)


@given(st.sampled_from(list(NUMPY_TYPES)), SHAPES)
def test_what_is_written_as_json_is_read_again(kind: str, shape: list[int]) -> None:
    values = np.arange(int(np.prod(shape))).reshape(shape).astype(NUMPY_TYPES[kind])
    assert from_json("x", values.tolist() if shape else [values.item()], kind, shape) == pytest.approx(values)
    name, size, data = to_json(torch.from_numpy(values))
    assert (name, size) == (kind, shape)
    assert np.array_equal(np.asarray(from_json("x", data, kind, size)), values)


@given(st.lists(st.binary(max_size=9), max_size=5))
def test_elements_of_bytes_are_what_they_were(elements: list[bytes]) -> None:
    raw = b"".join(len(element).to_bytes(4, "little") + element for element in elements)
    assert from_bytes("x", memoryview(raw), "BYTES", [len(elements)]) == elements


@given(
    st.binary(max_size=40), st.sampled_from([*NUMPY_TYPES, "BF16", "BYTES"]), st.lists(st.integers(0, 9), max_size=3)
)
def test_any_bytes_are_a_tensor_or_a_bad_request(raw: bytes, kind: str, shape: list[int]) -> None:
    try:
        found = from_bytes("x", memoryview(bytearray(raw)), kind, shape)
    except BadRequest:
        return
    assert kind == "BYTES" or list(torch.as_tensor(found).shape) == shape


def test_aligned_data_is_not_copied_and_other_data_is() -> None:
    room = np.zeros(64, np.uint8)
    start = -room.ctypes.data % 8
    found = from_bytes("x", room.data[start : start + 16], "INT64", [2])
    assert isinstance(found, np.ndarray)
    found[0] = 1
    assert room.any()
    room[:] = 0
    found = from_bytes("x", room.data[start + 1 : start + 17], "INT64", [2])
    assert isinstance(found, np.ndarray)
    assert found.flags.aligned
    found[0] = 1
    assert not room.any()


@pytest.mark.parametrize(
    ("raw", "kind", "shape", "message"),
    [
        (b"\0" * 7, "FP32", [2], "7 bytes do not fill FP32 [2], which takes 8 (4 each)"),
        (b"\2", "BOOL", [1], "0 or 1"),
        (b"\1\0\0", "BYTES", [1], "3 bytes are left where an element's length of 4"),
        (b"\xff\xff\xff\xff", "BYTES", [1], "4294967295 bytes is announced, 0 are left"),
        (b"\0" * 12, "BYTES", [2], "more elements than the shape has (2)"),
        (b"", "BYTES", [65_537], "65537 elements of BYTES; at most 65536"),
        (b"", "FP32", [0, 2**31 - 1, 2**31 - 1, 2**31 - 1], "shape"),
    ],
)
def test_binary_data_that_is_wrong_is_named(raw: bytes, kind: str, shape: list[int], message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        from_bytes("inputs[0]", memoryview(bytearray(raw)), kind, shape)
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [["x" * 100_000] + ["a"] * 25_000, [1, ["x"]], [{}], [None], [[1.5], ["x" * 10**6]]])
def test_what_is_no_number_is_refused_before_numpy_sees_it(data: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "asarray", None)  # it would make room for the longest text in every place
    with pytest.raises(BadRequest, match="values are not FP32"):
        from_json("x", data, "FP32", [len(data)])


def test_numbers_of_64_bits_stay_what_they_are() -> None:
    found = from_json("x", [1, 2**63, 2**64 - 1], "UINT64", [3])
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [1, 2**63, 2**64 - 1]
    for data in ([1, 2**64], [-1, 2**63], [1, 2.0**63]):
        with pytest.raises(BadRequest):
            from_json("x", data, "UINT64", [2])


def test_numbers_are_floats_as_they_are_or_not_at_all() -> None:
    found = from_json("x", [10**20, 1.5, -(2**70)], "FP32", [3])  # as JavaScript writes them
    assert np.array_equal(np.asarray(found), np.array([1e20, 1.5, -(2.0**70)], np.float32))
    for value, kind in ((1e39, "FP32"), (70_000, "FP16"), (10**400, "FP64"), (True, "FP32")):
        with pytest.raises(BadRequest):
            from_json("x", [0, value], kind, [2])


def test_what_json_cannot_carry_is_asked_for_in_binary_form() -> None:
    for value in (torch.tensor([float("nan")]), torch.tensor([float("inf")], dtype=torch.bfloat16)):
        with pytest.raises(BadRequest, match="binary_data"):
            to_json(value)
    assert to_json(torch.tensor([1.5], dtype=torch.bfloat16)) == ("FP32", [1], [1.5])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_the_protocol_has_not_is_refused_in_both_forms(dtype: torch.dtype) -> None:
    for write in (to_json, to_bytes):
        with pytest.raises(Unsupported, match="has no name"):
            write(torch.zeros(2, dtype=dtype))
