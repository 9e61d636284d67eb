"""Tokens a second of a decoder with random weights: python -m benchmarks.generate [--device cuda] [--size 1b].

Eager against compiled, float against int8, for 1 and 8 callers, beside `transformers.generate` (eager, and with its
static cache and compiled) where transformers is installed; everything in one process, in turns, without Ray. The share
of bandwidth is what a step has to read (weights, and the places of the cache that are looked at) by its time, against a
copy measured in the same run, which counts what it reads and what it writes. Then what a newcomer with a prompt of 128
tokens waits for its first token while others generate, and what they wait between tokens meanwhile; and what a chat's
second turn waits, with and without reuse of what the first one left in the cache.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.machine import describe_machine
from deployments.compile import compile_functions
from deployments.decoder import Decoder, DecoderConfig
from deployments.decoder_functions import make_functions, make_slots
from deployments.generation import Generation, Run, Slots
from deployments.int8 import quantize
from deployments.sampling import Picked, Sampler, Sampling

#: Shapes by the number of their parameters; as Llama's own.
SIZES: dict[str, dict[str, Any]] = {
    "100m": {
        "vocab_size": 16_000,
        "hidden_size": 768,
        "intermediate_size": 2560,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "1b": {  # Llama 3.2 1B
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}
SPAN, PROMPT, PIECES, CALLERS = 512, 32, (32, 128), (1, 8)
#: Tokens of a chat: the first turn's prompt, its answer, and what the second turn adds.
TURNS = (256, 32, 16)


def make_decoder(size: str, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Return a decoder with random weights and a cache of 8 slots."""
    config = DecoderConfig.read({"model_type": "llama", "max_position_embeddings": 2048, **SIZES[size]})
    torch.manual_seed(0)
    with torch.device(device):
        decoder = Decoder(config)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    decoder = decoder.to(dtype).eval().requires_grad_(False)
    decoder.make_cache(max(CALLERS), SPAN + max(PIECES))
    return decoder


def measure_copy(device: torch.device) -> float:
    """Return GB/s of copying 400 MB, read and written; the best of five."""
    source = torch.ones(100_000_000, device=device)  # memory that was never written is one page, in the CPU's cache
    target = torch.zeros_like(source)
    best = 0.0
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - started))
    return best / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bytes_per_step(decoder: Decoder, callers: int) -> int:
    """Return what one step of decoding reads: every weight but the rows of the embedding, and the cache's places."""
    tensors = [*decoder.parameters(), *(b for n, b in decoder.named_buffers() if n.endswith((".weight", ".scale")))]
    weights = sum(t.nbytes for t in tensors)
    if decoder.head.weight is not decoder.embedding.weight:
        weights -= decoder.embedding.weight.nbytes
    config = decoder.config
    cache = 2 * config.layers * config.kv_heads * config.head_dim * SPAN * decoder.embedding.weight.element_size()
    return weights + callers * cache


def decode(slots: Slots, callers: int, tokens: int, vocabulary: int) -> float:
    """Return tokens a second of so many callers: from when all prompts are in the cache until the first has ended."""
    asked = [ask(slots, number, PROMPT, tokens, vocabulary) for number in range(callers)]
    while not all(generation.tokens for generation in asked):
        slots.step()
    before = sum(len(generation.tokens) for generation in asked)
    started = time.perf_counter()
    while len(slots) == callers:
        slots.step()
    speed = (sum(len(generation.tokens) for generation in asked) - before) / (time.perf_counter() - started)
    while len(slots):
        slots.step()
    return speed


def join(slots: Slots, vocabulary: int) -> tuple[float, list[float]]:
    """Return ms until a newcomer's first token beside seven others, and the ms between the others' meanwhile."""
    others = [ask(slots, number, PROMPT, 200, vocabulary) for number in range(7)]
    while not all(generation.tokens for generation in others):
        slots.step()
    slots.step()  # whose turn it is then is the newcomer's
    newcomer = ask(slots, 7, 128, 200, vocabulary)
    started = last = time.perf_counter()
    gaps: list[float] = []
    first_s = 0.0
    is_joined = False
    while not is_joined:
        step, now = slots.step(), time.perf_counter()
        if newcomer.tokens and not first_s:
            first_s = now - started
        if any(generation is not newcomer and isinstance(what, Picked) for generation, what in step.events):
            gaps.append((now - last) * 1e3)
            last, is_joined = now, bool(newcomer.tokens)
    for generation in (*others, newcomer):
        generation.gone = True
    slots.step()
    return first_s * 1e3, gaps


