"""Datatypes of the Open Inference Protocol: tensors from and to JSON values and raw little-endian bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from deployments.errors import BadRequest, Unsupported

Array = np.ndarray[Any, Any]
#: Datatypes that numpy knows. BF16 exists in binary form only (as torch.bfloat16); BYTES is no tensor's dtype.
NUMPY_TYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
DATATYPES = (*NUMPY_TYPES, "BF16", "BYTES")
_FLOATS = ("FP16", "FP32", "FP64")
_NAMES = {np.dtype(kind): name for name, kind in NUMPY_TYPES.items()}
_MAX_DIMENSIONS = 16
_MAX_SIZE = 2**31 - 1
_MAX_ELEMENTS = 65_536
_SIZES = {**{name: np.dtype(kind).itemsize for name, kind in NUMPY_TYPES.items()}, "BF16": 2}


@lru_cache
def datatype(dtype: torch.dtype) -> str:
    """Return the protocol's name of a dtype; Unsupported where it has none."""
    if dtype == torch.bfloat16:
        return "BF16"
    try:
        return _NAMES[torch.empty(0, dtype=dtype).numpy().dtype]
    except (KeyError, TypeError):  # complex numbers; those that NumPy has not
        raise Unsupported(f"{dtype} has no name in the Open Inference Protocol") from None


def has_name(dtype: torch.dtype) -> bool:
    """Say whether the protocol can carry a dtype."""
    try:
        datatype(dtype)
    except Unsupported:
        return False
    return True


def check_shape(path: str, shape: Any) -> list[int]:
    """Return a tensor's shape; BadRequest where it is none."""
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s <= _MAX_SIZE for s in shape)
    ):
        raise BadRequest(f"{path}.shape: a list of whole numbers from 0, at most {_MAX_DIMENSIONS} of them, is needed")
    return shape


def check_datatype(path: str, kind: Any) -> str:
    """Return a tensor's datatype; BadRequest where the protocol has none such."""
    if not isinstance(kind, str) or kind not in DATATYPES:
        raise BadRequest(f"{path}.datatype: {kind!r} is not one of {', '.join(DATATYPES)}")
    return kind


def from_json(path: str, data: Any, kind: str, shape: Sequence[int]) -> Array | list[Any]:
    """Return the tensor that nested or flat lists hold; of BYTES the elements, as text.

    BadRequest, naming `path`, where the values are not of the datatype, or do not fill the shape.
    """
    if not isinstance(data, list):
        raise BadRequest(f"{path}.data: a list is needed")
    if kind == "BF16":
        raise BadRequest(f"{path}.datatype: BF16 has a binary form only (binary_data_size)")
    if kind == "BYTES":
        check_elements(path, math.prod(shape))
        elements = _flatten(data)
        if not all(isinstance(element, str) for element in elements):
            raise BadRequest(f"{path}.data: elements of BYTES are text in JSON; bytes go in the binary form")
        return from_values(path, elements, kind, shape)
    _check_numbers(path, data, kind)
    try:
        # As such, since numbers beyond 64 bits, which JavaScript writes without an exponent, would become objects.
        raw = np.asarray(data, np.float64) if kind in _FLOATS else np.asarray(data)
        if kind == "UINT64" and raw.dtype == np.float64 and all(type(item) is int for item in _flatten(data)):
            raw = np.array(data, np.uint64)  # NumPy has no type of its own for numbers on both sides of 2**63
    except (ValueError, OverflowError) as error:  # rows of different lengths, or numbers beyond 64 bits
        raise BadRequest(f"{path}.data: not a tensor: {error}") from error
    return from_values(path, raw, kind, shape)


def from_values(path: str, values: Array | list[Any], kind: str, shape: Sequence[int]) -> Array | list[Any]:
    """Return values of any number type as a tensor, refusing those that the datatype would change; BYTES as they are.

    BadRequest, naming `path`, also where they do not fill the shape.
    """
    if isinstance(values, list):
        _check_count(path, len(values), shape)
        return values
    flat = _convert(path, values, NUMPY_TYPES[kind])
    _check_count(path, flat.size, shape)
    return _reshape(path, flat, shape)


def from_bytes(path: str, raw: memoryview, kind: str, shape: Sequence[int]) -> Array | torch.Tensor | list[bytes]:
    """Return a view of raw little-endian data as a tensor (a copy where it is not aligned); of BYTES the elements.

    BadRequest, naming `path`, where the bytes do not fill the shape.
    """
    if kind == "BYTES":
        elements = _split(path, raw, check_elements(path, math.prod(shape)))
        _check_count(path, len(elements), shape)
        return elements
    size, count = _SIZES[kind], math.prod(shape)
    if len(raw) != size * count:
        raise BadRequest(
            f"{path}: {len(raw)} bytes do not fill {kind} {list(shape)}, which takes {size * count} ({size} each)"
        )
    array = _reshape(path, np.frombuffer(raw, NUMPY_TYPES.get(kind, np.int16)), shape)
    if kind == "BOOL" and array.size and int(array.view(np.uint8).max()) > 1:
        raise BadRequest(f"{path}: bytes of BOOL are 0 or 1")
    if not (array.flags.aligned and array.flags.writeable):
        array = array.copy()
    return torch.from_numpy(array).view(torch.bfloat16) if kind == "BF16" else array


