from __future__ import annotations

import numpy as np
import pytest
import torch

from deployments.admission import Admission, size_of
from deployments.errors import Overloaded


def test_rows_are_counted_until_the_answer() -> None:
    refused: list[int] = []
    admission = Admission(4, 100, drain_s=lambda rows: 10 * rows, on_refusal=lambda: refused.append(1))
    with admission.hold_rows(3):
        with admission.hold_rows(1):
            assert admission.rows == 4
        with pytest.raises(Overloaded, match=r"the queue is full \(3 of 4 rows\)") as error, admission.hold_rows(2):
            pass
        assert error.value.retry_after_s == 30
    assert (admission.rows, len(refused)) == (0, 1)
    with admission.hold_rows(9):  # nothing else is there; its own size is bounded elsewhere
        assert admission.rows == 9
    with pytest.raises(ZeroDivisionError), admission.hold_rows(1):
        raise ZeroDivisionError
    assert admission.rows == 0


def test_bytes_are_counted_as_they_come_and_given_back() -> None:
    admission = Admission(4, 100)
    with admission.hold_bytes(60) as first:
        with admission.hold_bytes() as second:
            second.add(30)
            second.grow_to(40)
            second.grow_to(10)
            assert admission.bytes == 100
            with pytest.raises(Overloaded, match="requests hold 100 bytes; 1 more are over 100"):
                second.add(1)
        assert admission.bytes == 60
        first.add(500)  # alone: what it may have is bounded by its own limits
    assert admission.bytes == 0


def test_the_size_of_payloads() -> None:
    assert size_of(b"abc") == size_of("abc") == size_of(bytearray(3)) == 3
    assert size_of((np.zeros(4, np.float32), torch.zeros(2))) == 24
    assert size_of({"a": b"12", "b": [1, 2], "c": None}) == 2
