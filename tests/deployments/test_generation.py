"""Requests join and leave between steps, each with the tokens that it gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.args import ModelArgs
from deployments.compile import compile_generator, slots_of
from deployments.decoder import DecodeOne
from deployments.decoder_functions import make_slots as make_real_slots
from deployments.errors import ModelFailed
from deployments.generate import TextGenerator
from deployments.generation import Generation, Slots, Step
from deployments.sampling import Picked, Sampler, Sampling
from tests.support.checkpoints import SHAPES, greedy, make_checkpoint

VOCABULARY = 50
GREEDY = Sampling(temperature=0)


class Counting:
    """Stands in for both functions where it is about whose turn it is: the next token is the last one plus 1."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails_on: set[int] = set()

    def prefill(self, *inputs: torch.Tensor) -> torch.Tensor:
        tokens, positions, slots, last, mask = inputs
        self.calls.append(("prefill", tokens.shape[1], int(slots[0])))
        real = int(last) + 1
        assert mask[0, :real].sum(-1).tolist() == (positions[0, :real] + 1).tolist()
        return self._logits(tokens[0, last])

    def decode(self, *inputs: torch.Tensor) -> torch.Tensor:
        tokens, positions, slots, mask = inputs
        self.calls.append(("decode", tuple(slots.tolist())))
        assert mask.sum(-1).tolist() == (positions + 1).tolist()
        assert len(set(slots.tolist())) == len(slots)
        if self.fails_on & set(tokens.tolist()):
            raise ValueError("a poisonous token")
        return self._logits(tokens)

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((tokens + 1) % VOCABULARY, VOCABULARY).float()


def make_slots(run: Counting, slots: int = 2, *, runs_ahead: bool = False) -> Slots:
    return Slots({4: run.prefill, 16: run.prefill}, run.decode, (8, 32), slots, 4, runs_ahead=runs_ahead)


def ask(slots: Slots, prompt: list[int], most: int | None = 3, **more: Any) -> Generation:
    generation = Generation(prompt, Sampler(GREEDY), most, **more)
    slots.add(generation)
    return generation


def finish(slots: Slots) -> list[Step]:
    steps = []
    while len(slots):
        steps.append(slots.step())
        assert len(steps) < 1000
    return steps


def ends(steps: list[Step]) -> dict[int, Any]:
    return {id(g): what for step in steps for g, what in step.events if not isinstance(what, Picked)}


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_requests_join_and_leave_between_steps(runs_ahead: bool) -> None:
    run = Counting()
    slots = make_slots(run, runs_ahead=runs_ahead)
    first, second, third = ask(slots, [1], 4), ask(slots, [10], 7), ask(slots, [20], 2)
    finish(slots)
    assert first.tokens == [2, 3, 4, 5]
    assert second.tokens == list(range(11, 18))
    assert third.tokens == [21, 22]
    # The third waits until the first has left, and takes its slot.
    assert [call[-1] for call in run.calls if call[0] == "prefill"] == [0, 1, 0]
    assert ("decode", (1, 0)) in run.calls or ("decode", (0, 1)) in run.calls
    # Nobody has a row that is not needed: 3 + 6 + 1 tokens behind the first ones.
    assert sum(len(call[1]) for call in run.calls if call[0] == "decode") == 10


def test_running_ahead_a_step_tells_what_the_one_before_it_picked() -> None:
    run = Counting()
    slots = make_slots(run, runs_ahead=True)
    generation = ask(slots, [1], 3)
    told = []
    while len(slots):
        calls, step = len(run.calls), slots.step()
        events = [what.token if isinstance(what, Picked) else what for _, what in step.events]
        told.append((len(run.calls) - calls, events))
    assert told == [(1, []), (1, [2]), (1, [3]), (0, [4, "length"])]
    assert generation.tokens == [2, 3, 4]


def test_running_ahead_an_end_token_costs_one_row_that_nobody_sees() -> None:
    run = Counting()
    slots = make_slots(run, runs_ahead=True)
    generation = ask(slots, [1], None, ends=frozenset([4]))
    told = [what for step in finish(slots) for _, what in step.events]
    assert told == [Picked(2), Picked(3), "stop"]
    assert generation.tokens == [2, 3, 4]
    assert len(run.calls) == 4  # the prompt, two tokens, and the one behind the end
    after = ask(slots, [7], 2)  # its slot is as good as new
    finish(slots)
    assert after.tokens == [8, 9]


