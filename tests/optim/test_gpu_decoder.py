"""A decoder's two functions as CUDA graphs, on a machine with a GPU, PyTorch and pytest alone (see test_gpu.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from deployments.compile import compile_functions
from deployments.decoder import Decoder, DecoderConfig
from deployments.decoder_functions import make_functions, make_slots
from deployments.generation import Generation, Run, Scored, Slots, What
from deployments.int8 import quantize
from deployments.sampling import Sampler, Sampling, pick
from optim import CompiledModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("default"),  # what Triton and Inductor warn of on a GPU is not ours to judge
]

DEVICE = "cuda"
SIZES, SPANS, PIECES = (1, 4), (32, 128), (32,)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
#: Prompts' tokens and ways of sampling that differ in what steps may mix up.
CALLERS: list[tuple[int, dict[str, Any]]] = [
    (40, {"seed": 1, "top_k": 20}),
    (3, {"temperature": 0}),
    (70, {"seed": 2, "top_p": 0.8}),
    (9, {"temperature": 0, "logprobs": 3}),
    (12, {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.1, "logit_bias": ((5, 1.0),)}),
]


def make_decoder(dtype: torch.dtype) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig.read(CONFIG))
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    decoder = decoder.to(DEVICE, dtype).eval().requires_grad_(False)
    decoder.make_cache(max(SIZES), max(SPANS) + max(PIECES))
    return decoder


def compile_decoder(decoder: Decoder, spans: Sequence[int]) -> dict[str, CompiledModel]:
    functions = make_functions(decoder, SIZES, spans, PIECES)
    return compile_functions(functions, {"compile": {"only_if_faster": False}}, DEVICE)


def slots_of(runs: Mapping[str, Run], spans: Sequence[int]) -> Slots:
    return make_slots(runs, max(SIZES), spans, PIECES, DEVICE, reuse=True)


def eager_slots(decoder: Decoder) -> Slots:
    """Return slots that neither run ahead nor reuse anything."""
    runs = {name: function.module for name, function in make_functions(decoder, SIZES, SPANS, PIECES).items()}
    prefills = {size: runs[f"prefill {size}"] for size in PIECES}
    return Slots(prefills, runs["decode"], SPANS, max(SIZES), min(PIECES), DEVICE)


def ask(slots: Slots, number: int, ends: frozenset[int] = frozenset()) -> Generation:
    length, how = CALLERS[number]
    prompt = torch.randint(1000, (length,), generator=torch.Generator().manual_seed(number)).tolist()
    found = Generation(prompt, Sampler(Sampling(**how)), 20 + 5 * number, ends)
    slots.add(found)
    return found


def finish(slots: Slots) -> list[What]:
    """Return all that was told."""
    told = []
    with torch.no_grad():
        while len(slots):
            told += [what for _, what in slots.step().events]
    return told


def check_served_by_graphs(models: Mapping[str, CompiledModel]) -> None:
    for name, model in models.items():
        report = model.report
        engines = {str(row.bucket): row.engine for row in report.buckets}
        assert set(engines.values()) == {"inductor"}, (name, engines, report.refusals)
        assert not [note for note in report.notes if "CUDA graphs" in note or "exact bucket" in note], report.notes
        after = report.after_ready
        counted = (after.compilations, after.graph_recordings, after.failed_runs, after.shapes_without_bucket)
        assert counted == (0, 0, 0, 0), name
        assert after.calls, name


def test_compiled_decoding_gives_each_the_tokens_that_it_has_alone_in_eager_mode() -> None:
    decoder = make_decoder(torch.float32)
    eager = eager_slots(decoder)
    expected, some = [], frozenset(range(0, 1000, 40))  # which end about half of the answers early
    for number in range(len(CALLERS)):
        alone = ask(eager, number, some)
        finish(eager)
        expected.append(alone.tokens)
    models = compile_decoder(decoder, SPANS)
    slots = slots_of(models, SPANS)
    together = [ask(slots, number, some) for number in range(len(CALLERS))]  # of 3 and 2 rows there is no bucket
    finish(slots)
    assert [generation.tokens for generation in together] == expected
    check_served_by_graphs(models)


def test_what_prompts_share_is_reused_and_a_prompt_is_scored_between() -> None:
    decoder = make_decoder(torch.float32)
    eager = eager_slots(decoder)

    def alone(prompt: Sequence[int], how: Mapping[str, Any]) -> list[int]:
        one = Generation(prompt, Sampler(Sampling(**how)), 20)
        eager.add(one)
        finish(eager)
        return one.tokens

    models = compile_decoder(decoder, SPANS)
    slots = slots_of(models, SPANS)
    prompt = torch.randint(1000, (40,), generator=torch.Generator().manual_seed(9)).tolist()
    ways: list[dict[str, Any]] = [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_p": 0.8}, {"seed": 3, "top_k": 20}]
    answers = [Generation(prompt, Sampler(Sampling(**how)), 20) for how in ways]
    for one in answers:
        slots.add(one)
    finish(slots)
    turn = [*prompt, *answers[0].tokens, *range(9)]
    scored = Generation(turn, Sampler(Sampling(temperature=0)), 20, scores=2)
    slots.add(scored)
    told = finish(slots)
    assert isinstance(told[0], Scored) and len(told[0].prompt) == len(turn)
    gone = Generation(list(range(100)), Sampler(Sampling()), 20)
    slots.add(gone)
    with torch.no_grad():
        slots.step()
    gone.gone = True
    more = [Generation([*given, 7], Sampler(Sampling(temperature=0)), 20) for given in (turn, range(80), turn)]
    for one in more:
        slots.add(one)
    finish(slots)
    assert [one.reused for one in [*answers, scored, *more]] == [0, 32, 32, 32, 0, 64, 32, 64]
    assert [one.tokens for one in answers] == [alone(prompt, how) for how in ways]
    greedy = {"temperature": 0}
    assert scored.tokens == alone(turn, greedy)
    assert [one.tokens for one in more] == [alone(one.prompt, greedy) for one in more]
    check_served_by_graphs(models)


@pytest.mark.parametrize("is_int8", [False, True])
def test_two_bytes_and_one_are_served_by_graphs(is_int8: bool) -> None:
    decoder = make_decoder(torch.float32 if is_int8 else torch.bfloat16)
    if is_int8:
        quantize(decoder)
        decoder.to(torch.bfloat16).make_cache(max(SIZES), max(SPANS) + max(PIECES))
    models = compile_decoder(decoder, SPANS[1:])
    slots = slots_of(models, SPANS[1:])
    together = [ask(slots, number) for number in range(len(CALLERS))]
    finish(slots)
    assert [len(generation.tokens) for generation in together] == [20, 25, 30, 35, 40]
    check_served_by_graphs(models)


def test_tokens_are_picked_on_a_gpu_as_on_a_cpu() -> None:
    ways = [how for _, how in CALLERS] + [{"seed": 3}, {"seed": 4, "temperature": 1.8, "logprobs": 1}]
    logits = torch.randn(len(ways), 5000, generator=torch.Generator().manual_seed(0)) * 2
    here, there = ([Sampler(Sampling(**how)) for how in ways] for _ in range(2))
    for _ in range(10):
        found, expected = pick(there, logits.to(DEVICE)).read(), pick(here, logits).read()
        assert [one and one.token for one in found] == [one and one.token for one in expected]


def test_picking_waits_for_nothing() -> None:
    ways = [how for _, how in CALLERS] + [{"seed": 3}, {"seed": 4, "temperature": 1.8, "logprobs": 1}]
    samplers = [Sampler(Sampling(**how)) for how in ways]
    logits = torch.randn(len(ways), 5000, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        picks = pick(samplers, logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(picks.read()) == len(ways)
