from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optim.tree import flatten
from optim.verify import Mismatch, compare, other_data


def test_equal_outputs_have_no_difference() -> None:
    out = {"a": torch.randn(3), "b": (torch.arange(3), None)}
    assert compare(out, out).max_abs == 0


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        (torch.zeros(2), torch.zeros(3), r"shape \(2,\), eager gives \(3,\)"),
        (torch.zeros(2).double(), torch.zeros(2), "dtype torch.float64"),
        ((torch.zeros(2),), [torch.zeros(2)], "structure: tuple"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2 torch.int64 values differ"),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), "not finite"),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, -float("inf")]), "not finite"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0]), "output: error 0.1"),
        # Small outputs are held to their own size, not to an absolute bound.
        (torch.tensor([1e-6, 2e-6]), torch.tensor([2e-6, 1e-6]), "over the tolerance"),
    ],
)
def test_what_differs_is_named(got: Any, want: Any, message: str) -> None:
    with pytest.raises(Mismatch, match=message):
        compare(got, want)


def test_what_eager_has_is_right_even_where_it_is_not_finite() -> None:
    out = torch.tensor([float("nan"), float("inf"), 1.0])
    assert compare(out.clone(), out).max_abs == 0


def test_rounding_is_allowed_by_dtype_and_by_float64() -> None:
    want = torch.linspace(1, 2, 100)
    assert compare(want * (1 + 1e-4), want).max_abs > 0
    with pytest.raises(Mismatch):
        compare(want * (1 + 1e-2), want)
    compare((want * (1 + 1e-2)).bfloat16(), want.bfloat16())
    compare(want * (1 + 1e-2), want, tolerance=0.05)
    # Eager itself is off by twice as much from the truth, so the other result is as good as eager's.
    compare(want * (1 + 1e-2), want, exact_reference=lambda: want.double() * (1 + 2e-2))
    with pytest.raises(Mismatch):
        compare(want * (1 + 1e-2), want, exact_reference=lambda: want.double())
    with pytest.raises(Mismatch):
        compare(want * (1 + 1e-2), want, exact_reference=lambda: None)


@pytest.fixture
def piece(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("optim.verify._PIECE", 3)
    return 3


@pytest.mark.parametrize("place", range(8))
def test_a_difference_is_found_in_whichever_piece_it_is(piece: int, place: int) -> None:
    want = torch.linspace(1, 2, 8).reshape(2, 4)
    for wrong, message in ((1.5, "output: error "), (float("nan"), "1 values are not finite where eager has 0")):
        got = want.clone()
        got.view(-1)[place] *= wrong
        with pytest.raises(Mismatch, match=message):
            compare(got, want)
        odd = got if wrong != wrong else want
        assert compare(odd.clone(), odd).max_abs == 0


def test_pieces_come_to_what_the_whole_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    want = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    want[3, 4] = float("inf")
    got = (want * (1 + 5e-4)).t().contiguous().t()
    whole = compare(got, want)
    monkeypatch.setattr("optim.verify._PIECE", 7)
    pieces = compare(got, want)
    assert pieces.max_abs == whole.max_abs
    assert pieces.relative == pytest.approx(whole.relative, rel=1e-9)
    # The truth is looked at in pieces, too.
    truth = want.double() * (1 + 4e-3)
    compare(want * (1 + 3e-3), want, exact_reference=lambda: truth)
    with pytest.raises(Mismatch):
        compare(want * (1 + 3e-3), want, exact_reference=lambda: want.double())


class Sizes(TorchDispatchMode):
    """Notes how many values the results of operations have."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.numel())
        return result


def test_large_outputs_are_not_copied_whole(piece: int) -> None:
    want = torch.linspace(1, 2, 50)
    with Sizes() as sizes:  # type: ignore[no-untyped-call]
        compare(want * 1.001, want, 1e-2)
        assert sizes.largest == 50  # of the line above
        sizes.largest = 0
        compare(want, want)
    assert sizes.largest == piece


def test_other_data_differ_and_stay_in_range() -> None:
    ids = torch.randint(5, 50, (4, 9))
    numbers = torch.randn(4, 9)
    flags = torch.tensor([True, False] * 18).reshape(4, 9)
    other = other_data((ids, numbers, flags))
    assert sorted(other[0].flatten().tolist()) == sorted(ids.flatten().tolist())
    assert not torch.equal(other[0], ids)
    assert not torch.equal(other[1], numbers)
    assert other[2].sum() == flags.sum()
    assert [t.dtype for t in other] == [torch.int64, torch.float32, torch.bool]


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()
    name: str = "x"


def test_outputs_are_taken_apart_and_rebuilt() -> None:
    value = Output(torch.ones(1), (torch.zeros(1), torch.zeros(2)))
    tensors, rebuild = flatten(value)
    assert len(tensors) == 3
    again = rebuild([t + 1 for t in tensors])
    assert isinstance(again, Output)
    assert again.logits.item() == 2
    assert [t.numel() for t in again.hidden] == [1, 2]
    assert again.name == "x"
    with pytest.raises(TypeError, match=r"output\['a'\] is a builtins.set"):
        flatten({"a": {torch.ones(1)}})