def test_who_looks_back_is_not_run_ahead_of() -> None:
    class Same(Counting):
        """Logits that are the same behind every token, so that penalties decide."""

        def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.linspace(3, 0, VOCABULARY).expand(len(tokens), VOCABULARY)

    found = []
    for runs_ahead in (True, False):
        slots = make_slots(Same(), runs_ahead=runs_ahead)
        looking = Generation([1], Sampler(Sampling(temperature=0, presence_penalty=2.0)), 6)
        slots.add(looking)
        assert len(slots.step().events) == 1
        plain = ask(slots, [1], 9)
        finish(slots)
        found.append((looking.tokens, plain.tokens))
    assert found == [([0, 1, 2, 3, 4, 5], [0] * 9)] * 2


def test_who_has_a_last_token_does_not_wait_for_a_newcomers_whole_prompt() -> None:
    run = Counting()
    slots = make_slots(run, runs_ahead=True)
    first = ask(slots, [1], 1)
    slots.step()
    assert not first.tokens
    ask(slots, list(range(30)), 1)
    assert [what for _, what in slots.step().events] == [Picked(2), "length"]
    assert [call[:2] for call in run.calls] == [("prefill", 4), ("prefill", 16)]


def test_who_has_ended_before_another_ones_failure_is_not_run_again() -> None:
    run = Counting()
    slots = make_slots(run, slots=3, runs_ahead=True)
    bad, ended, last = ask(slots, [20], 9), ask(slots, [30], 9, ends=frozenset([33])), ask(slots, [40], 9)
    run.fails_on = {24}  # at the second step of all three; what the first picked is unread then, 33 too
    found = ends(finish(slots))
    assert (bad.tokens, ended.tokens, last.tokens) == ([21, 22, 23, 24], [31, 32, 33], list(range(41, 50)))
    assert isinstance(found[id(bad)], ModelFailed)
    assert (found[id(ended)], found[id(last)]) == ("stop", "length")
    assert all(slot >= 0 for call in run.calls if call[0] == "decode" for slot in call[1])


def test_a_long_prompt_is_run_in_pieces_that_let_the_others_go_on() -> None:
    run = Counting()
    slots = make_slots(run)
    ask(slots, [1], 12)
    slots.step()
    ask(slots, list(range(16)), 1)
    finish(slots)
    kinds = [call[:2] for call in run.calls]
    pieces = [index for index, call in enumerate(kinds) if call == ("prefill", 4)][1:]
    assert len(pieces) == 4
    assert all(kinds[index + 1][0] == "decode" for index in pieces)
    # Alone it is run in the largest piece.
    run.calls.clear()
    ask(slots, list(range(16)), 1)
    finish(slots)
    assert [call[:2] for call in run.calls] == [("prefill", 16)]


def test_a_first_token_does_not_wait_for_the_others_next_ones() -> None:
    run = Counting()
    slots = make_slots(run)
    first = ask(slots, [1], 9)
    slots.step()
    assert first.tokens == [2]
    second = ask(slots, [5], 9)
    steps = [slots.step() for _ in range(3)]
    told = [[(generation is second, what.token) for generation, what in step.events] for step in steps]  # type: ignore[union-attr]
    assert told == [[(False, 3)], [(True, 6)], [(False, 4), (True, 7)]]


def test_no_piece_is_mostly_padding() -> None:
    run = Counting()
    slots = make_slots(run)
    ask(slots, list(range(6)), 1)
    finish(slots)
    assert [call[1] for call in run.calls] == [4, 4]
    run.calls.clear()
    ask(slots, list(range(9)), 1)
    finish(slots)
    assert [call[1] for call in run.calls] == [16]


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_who_goes_away_frees_the_slot_at_the_next_step(runs_ahead: bool) -> None:
    slots = make_slots(Counting(), slots=1, runs_ahead=runs_ahead)
    gone, waiting = ask(slots, [1], None), ask(slots, [5], 1)
    slots.step()
    count = len(gone.tokens)
    gone.gone = True
    steps = finish(slots)
    assert len(gone.tokens) == count
    assert waiting.tokens == [6]
    assert ends(steps) == {id(waiting): "length"}
    queued = ask(slots, [1], None)
    queued.gone = True
    assert not any(step.events for step in finish(slots))