def to_bytes(value: torch.Tensor) -> tuple[str, list[int], memoryview | bytes]:
    """Return datatype, shape and raw little-endian data of a tensor on the CPU."""
    kind, shape = datatype(value.dtype), list(value.shape)
    flat = value.contiguous().reshape(-1)
    array = (flat.view(torch.int16) if kind == "BF16" else flat).numpy()
    return kind, shape, array.data.cast("B") if array.size else b""


def to_json(value: torch.Tensor) -> tuple[str, list[int], list[Any]]:
    """Return datatype, shape and flat data for JSON; BF16 becomes FP32.

    BadRequest where JSON cannot carry the values, which the binary form can.
    """
    tensor = value.float() if value.dtype == torch.bfloat16 else value
    kind = datatype(tensor.dtype)
    array = tensor.numpy()  # NumPy looks at a few figures in a tenth of torch's time
    if tensor.is_floating_point() and not np.isfinite(array).all():
        raise BadRequest(
            "the output for these inputs has NaN or infinity, which JSON cannot carry: ask for the binary form "
            "(binary_data)"
        )
    return kind, list(tensor.shape), array.reshape(-1).tolist()


def _flatten(data: list[Any]) -> list[Any]:
    """Return the elements of nested lists, in their order."""
    found: list[Any] = []
    waiting = [iter(data)]
    while waiting:
        for element in waiting[-1]:
            if isinstance(element, list):
                waiting.append(iter(element))
                break
            found.append(element)
        else:
            waiting.pop()
    return found


def check_elements(path: str, count: int) -> int:
    """Return a number of elements of BYTES; BadRequest where they are more than anybody would send."""
    if count > _MAX_ELEMENTS:
        raise BadRequest(f"{path}: {count} elements of BYTES; at most {_MAX_ELEMENTS} are allowed")
    return count


def _check_numbers(path: str, data: list[Any], kind: str) -> None:
    """Raise BadRequest where nested lists hold anything but numbers.

    NumPy would make an array of text of them, each as long as the longest: 200 kB of JSON became 10 GB.
    """
    allowed = {int, float, list} if kind in _FLOATS else {bool, int, float, list}
    waiting = [data]
    while waiting:
        found = waiting.pop()
        kinds = set(map(type, found))
        if not kinds <= allowed:
            (other, *_) = sorted(kind.__name__ for kind in kinds - allowed)
            raise BadRequest(f"{path}.data: {other} values are not {kind}")
        if list in kinds:
            waiting += (item for item in found if isinstance(item, list))


def _split(path: str, raw: memoryview, most: int) -> list[bytes]:
    """Return the elements of BYTES: each has its length before it, four bytes."""
    elements: list[bytes] = []
    at = 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise BadRequest(f"{path}: {len(raw) - at} bytes are left where an element's length of 4 should be")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + length > len(raw):
            raise BadRequest(f"{path}: an element of {length} bytes is announced, {len(raw) - at} are left")
        elements.append(bytes(raw[at : at + length]))
        at += length
        if len(elements) > most:
            raise BadRequest(f"{path}: there are more elements than the shape has ({most})")
    return elements


def _check_count(path: str, count: int, shape: Sequence[int]) -> None:
    if count != math.prod(shape):
        raise BadRequest(f"{path}.data: {count} values do not fill the shape {list(shape)}")


def _reshape(path: str, flat: Array, shape: Sequence[int]) -> Array:
    try:
        return flat.reshape(shape)
    except (ValueError, OverflowError) as error:  # no elements, and beside the 0 sizes beyond what an array may have
        raise BadRequest(f"{path}.shape: {list(shape)} is not allowed: {error}") from error


def _convert(path: str, values: Array, kind: type[np.generic]) -> Array:
    if not values.size:
        return np.empty(0, kind)
    allowed = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[np.dtype(kind).kind]
    if values.dtype.kind not in allowed:
        raise BadRequest(f"{path}.data: {values.dtype} values are not {_NAMES[np.dtype(kind)]}")
    if np.dtype(kind).kind in "iu":
        limits = np.iinfo(kind)  # type: ignore[type-var]
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise BadRequest(f"{path}.data: values must lie between {limits.min} and {limits.max}")
    with np.errstate(over="ignore"):
        converted = values.reshape(-1).astype(kind)
    if converted.dtype.kind == "f" and np.isinf(converted).any() and not np.isinf(values).any():
        raise BadRequest(f"{path}.data: a value is beyond {_NAMES[np.dtype(kind)]}")
    return converted