def chat(slots: Slots, seed: int, vocabulary: int) -> tuple[float, int]:
    """Return ms until the first token of a chat's second turn, and how many of its tokens were reused."""
    prompt, answer, more = TURNS
    first = ask(slots, seed, prompt, answer, vocabulary)
    while len(slots):
        slots.step()
    second = ask(slots, seed + 1, more, 1, vocabulary, [*first.prompt, *first.tokens])
    started = time.perf_counter()
    while not second.tokens:
        slots.step()
    waited = time.perf_counter() - started
    while len(slots):
        slots.step()
    return waited * 1e3, second.reused


def ask(slots: Slots, seed: int, prompt: int, tokens: int, vocabulary: int, before: Sequence[int] = ()) -> Generation:
    """Have so many tokens generated behind a prompt of so many, and what comes before them, greedily."""
    ids = torch.randint(vocabulary, (prompt,), generator=torch.Generator().manual_seed(seed)).tolist()
    generation = Generation([*before, *ids], Sampler(Sampling(temperature=0)), tokens)
    slots.add(generation)
    return generation


def transformers_runs(size: str, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[int, int], float]]:
    """Return `generate` of transformers, eager and with its static cache compiled: callers and tokens to tokens/s."""
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    config = transformers.LlamaConfig(max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, **SIZES[size])
    torch.manual_seed(0)
    made: Any = transformers.LlamaForCausalLM(config)
    model: Any = made.to(device=device, dtype=dtype).eval()
    eager: Any = model.forward
    # On a GPU `generate` compiles the steps of a static cache by itself; the prompt it must not (its graphs would own
    # the cache that is made on the way).
    compiled: Any = eager if device.type == "cuda" else torch.compile(eager, dynamic=False)

    def run(forward: Any, callers: int, tokens: int, cache: Any = None) -> float:
        model.forward = forward
        prompt = torch.randint(SIZES[size]["vocab_size"], (callers, PROMPT), device=device)
        seconds = []
        for count in (8, 8 + tokens):  # the prompt's part is in both
            if cache is not None:
                cache.reset()
            _wait(device)
            started = time.perf_counter()
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                past_key_values=cache,
            )
            _wait(device)
            seconds.append(time.perf_counter() - started)
        return callers * tokens / (seconds[1] - seconds[0])

    # One cache for each number of callers, of one size, else it compiles anew each time.
    caches = {callers: transformers.StaticCache(config=config, max_cache_len=SPAN) for callers in CALLERS}

    def run_eager(callers: int, tokens: int) -> float:
        return run(eager, callers, tokens)

    def run_compiled(callers: int, tokens: int) -> float:
        return run(compiled, callers, tokens, caches[callers])

    return {"transformers, eager": run_eager, "transformers, static cache, compiled": run_compiled}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=list(SIZES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default float32 on a CPU, else bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each caller that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decode", choices=["math", "efficient", "flash"], default="math", help="its attention")
    parser.add_argument(
        "--without",
        nargs="+",
        choices=["transformers", "int8", "prefill"],
        default=[],
        help="where time is short; prefill is then not compiled",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    device = torch.device(arguments.device)
    on_cpu = device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(arguments.threads)
    size = arguments.size or ("100m" if on_cpu else "1b")
    dtype = getattr(torch, arguments.dtype or ("float32" if on_cpu else "bfloat16"))
    found = f"{describe_machine()}; {size}, {str(dtype).removeprefix('torch.')}, {SPAN} places, prompt {PROMPT}"
    print(found, flush=True)
    with torch.no_grad():
        _measure(size, device, dtype, arguments)


def _measure(size: str, device: torch.device, dtype: torch.dtype, arguments: argparse.Namespace) -> None:
    decoder = make_decoder(size, device, dtype)
    parameters = sum(p.numel() for p in decoder.parameters())
    vocabulary = decoder.config.vocabulary
    eager = make_functions(decoder, CALLERS, [SPAN], PIECES)
    modules: dict[str, Run] = {name: function.module for name, function in eager.items()}
    slots = {"ours, eager": make_slots(modules, max(CALLERS), [SPAN], PIECES, device)}
    ours = {"ours": decoder}
    if "int8" not in arguments.without:
        ours["ours, int8"] = make_decoder(size, device, torch.float32)
        quantize(ours["ours, int8"])
        ours["ours, int8"].to(torch.bfloat16).make_cache(max(CALLERS), SPAN + max(PIECES))
    served, again = {}, {}
    for name, one in ours.items():
        one.fuse_attention(arguments.decode == "math")
        functions = make_functions(one, CALLERS, [SPAN], PIECES)
        eager_runs: dict[str, Run] = {n: function.module for n, function in functions.items()}
        if "prefill" in arguments.without:
            functions = {"decode": functions["decode"]}
        started = time.perf_counter()
        served[name] = compile_functions(functions, {"attention": {"decode": arguments.decode}}, device.type)
        print(f"{name}: compiled in {time.perf_counter() - started:.0f} s; ", end="")
        reports = {n: m.report for n, m in served[name].items()}
        print("; ".join(f"{n}: {', '.join(_row(b) for b in report.buckets)}" for n, report in reports.items()))
        for function, report in reports.items():
            for line in (*report.notes, *report.refusals):
                print(f"  {function}: {line}", flush=True)
        slots[name] = make_slots({**eager_runs, **served[name]}, max(CALLERS), [SPAN], PIECES, device)
        again[name] = make_slots({**eager_runs, **served[name]}, max(CALLERS), [SPAN], PIECES, device, reuse=True)
    read = {"ours, eager": decoder, **ours}
    runs: dict[str, Callable[[int, int], float]] = {
        name: lambda callers, tokens, found=found: decode(found, callers, tokens, vocabulary)  # type: ignore[misc]
        for name, found in slots.items()
    }
    if importlib.util.find_spec("transformers") and "transformers" not in arguments.without:
        runs |= transformers_runs(size, device, dtype)
    speeds = _time_in_turn(runs, arguments.tokens, arguments.rounds)
    for name, models in served.items():  # whatever is not 0 here was not served as it was compiled
        print(f"{name}, while it ran: " + "; ".join(f"{n}: {m.report.after_ready}" for n, m in models.items()))
    copy = measure_copy(device)
    print(f"{parameters / 1e6:.0f}M parameters; copy {copy:.1f} GB/s\n")
    bases = [name for name in ("transformers, eager", "ours, eager") if name in speeds]
    head = ["tokens/s", "1 caller", *(f"x {name}" for name in bases), "of the bandwidth", "8 callers", "x 1 caller"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name in sorted(speeds, key=lambda name: speeds[name][1]):
        alone, together = (speeds[name][callers] for callers in CALLERS)
        times = [f"{alone / speeds[base][1]:.2f}" for base in bases]
        share = f"{bytes_per_step(read[name], 1) * alone / copy / 1e9:.0%}" if name in read else ""
        cells = [name, f"{alone:.1f}", *times, share, f"{together:.1f}", f"{together / alone:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    print("\n| a newcomer beside seven | first token, ms | between the others' tokens, ms: median | largest |")
    print("|---|---|---|---|")
    for name, found in slots.items():
        first, gaps = join(found, vocabulary)
        print(f"| {name} | {first:.0f} | {median(gaps):.1f} | {max(gaps):.1f} |")
    print(f"\n| a chat's second turn, {sum(TURNS)} tokens | reused | first token, ms | without reuse |")
    print("|---|---|---|---|")
    for name, reusing in again.items():
        pairs = [(chat(reusing, 100 + i, vocabulary), chat(slots[name], 100 + i, vocabulary)) for i in range(0, 12, 2)]
        taken, without = (median(ms for ms, _ in some) for some in zip(*pairs[1:], strict=True))
        print(f"| {name} | {pairs[-1][0][1]} | {taken:.0f} | {without:.0f} |", flush=True)


def _row(bucket: Any) -> str:
    return f"{bucket.bucket} {bucket.engine} {bucket.ms:.1f} ms"


def _time_in_turn(
    runs: Mapping[str, Callable[[int, int], float]], tokens: int, rounds: int
) -> dict[str, dict[int, float]]:
    """Return the median tokens/s of each, by callers; the first round of each warms up and is not counted."""
    found: dict[str, dict[int, list[float]]] = {name: {callers: [] for callers in CALLERS} for name in runs}
    for number in range(rounds + 1):
        for name in list(found):
            try:
                for callers in CALLERS:
                    speed = runs[name](callers, tokens if number else 8)
                    if number:
                        found[name][callers].append(speed)
            except Exception as error:
                if name.startswith("ours"):
                    raise
                print(f"{name}: left out: {type(error).__name__}: {error}", flush=True)
                del found[name]
            gc.collect()
    return {name: {callers: median(speeds) for callers, speeds in by.items()} for name, by in found.items()}


if __name__ == "__main__":
    main()