def test_an_end_token_is_told_as_stop_and_not_given_out() -> None:
    slots = make_slots(Counting())
    generation = ask(slots, [1], None, ends=frozenset([4]))
    steps = finish(slots)
    told = [what for step in steps for _, what in step.events]
    assert told == [Picked(2), Picked(3), "stop"]
    assert ends(steps) == {id(generation): "stop"}


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_request_ends_where_its_slot_is_full(runs_ahead: bool) -> None:
    slots = make_slots(Counting(), runs_ahead=runs_ahead)
    generation = ask(slots, list(range(30)), None)
    assert ends(finish(slots)) == {id(generation): "length"}
    assert 30 + len(generation.tokens) == 32


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_what_one_request_raises_ends_that_one_alone(runs_ahead: bool) -> None:
    run = Counting()
    slots = make_slots(run, slots=3, runs_ahead=runs_ahead)
    good, bad, other = ask(slots, [1], 8), ask(slots, [20], 8), ask(slots, [30], 8)
    run.fails_on = {23}
    found = ends(finish(slots))
    assert good.tokens == list(range(2, 10))
    assert other.tokens == list(range(31, 39))
    assert isinstance(found.pop(id(bad)), ModelFailed)
    assert bad.tokens == [21, 22, 23]
    assert set(found.values()) == {"length"}


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_token_that_cannot_be_picked_ends_that_request_alone(runs_ahead: bool) -> None:
    class Broken(Sampler):
        count = 0

        def draw(self) -> float:
            self.count += 1
            if self.count > 3:
                raise IndexError("nothing is left")
            return super().draw()

    def make(sampler: Sampler, slots: Slots) -> Generation:
        made = Generation([5], sampler, 8)
        slots.add(made)
        return made

    hot = Sampling(temperature=2.0, seed=3)
    slots = make_slots(Counting(), slots=3, runs_ahead=runs_ahead)
    alone = make(Sampler(hot), slots)
    finish(slots)
    before, bad, behind = make(Sampler(hot), slots), make(Broken(hot), slots), make(Sampler(hot), slots)
    found = ends(finish(slots))
    assert before.tokens == behind.tokens == alone.tokens
    assert isinstance(found[id(bad)], ModelFailed)
    assert bad.tokens == alone.tokens[:3]


