"""A request that begins as another one did takes over what the cache has, and gets the answer that it gets alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.compile import compile_generator, slots_of
from deployments.decoder import DecodeOne, Decoder
from deployments.decoder_functions import make_slots
from deployments.generation import Generation, Scored, Slots
from deployments.prefixes import FreeSlots, Held, Place
from deployments.sampling import Picked
from tests.deployments.test_generation import ask, finish, load
from tests.support.checkpoints import greedy, make_checkpoint


def holding(*held: list[int]) -> FreeSlots:
    """Return as many free slots as there are lists of tokens, the first of them free for longest; pieces are of 4."""
    free = FreeSlots(len(held), 4)
    slots = [free.take([0]).slot for _ in held]
    for slot, tokens in zip(slots, held, strict=True):
        free.give_back(slot, Held(tokens))
    return free


def test_a_free_slot_is_given_away_with_what_it_has_where_that_is_the_prompts() -> None:
    free = holding([1] * 9, [2] * 16, [3] * 5)
    assert free.take([1] * 20, {}) == Place(0, 0, 8)
    assert free.take([2] * 9, {}) == Place(2, 1, 8), "half of what slot 1 has stays there"
    free.give_back(0, Held([1] * 9))
    assert free.take([2] * 9, {2: Held([2] * 9)}) == Place(0, 1, 8), "of what a free one has and one that runs"
    assert free.take([2] * 9, {0: Held([2] * 9), 2: Held([2] * 9)}) == Place(1, 1, 8), "the last one is taken as it is"
    assert not free


def test_chats_that_begin_alike_keep_what_is_their_own() -> None:
    free = FreeSlots(4, 4)
    chats = {who: [[0] * 40, [who] * 30] for who in (1, 2, 3)}
    for turn in range(3):
        for who, parts in chats.items():
            prompt = [token for part in parts for token in part]
            place = free.take(prompt, {})
            had = len(prompt) - 30 if turn or who > 1 else 0  # at first what all begin with, from whoever was first
            assert place.count == had // 4 * 4, (turn, who, place)
            free.give_back(place.slot, Held(prompt))
            parts.append([10 * who + turn] * 30)


def test_of_slots_that_have_as_much_the_one_with_least_beside_it_is_given_away() -> None:
    free = holding([1] * 40, [2] * 9, [1] * 9)
    assert free.take([1] * 9, {}) == Place(2, 2, 8)


def test_an_empty_slot_is_taken_first() -> None:
    assert holding([1] * 9, [2] * 9, []).take([5], {}).slot == 2


def test_whole_pieces_are_reused_and_one_token_is_left_to_run() -> None:
    for tokens, prompt, count in (
        ([1] * 8, [1] * 8, 4),
        ([1] * 8, [1] * 9, 8),
        ([1] * 8, [1, 1, 1, 1, 1, 1, 2, 1, 1], 4),
        ([1, 1, 2], [1, 1, 2, 3, 4], 0),
        ([], [1] * 8, 0),
    ):
        assert holding(tokens).take(prompt, {}) == Place(0, 0, count), (tokens, prompt)
    assert holding([1] * 8).take([1] * 9) == Place(0, 0, 0), "not without others"


def test_what_nobody_has_seen_logits_of_is_cut_where_its_pieces_ended() -> None:
    for cuts, count in (([0, 16], 0), ([4, 8, 9], 8), ([8, 10], 8), ([10], 0), ([], 0), (None, 12)):
        free = FreeSlots(1, 4)
        assert free.take([1] * 13, {1: Held([1] * 16, cuts)}) == Place(0, 1 if count else 0, count), cuts
        free.give_back(0, Held([1] * 16, cuts))
        assert free.take([1] * 13, {}) == Place(0, 0, count), cuts


def test_the_slot_that_has_been_free_for_longest_is_taken() -> None:
    free = FreeSlots(3, 4)
    assert [free.take([1], {}).slot for _ in range(3)] == [0, 1, 2]
    for slot in (1, 2, 0):
        free.give_back(slot, Held([slot]))
    assert [free.take([1], {}).slot for _ in range(3)] == [1, 2, 0]


class Model:
    """A small checkpoint's functions, eager, and transformers' own model of it."""

    def __init__(self, folder: Path, shape: str = "llama") -> None:
        self.reference = make_checkpoint(folder, shape)
        self.generator, args = load(folder)
        models = compile_generator(self.generator, args, "cpu", 1)
        module = models["decode"].module
        assert isinstance(module, DecodeOne)
        self.decoder: Decoder = module.decoder
        self.runs = dict(models)

    def slots(self, count: int = 4, *, runs_ahead: bool = False) -> Slots:
        slots = make_slots(self.runs, count, (64, 256), (8, 32), "cpu", reuse=True)
        slots._runs_ahead = runs_ahead
        return slots

    def is_right(self, generation: Generation) -> bool:
        found = [token for token in generation.tokens if token not in self.generator.ends]
        assert generation.most is not None
        return found == greedy(self.reference, list(generation.prompt), generation.most)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("checkpoint"))


def draw(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(2, 300) for _ in range(count)]


def answer(slots: Slots, model: Model, prompt: list[int], most: int = 12, **more: Any) -> tuple[Generation, int]:
    """Return a finished generation, and how many tokens were prefilled for it."""
    generation = ask(slots, prompt, most, ends=model.generator.ends, **more)
    return generation, sum(step.prefilled for step in finish(slots))


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_the_next_turn_of_a_chat_runs_only_what_is_new(model: Model, runs_ahead: bool) -> None:
    slots = model.slots(runs_ahead=runs_ahead)
    first, ran = answer(slots, model, draw(1, 50))
    assert (ran, first.reused, model.is_right(first)) == (50, 0, True)
    turn = [*first.prompt, *first.tokens, *draw(2, 20)]
    second, ran = answer(slots, model, turn)
    kept = (50 + len(first.tokens) - 1) // 8 * 8  # the last token was picked, and is not in the cache
    assert (ran, second.reused, model.is_right(second)) == (len(turn) - kept, kept, True)
    assert answer(slots, model, draw(3, 50))[1] == 50, "another chat"
    third, ran = answer(slots, model, [*turn, *second.tokens, *draw(4, 5)])
    assert ran < 20 and model.is_right(third), "in its slot, beside the other one"


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize(("size", "kept"), [(45, 40), (31, 24)])  # in three pieces, or in one that is padded
def test_a_prompt_of_several_answers_is_run_once(model: Model, size: int, kept: int, runs_ahead: bool) -> None:
    slots = model.slots(runs_ahead=runs_ahead)
    prompt = draw(5, size)
    asked = [ask(slots, prompt, 20, ends=model.generator.ends) for _ in range(4)]
    steps = finish(slots)
    assert [generation.reused for generation in asked] == [0, kept, kept, kept]
    assert sum(step.prefilled for step in steps) == size + 3 * (size - kept)
    assert sum(step.reused for step in steps) == 3 * kept
    assert all(map(model.is_right, asked))


def test_without_it_every_prompt_is_run(model: Model) -> None:
    with pytest.raises(ValueError, match="reuse: 'no' is not true or false"):
        load(model.generator.folder, reuse="no")
    generator, args = load(model.generator.folder, reuse=False)
    slots = slots_of(compile_generator(generator, args, "cpu", 1), generator, args)
    for _ in range(2):
        assert answer(slots, model, draw(6, 40))[1] == 40


def test_who_asks_how_a_prompt_scores_gets_all_of_it(model: Model) -> None:
    slots = model.slots()
    prompt = draw(7, 40)
    answer(slots, model, prompt)
    scoring = ask(slots, prompt, 3, scores=1, ends=model.generator.ends)
    told = [what for step in finish(slots) for generation, what in step.events if generation is scoring]
    assert isinstance(told[0], Scored) and len(told[0].prompt) == 40
    assert (scoring.reused, model.is_right(scoring)) == (0, True)
    after, ran = answer(slots, model, prompt)
    assert (ran, after.reused) == (8, 32), "what it left is as good as any"


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_what_somebody_who_hung_up_has_left_is_reused(model: Model, runs_ahead: bool) -> None:
    slots = model.slots(runs_ahead=runs_ahead)
    gone = ask(slots, draw(8, 60), 50)
    slots.step()
    assert gone.done == 32
    gone.gone = True
    again, ran = answer(slots, model, draw(8, 60))
    assert (ran, again.reused, model.is_right(again)) == (28, 32, True)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_what_failed_is_not_reused_and_what_it_shared_is(tmp_path: Path, runs_ahead: bool) -> None:
    """A token makes what is no number: of all behind it, and of nothing in pieces before its own."""
    model = Model(tmp_path, "qwen2")  # whose head is another tensor
    with torch.no_grad():
        model.decoder.embedding.weight[7] = torch.nan
    slots = model.slots(1, runs_ahead=runs_ahead)
    shared = [token for token in draw(9, 40) if token != 7][:32]
    good = ask(slots, [*shared, 9, 8], 5)
    finish(slots)
    bad = ask(slots, [*shared, 7, 8], 5)
    finish(slots)
    assert (bad.reused, bad.tokens) == (32, [])
    again = ask(slots, [*shared, 9, 8], 5)
    finish(slots)
    assert (again.reused, again.tokens) == (0, good.tokens)
    last = ask(slots, [*shared, 9, 8], 5)
    finish(slots)
    assert (last.reused, last.tokens) == (32, good.tokens)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_what_is_no_number_behind_what_is_reused_is_removed(tmp_path: Path, runs_ahead: bool) -> None:
    model = Model(tmp_path, "qwen2")
    with torch.no_grad():
        model.decoder.embedding.weight[7] = torch.nan
    slots = model.slots(1, runs_ahead=runs_ahead)
    shared = [token for token in draw(9, 40) if token != 7][:32]
    fresh = model.slots()
    good = ask(fresh, [*shared, 9, 8], 5)
    finish(fresh)
    left = ask(slots, [*shared, 7, *[9] * 40], 5)
    slots.step()
    slots.step()
    assert left.done == 64, "further than what pads the next prompt's piece is written"
    left.gone = True  # before anybody has looked at its logits
    again = ask(slots, [*shared, 9, 8], 5)
    finish(slots)
    assert again.reused == 32
    assert again.tokens == good.tokens


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("end", ["asks for nothing", "hangs up", "goes on"])
def test_what_is_no_number_is_given_to_nobody_with_what_it_was_run_with(
    tmp_path: Path, end: str, runs_ahead: bool
) -> None:
    """Of one piece with such a token the keys and values of those before it are no numbers either."""
    model = Model(tmp_path, "qwen2")
    with torch.no_grad():
        model.decoder.embedding.weight[7] = torch.nan
    shared = [token for token in draw(9, 40) if token != 7][:24]
    fresh = model.slots()
    good = ask(fresh, [*shared, 9, 8], 5)
    finish(fresh)
    slots = model.slots(runs_ahead=runs_ahead)
    bad = ask(slots, [*shared, *[7] * 8, *[9] * 20], 0 if end == "asks for nothing" else 5)
    slots.step()
    *_, keys = (buffer for name, buffer in model.decoder.named_buffers() if name.endswith(".keys"))
    assert bad.done == 32 and keys[bad.slot, :, :24].isnan().any()
    bad.gone = end == "hangs up"
    asked = [ask(slots, [*shared, 9, 8], 5) for _ in range(2)] if end == "goes on" else []
    finish(slots)
    asked += [ask(slots, [*shared, 9, 8], 5) for _ in range(2)]
    finish(slots)
    assert [generation.tokens for generation in asked] == [good.tokens] * len(asked)
    assert bad.tokens == []


def test_nor_with_what_padded_it(tmp_path: Path) -> None:
    model = Model(tmp_path, "qwen2")
    with torch.no_grad():
        model.decoder.embedding.weight[0] = torch.nan  # the token that pads
    prompt = [*draw(9, 24), *range(9, 17)]
    fresh = model.slots()
    good = ask(fresh, prompt, 5)
    finish(fresh)
    assert len(good.tokens) == 5
    slots = model.slots()
    ask(slots, prompt[:24], 0)
    finish(slots)
    again = ask(slots, prompt, 5)
    finish(slots)
    assert (again.reused, again.tokens) == (0, good.tokens)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_who_hangs_up_leaves_what_it_took_over_as_it_was(model: Model, runs_ahead: bool) -> None:
    slots = model.slots(runs_ahead=runs_ahead)
    first, _ = answer(slots, model, draw(10, 90))
    gone = ask(slots, [*first.prompt, *first.tokens, *draw(11, 50)])
    slots.step()
    assert gone.reused >= 88 and not gone.tokens
    gone.gone = True
    other, ran = answer(slots, model, [*first.prompt[:60], *draw(12, 20)])
    assert (other.reused, ran, model.is_right(other)) == (56, 24, True)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_in_any_mix_of_prompts_that_share_beginnings_each_gets_its_own_answer(model: Model, runs_ahead: bool) -> None:
    slots = model.slots(3, runs_ahead=runs_ahead)
    chance = random.Random(4)
    asked: list[Generation] = []
    for _ in range(40):
        whose = chance.choice(asked) if asked and chance.random() < 0.7 else None
        kept = [*whose.prompt, *whose.tokens][: chance.randrange(1, 120)] if whose else []
        prompt = [*kept, *draw(chance.randrange(1000), chance.randrange(1, 40))]
        asked.append(ask(slots, prompt, chance.randrange(1, 25), ends=model.generator.ends))
        for _ in range(chance.randrange(12)):
            step = slots.step()
            assert all(isinstance(what, Picked | str) for _, what in step.events)
    finish(slots)
    assert sum(generation.reused > 0 for generation in asked) > 10
    assert all(map(model.is_right, asked))
