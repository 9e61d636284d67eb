"""How the next token is picked: as Hugging Face's generation does it, the same for the same seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from deployments import sampling
from deployments.sampling import Picked, Sampler, Sampling, _choose, pick, rehearse


def draw(logits: torch.Tensor, count: int, **how: Any) -> list[int]:
    sampler = Sampler(Sampling(**how))
    return [pick_sound([sampler], logits.unsqueeze(0))[0].token for _ in range(count)]


def pick_sound(samplers: Sequence[Sampler], logits: torch.Tensor) -> list[Picked]:
    found = [picked for picked in pick(samplers, logits).read() if picked is not None]
    assert len(found) == len(samplers)
    return found


def test_a_rehearsal_does_all_that_a_request_may_ask_for_on_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Counter[str] = Counter()

    def watch(name: str, count: Callable[..., int], of: Any = sampling) -> None:
        real = getattr(of, name)

        def watched(*given: Any) -> Any:
            rows[name] += count(*given)
            return real(*given)

        monkeypatch.setattr(of, name, watched)

    watch("_choose", lambda how, logits, numbers: len(logits))  # on a CPU row by row
    watch("_limit", lambda how, logits: len(logits))
    watch("_tell", lambda tokens, logits, most: len(tokens))
    watch("_in_order", lambda parts: sum(len(part) for part, _ in parts) if len(parts) > 1 else 0)
    watch("shift", lambda sampler, logits: 1, Sampler)
    watch("pick", lambda samplers, logits: sum(one.sampling.temperature == 0 for one in samplers))
    rehearse(torch.zeros(6, 300))
    assert len(rows) == 6 and min(rows.values()) >= 6, rows


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"top_p": 0.8},
        {"temperature": 0.9, "top_k": 8, "top_p": 0.6},
        {"top_k": 10_000},
        {"top_p": 1e-9},
    ],
)
def test_tokens_come_as_often_as_with_transformers(how: dict[str, Any]) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    warped = TemperatureLogitsWarper(how.get("temperature", 1.0))(None, logits.unsqueeze(0))
    if "top_k" in how:
        warped = TopKLogitsWarper(how["top_k"])(None, warped)
    if "top_p" in how:
        warped = TopPLogitsWarper(how["top_p"])(None, warped)
    expected = warped[0].softmax(-1)
    count = 4000
    found = Counter(draw(logits, count, seed=1, **how))
    assert all(expected[token] > 0 for token in found)
    for token, probability in enumerate(expected.tolist()):
        deviation = (probability * (1 - probability) / count) ** 0.5
        assert abs(found[token] / count - probability) <= 5 * deviation + 1e-3


def test_temperature_0_takes_the_likeliest() -> None:
    logits = torch.tensor([0.1, 5.0, 2.0])
    assert draw(logits, 5, temperature=0) == [1] * 5


def test_a_seed_gives_the_same_tokens_and_others_give_others() -> None:
    logits = torch.zeros(1000)
    first = draw(logits, 20, seed=7)
    torch.manual_seed(5)  # what others draw is no matter
    assert draw(logits, 20, seed=7) == first
    assert draw(logits, 20, seed=8) != first
    assert draw(logits, 20) != draw(logits, 20)


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    (picked,) = pick_sound([Sampler(Sampling(temperature=0.5, top_k=3, seed=1, logprobs=4))], logits.unsqueeze(0))
    expected = logits.log_softmax(-1)
    assert picked.logprob == pytest.approx(float(expected[picked.token]))
    assert [token for token, _ in picked.top] == expected.topk(4).indices.tolist()
    assert [value for _, value in picked.top] == pytest.approx(expected.topk(4).values.tolist())


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("how", [{"top_p": 0.9}, {"top_p": 0.999, "temperature": 1.3}, {"top_k": 3000, "top_p": 0.5}])
def test_of_a_large_vocabulary_the_same_are_left_as_with_transformers(how: dict[str, Any], spread: float) -> None:
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(4)) * spread
    # Values that are equal are left or not by chance.
    logits += torch.linspace(0, 1e-2, len(logits))[
        torch.randperm(len(logits), generator=torch.Generator().manual_seed(1))
    ]
    warped = TemperatureLogitsWarper(how.get("temperature", 1.0))(None, logits.unsqueeze(0))
    if "top_k" in how:
        warped = TopKLogitsWarper(how["top_k"])(None, warped)
    probabilities = TopPLogitsWarper(how["top_p"])(None, warped)[0].softmax(-1)
    left = int((probabilities > 0).sum())
    drawn = draw(logits, 500, seed=2, **how)
    # The last one left may be another: float32's sums of so many differ.
    likeliest = set(probabilities.topk(min(left + 20, len(logits))).indices.tolist())
    assert set(drawn) <= likeliest
    assert len(set(drawn)) > min(left, 500) / 3


@pytest.mark.parametrize("how", [{"top_p": 1e-300}, {"temperature": 1e-40}, {"temperature": 1e-40, "top_p": 0.9}])
def test_what_leaves_nothing_else_takes_the_likeliest(how: dict[str, Any]) -> None:
    assert draw(torch.tensor([0.1, 5.0, 2.0]), 5, **how) == [1] * 5


@pytest.mark.parametrize("how", [{}, {"top_p": 0.5}, {"top_k": 2}, {"temperature": 0}])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_give_none(how: dict[str, Any], bad: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    logits[2, 2] = -torch.inf  # a token that cannot be
    picks = pick([Sampler(Sampling(**how)) for _ in range(3)], logits)
    assert all(token in range(4) for token in picks.tokens.tolist()), "a model may be given it before it is read"
    assert [picked is None for picked in picks.read()] == [False, True, False]


def test_seeds_that_differ_draw_differently() -> None:
    logits = torch.zeros(1000)
    seeds = (1, -1, 2**32 + 1, 2**63 - 1, -(2**63), 0)
    assert len({tuple(draw(logits, 8, seed=seed)) for seed in seeds}) == len(seeds)
    assert draw(logits, 8, seed=2**63 - 1) == draw(logits, 8, seed=2**63 - 1)
    assert len({tuple(draw(logits, 8)) for _ in range(3)}) == 3


def test_each_of_many_rows_is_picked_as_it_is_alone() -> None:
    ways: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "temperature": 1.7, "logprobs": 2},
        {"seed": 3, "top_k": 4},
        {"seed": 4, "top_k": 700, "top_p": 0.7, "logprobs": 5},
        {"seed": 5, "top_p": 0.98, "temperature": 2.0},  # more than are looked at first
        {"temperature": 0, "logprobs": 0},
        {"seed": 6, "top_p": 0.1},
    ]
    logits = torch.randn(len(ways), 3000, generator=torch.Generator().manual_seed(8))
    together, alone = ([Sampler(Sampling(**how)) for how in ways] for _ in range(2))
    for _ in range(20):
        found = pick_sound(together, logits)
        assert found == [pick_sound([sampler], logits[row : row + 1])[0] for row, sampler in enumerate(alone)]
        assert [len(one.top) for one in found] == [0, 0, 2, 0, 5, 0, 0, 0]
        assert [one.logprob is None for one in found] == ["logprobs" not in how for how in ways]


def test_rows_that_are_chosen_in_one_go_are_those_chosen_one_by_one() -> None:
    """What a GPU does with all rows, and a CPU with one at a time."""
    ways: list[dict[str, Any]] = [
        {},
        {"top_k": 4},
        {"temperature": 1.7},
        {"top_k": 700, "top_p": 0.7},
        {"top_p": 0.98, "temperature": 2.0},  # more than are looked at first
        {"top_k": 10**6},  # all of them, which is no limit
        {"top_p": 0.1},
        {},
    ]
    how = [Sampling(**way) for way in ways]
    generator = torch.Generator().manual_seed(8)
    for _ in range(20):
        logits = torch.randn(len(ways), 3000, generator=generator) * 2
        logits[-1] = torch.nan
        numbers = torch.rand(len(ways), generator=generator).tolist()
        together = _choose(how, logits, numbers).tolist()
        one_by_one = [_choose(how[n : n + 1], logits[n : n + 1], numbers[n : n + 1]).tolist() for n in range(len(ways))]
        assert [[token] for token in together] == one_by_one


def test_a_row_without_numbers_leaves_the_others_alone() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(8))
    fine, found = list[Picked | None](), list[Picked | None]()
    for values in (fine, found):
        values += pick([Sampler(Sampling(seed=n, top_p=0.9)) for n in range(3)], logits).read()
        logits[1] = torch.nan
    assert found == [fine[0], None, fine[2]]


def test_penalties_and_biases_change_the_logits_as_openai_says() -> None:
    logits = torch.tensor([[1.0, 0.87, 0.51, -3.0]])
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.3, frequency_penalty=0.2, logit_bias=((3, 3.77),)))
    values = logits[0].tolist()
    values[3] += 3.77
    counts = [0] * 4
    for _ in range(12):
        mu = [v - 0.2 * c - 0.3 * (c > 0) for v, c in zip(values, counts, strict=True)]
        (picked,) = pick_sound([sampler], logits)
        assert picked.token == max(range(4), key=mu.__getitem__)
        counts[picked.token] += 1
    assert min(counts) > 0
    assert logits.tolist() == [[pytest.approx(v) for v in (1.0, 0.87, 0.51, -3.0)]]


def test_a_bias_concerns_its_own_request_alone_and_log_probabilities_are_the_models() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    ways = [Sampling(temperature=0, logprobs=1), Sampling(temperature=0, logprobs=1, logit_bias=((7, 100.0),))]
    plain, biased = pick_sound([Sampler(how) for how in ways], logits)
    assert plain.token == int(logits[0].argmax())
    assert biased.token == 7
    assert biased.logprob == pytest.approx(float(logits[1].log_softmax(-1)[7]))
    assert biased.top[0][0] == int(logits[1].argmax())
    banned = Sampler(Sampling(seed=1, temperature=2.0, logit_bias=tuple((token, -100.0) for token in range(29))))
    assert [pick_sound([banned], logits[:1])[0].token for _ in range(5)] == [29] * 5