def test_what_the_device_raises_is_for_all() -> None:
    run = Counting()

    def fail(*inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    slots = Slots({4: run.prefill}, fail, (8,), 2, 4)
    generation = ask(slots, [1])
    slots.step()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        slots.step()
    assert ends([slots.fail(ModelFailed("gone"))]).keys() == {id(generation)}
    assert not len(slots)


def load(folder: Path, batch_sizes: Sequence[int] = (1, 2, 4), **more: Any) -> tuple[TextGenerator, ModelArgs]:
    args = ModelArgs.parse(
        {
            "model": "deployments.generate:TextGenerator",
            "model_args": {"checkpoint": str(folder), "length": 256, "prefill": [8, 32], **more},
            "pt2": {"compile": {"enable": False}, "verify": {"warmup_calls": 3}},
            "batching": {"batch_sizes": list(batch_sizes), "lengths": [64, 256]},
        }
    )
    generator = args.make_model()
    assert isinstance(generator, TextGenerator)
    return generator, args


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_answers_are_those_of_transformers_alone_and_in_any_mix(tmp_path: Path, shape: str) -> None:
    model = make_checkpoint(tmp_path, shape)
    generator, args = load(tmp_path)
    models = compile_generator(generator, args, "cpu", 1)
    slots = slots_of(models, generator, args)
    ahead = Slots(
        {size: models[f"prefill {size}"] for size in (8, 32)}, models["decode"], (64, 256), 4, 8, runs_ahead=True
    )
    torch.manual_seed(2)
    prompts = [torch.randint(2, 300, (size,)).tolist() for size in (3, 1, 40, 17, 8, 50)]
    expected = [greedy(model, prompt, 200) for prompt in prompts]
    alone = ask(slots, prompts[2], 200, ends=generator.ends)
    finish(slots)
    assert [t for t in alone.tokens if t not in generator.ends] == expected[2]
    for mixing in (slots, ahead):
        mixed = []
        for prompt in prompts:  # each comes when the ones before it are at different places
            mixed.append(ask(mixing, prompt, 200, ends=generator.ends))
            for _ in range(7):
                mixing.step()
        finish(mixing)
        assert [[t for t in g.tokens if t not in generator.ends] for g in mixed] == expected


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_slot_is_cleared_unless_the_last_logits_of_it_were_looked_at(runs_ahead: bool) -> None:
    cleared: list[int] = []
    run = Counting()
    slots = Slots(
        {4: run.prefill, 16: run.prefill},
        run.decode,
        (8, 32),
        1,
        4,
        runs_ahead=runs_ahead,
        clear=lambda slot, start: cleared.append(slot),
    )

    def use(**more: Any) -> list[int]:
        ask(slots, [1], 3, **more)
        finish(slots)
        cleared.clear()
        ask(slots, [1], 3)
        finish(slots)
        return list(cleared)

    assert use() == []
    assert use(ends=frozenset([3])) == ([0] if runs_ahead else []), "one more row was run meanwhile"
    run.fails_on = {3}
    ask(slots, [1], 5)
    finish(slots)
    run.fails_on = set()
    assert use() == [] and slots._unclear == set()
    ask(slots, [1], 0)
    finish(slots)
    assert slots._unclear == {0}, "nobody has looked at any"
    gone = ask(slots, [1], 9)
    slots.step()
    slots.step()
    gone.gone = True
    finish(slots)
    assert slots._unclear == ({0} if runs_ahead else set())


@pytest.mark.parametrize(
    ("leaves", "scores", "most"), [(False, None, 5), (True, None, 5), (False, 1, 5), (False, 1, 0)]
)
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_what_is_no_number_stays_with_its_request(
    tmp_path: Path, runs_ahead: bool, leaves: bool, scores: int | None, most: int
) -> None:
    """As float16 makes of a prompt that it is too small for; the next request finds nothing of it in the slot."""
    model = make_checkpoint(tmp_path, "qwen2")
    generator, args = load(tmp_path, batch_sizes=[1])
    models = compile_generator(generator, args, "cpu", 1)
    decode = models["decode"].module
    assert isinstance(decode, DecodeOne)
    with torch.no_grad():
        decode.decoder.embedding.weight[7] = torch.nan
    slots = make_real_slots(models, 1, (64, 256), (8, 32), "cpu")
    slots._runs_ahead = runs_ahead
    bad = ask(slots, [3, 7, *[4] * 45], most, scores=scores)
    good = ask(slots, [5, 6], 5, ends=generator.ends)
    if leaves:  # before all of its prompt is in the cache
        slots.step()
        assert 0 < bad.done < len(bad.prompt)
        bad.gone = True
    steps = finish(slots)
    assert [t for t in good.tokens if t not in generator.ends] == greedy(model, [5, 6], 5)
    if not leaves:
        assert isinstance(ends(steps)[id(bad)], ModelFailed)
        assert not bad.tokens


def test_compiled_answers_are_the_same_and_nothing_compiles_while_serving(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path)
    args = ModelArgs.parse(
        {
            "model": "deployments.generate:TextGenerator",
            "model_args": {"checkpoint": str(tmp_path), "length": 128, "prefill": [16]},
            "pt2": {
                "compile": {"backend": "inductor", "only_if_faster": False},
                "fallback": "fail",
                "cache": {"enable": False},
            },
            "batching": {"batch_sizes": [1, 3]},
        }
    )
    generator = args.make_model()
    assert isinstance(generator, TextGenerator)
    models = compile_generator(generator, args, "cpu", 2)
    assert {name: {b.engine for b in m.report.buckets} for name, m in models.items()} == {
        "decode": {"inductor"},
        "prefill 16": {"inductor"},
    }
    assert {name: m.report.attention for name, m in models.items()} == {"decode": "math", "prefill 16": None}
    slots = slots_of(models, generator, args)
    torch.manual_seed(2)
    prompts = [torch.randint(2, 300, (size,)).tolist() for size in (3, 40, 17, 8)]
    asked = [ask(slots, prompt, 60, ends=generator.ends) for prompt in prompts]
    finish(slots)
    expected = [greedy(model, prompt, 60) for prompt in prompts]
    assert [[t for t in g.tokens if t not in generator.ends] for g in asked] == expected
    for compiled in models.values():
        after = compiled.report.after_ready
        assert (after.compilations, after.failed_runs, after.shapes_without_bucket) == (0, 0, 0)
