"""What a ModelInferRequest becomes when it is unpacked, found out before it is."""

from __future__ import annotations

from collections.abc import Iterator

from deployments.errors import BadRequest

#: Fields of a ModelInferRequest: a tensor each, or what it holds; real ones have some dozens at most.
MOST_FIELDS = 1000
#: Fields of a message that are looked at one by one to weigh it; what is behind them counts as the worst.
_MOST_WALKED = 10_000
#: Bytes that one becomes, at most (a number of one byte, in a list of Python's), and what an object takes beside.
_GROWTH, _OBJECT = 24, 90
#: What a field of known length has inside, by key (number << 3 | 2): other fields, or bytes and what each becomes.
_Inside = dict[int, "_Inside | int"]
_CONTENTS: _Inside = {6 << 3 | 2: 12, 7 << 3 | 2: 6, 8 << 3 | 2: 1}  # of FP32, FP64 and BYTES
_TENSOR: _Inside = {5 << 3 | 2: _CONTENTS}
_REQUEST: _Inside = {5 << 3 | 2: _TENSOR, 7 << 3 | 2: 1}  # inputs, and raw_input_contents


def weigh(raw: bytes) -> int:
    """Return the bytes that a ModelInferRequest becomes, at most; BadRequest where it is none, or has too many fields.

    An empty tensor takes two bytes, and becomes an object of ninety.
    """
    walked = 0

    def walk(start: int, end: int, inside: _Inside) -> int:
        nonlocal walked
        total = 0
        for count, (key, first, last) in enumerate(_fields(raw, start, end)):
            if inside is _REQUEST and count == MOST_FIELDS:
                raise BadRequest(f"the message has more than {MOST_FIELDS} fields")
            if walked == _MOST_WALKED:
                return total + _GROWTH * (end - first)
            walked += 1
            found = inside.get(key, _GROWTH)
            total += _OBJECT + (found * (last - first) if isinstance(found, int) else walk(first, last, found))
        return total

    try:
        return walk(0, len(raw), _REQUEST)
    except IndexError as error:
        raise BadRequest("the message is no ModelInferRequest: it ends too early") from error


def _fields(raw: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield key, start and end of the fields of a message that lies there; IndexError where it ends too early.

    Groups, which nobody sends any more, are taken apart into what is in them.
    """

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80 or shift > 63:
                return value
            shift += 7

    while at < end:
        key = varint()
        start = at
        length = varint() if key & 7 == 2 else {1: 8, 5: 4}.get(key & 7, 0)
        if key & 7 == 0:
            varint()
        if key & 7 == 2:
            start = at
        at = min(at + length, end)
        yield key, start, at
