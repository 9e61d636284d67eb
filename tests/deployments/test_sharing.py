"""What the keeper of plans holds, and for how long."""

from __future__ import annotations

from deployments.sharing import PlanKeeper


def test_the_keeper_gives_what_it_was_given() -> None:
    keeper = PlanKeeper()
    assert (keeper.has("a"), keeper.get("a")) == (False, None)
    keeper.put("a", b"plan")
    assert (keeper.has("a"), keeper.get("a")) == (True, b"plan")


def test_what_was_not_asked_for_longest_goes() -> None:
    keeper = PlanKeeper(most_bytes=10)
    keeper.put("a", b"1234")
    keeper.put("b", b"1234")
    keeper.get("a")
    keeper.put("c", b"1234")
    assert [name for name in "abc" if keeper.has(name)] == ["a", "c"]
    keeper.put("large", b"x" * 20)
    assert [name for name in ("a", "c", "large") if keeper.has(name)] == ["large"]
