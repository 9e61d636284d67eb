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
#: Keys (number << 3 | 2: of known length) of the fields in which others lie, or which become less: the inputs and their
#: contents; raw_input_contents, of `contents` those of FP32, FP64 and BYTES.
_INPUTS, _CONTENTS, _RAW = 5 << 3 | 2, 5 << 3 | 2, 7 << 3 | 2
_GROWTHS = {6 << 3 | 2: 12, 7 << 3 | 2: 6, 8 << 3 | 2: 1}


def weigh(raw: bytes) -> int:
    """Return the bytes that a ModelInferRequest becomes, at most; BadRequest where it is none, or has too many fields.

    An empty tensor takes two bytes, and becomes an object of ninety.
    """
    total = walked = 0
    try:
        for count, (key, start, end) in enumerate(_fields(raw, 0, len(raw))):
            if count == MOST_FIELDS:
                raise BadRequest(f"the message has more than {MOST_FIELDS} fields")
            if key != _INPUTS:
                total += _OBJECT + (1 if key == _RAW else _GROWTH) * (end - start)
                continue
            for inner, begin, until in _fields(raw, start, end):
                if inner != _CONTENTS:
                    total += _OBJECT + _GROWTH * (until - begin)
                    continue
                for kind, first, last in _fields(raw, begin, until):
                    if walked == _MOST_WALKED:
                        total += _GROWTH * (until - first)
                        break
                    walked += 1
                    total += _OBJECT + _GROWTHS.get(kind, _GROWTH) * (last - first)
    except IndexError as error:
        raise BadRequest("the message is no ModelInferRequest: it ends too early") from error
    return total


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
