"""Generated tokens a second over HTTP, streamed to 1 and 8 callers: python -m benchmarks.streams.

Ours as `make serve` runs it, beside transformers streamed by Ray Serve as its documentation shows it, and ours called
in process, all with the decoder of 102M random weights that benchmarks/generate.py has. Callers ask again as soon as
they have their answer; they run on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import queue
import random
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from benchmarks.generate import CALLERS, PIECES, PROMPT, SIZES, SPAN, ask, make_decoder
from benchmarks.machine import describe_machine
from benchmarks.servers import PORT, Server, serve_run
from deployments.compile import compile_functions
from deployments.decoder_functions import make_functions, make_slots
from deployments.generation import Slots
from deployments.sampling import Picked

OURS = "pt2-serve"


def make_checkpoint(folder: Path) -> None:
    """Write a checkpoint folder with random weights, and a tokenizer whose tokens are words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    sizes = SIZES["100m"]
    config = transformers.LlamaConfig(max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, **sizes)
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words: Any = Tokenizer(models.WordLevel({f"w{i}": i for i in range(sizes["vocab_size"])}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)  # type: ignore[no-untyped-call]


@serve.deployment(max_ongoing_requests=128)
class PlainRayServe:
    """transformers' TextIteratorStreamer and a thread of the event loop's own pool, as Ray's documentation streams."""

    def __init__(self, checkpoint: str, threads: int) -> None:
        import transformers

        torch.set_num_threads(threads)
        loaded: Any = transformers.AutoModelForCausalLM
        self._model = loaded.from_pretrained(checkpoint).eval()
        self._tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)

    async def __call__(self, request: Request) -> Response:
        """Answer with the text as it comes."""
        import transformers

        wanted = await request.json()
        # Such a streamer looks once and raises Empty where nothing is there yet.
        streamer = transformers.TextIteratorStreamer(self._tokenizer, skip_prompt=True, timeout=0)
        asyncio.get_running_loop().run_in_executor(None, self._generate, wanted, streamer)
        return StreamingResponse(_consume(streamer), media_type="text/plain")

    def _generate(self, wanted: Mapping[str, Any], streamer: Any) -> None:
        ids = self._tokenizer([wanted["prompt"]], return_tensors="pt").input_ids
        many = wanted["max_tokens"]
        how = {"max_new_tokens": many, "min_new_tokens": many, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            self._model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **how)


async def _consume(streamer: Iterator[str]) -> AsyncIterator[str]:
    while True:
        try:
            for text in streamer:
                yield text
            return
        except queue.Empty:
            await asyncio.sleep(0.001)


def plain(args: dict[str, Any]) -> serve.Application:
    """Build the application for `serve run`."""
    app: serve.Application = PlainRayServe.bind(args["checkpoint"], args["threads"])  # type: ignore[attr-defined]
    return app


class Caller:
    """Asks over one connection, and notes when each token came."""

    def __init__(self, path: str, tokens: int) -> None:
        self._path, self._tokens = path, tokens
        self._connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
        self.first_s: list[float] = []
        self.between_s: list[float] = []
        self.came: list[float] = []

    def ask(self, prompt: str) -> None:
        """Read one answer to its end; RuntimeError where it has not all its tokens."""
        what = {"model": "bench", "prompt": prompt, "max_tokens": self._tokens, "temperature": 0, "stream": True}
        begin = last = time.perf_counter()
        self._connection.request("POST", self._path, json.dumps(what), {"Content-Type": "application/json"})
        reply = self._connection.getresponse()
        count = 0
        for text in (_read_events if reply.headers["Content-Type"].startswith("text/event-stream") else _read)(reply):
            now = time.perf_counter()
            words = len(text.split())
            if words:
                (self.between_s if count else self.first_s).append(now - (last if count else begin))
                count, last = count + words, now
                self.came += [now] * words
        if count != self._tokens:
            raise RuntimeError(f"{reply.status}: {count} tokens instead of {self._tokens}")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _read_events(reply: http.client.HTTPResponse) -> Iterator[str]:
    for line in reply:
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))["choices"][0]["text"]


def _read(reply: http.client.HTTPResponse) -> Iterator[str]:
    while piece := reply.read1():
        yield piece.decode()


def load(path: str, callers: int, tokens: int, seconds: float) -> tuple[float, float, float, float]:
    """Return tokens a second, ms to the first token (median), and ms between tokens (median, 99 %)."""
    dice, lock = random.Random(callers), threading.Lock()
    found = [Caller(path, tokens) for _ in range(callers)]
    begin = time.perf_counter()

    def run(caller: Caller) -> None:
        while time.perf_counter() < begin + seconds:
            with lock:
                prompt = " ".join(f"w{dice.randrange(16_000)}" for _ in range(PROMPT))
            caller.ask(prompt)
        caller.close()

    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(run, found))  # raises what one of them raised
    in_time = sum(when < begin + seconds for caller in found for when in caller.came)
    first = median(s for caller in found for s in caller.first_s)
    between = [s for caller in found for s in caller.between_s]
    return in_time / seconds, first * 1e3, median(between) * 1e3, quantiles(between, n=100)[98] * 1e3


def measure(server: Server, path: str, options: argparse.Namespace) -> list[tuple[float, float, float, float]]:
    """Load a server with each number of callers."""
    prompt = {"model": "bench", "prompt": "w1 w2", "max_tokens": 4, "temperature": 0}
    server.wait(path, json.dumps(prompt).encode(), 1200)
    load(path, max(CALLERS), 16, 1.0)
    return [load(path, callers, options.tokens, options.seconds) for callers in CALLERS]


def measure_in_process(threads: int, tokens: int, seconds: float) -> list[tuple[float, float, float, float]]:
    """Return the same of the compiled decoder, called step after step without Ray, where requests follow each other."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        decoder = make_decoder("100m", torch.device("cpu"), torch.float32)
        functions = make_functions(decoder, CALLERS, [SPAN], PIECES)
        slots = make_slots(compile_functions(functions, {}, "cpu"), max(CALLERS), [SPAN], PIECES, "cpu")
        _step_on(slots, max(CALLERS), 16, 1.0)
        return [_step_on(slots, callers, tokens, seconds) for callers in CALLERS]


def _step_on(slots: Slots, callers: int, tokens: int, seconds: float) -> tuple[float, float, float, float]:
    begin, seed = time.perf_counter(), 0
    began: dict[int, float] = {}
    last: dict[int, float] = {}
    first_s: list[float] = []
    between_s: list[float] = []
    count = 0
    while (now := time.perf_counter()) < begin + seconds:
        while len(slots) < callers:
            seed += 1
            began[id(ask(slots, seed, PROMPT, tokens, SIZES["100m"]["vocab_size"]))] = now
        step, now = slots.step(), time.perf_counter()
        for generation, what in step.events:
            if isinstance(what, Picked):
                count += 1
                (between_s if id(generation) in last else first_s).append(
                    now - last.get(id(generation), began[id(generation)])
                )
                last[id(generation)] = now
            else:
                del began[id(generation)], last[id(generation)]
    slots.fail(RuntimeError("the time is over"))
    return count / seconds, median(first_s) * 1e3, median(between_s) * 1e3, quantiles(between_s, n=100)[98] * 1e3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    print(f"{describe_machine()}; 102M parameters, float32, prompts of {PROMPT} tokens, answers of {options.tokens}\n")
    head = " | ".join(f"{n} caller{'s' * (n > 1)}" for n in CALLERS)
    print(f"| tokens/s (first token; between tokens: median, 99 %, ms) | {head} |")
    print("|---|" + "---|" * len(CALLERS), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        for name, (begin, path) in _servers(folder, options.threads).items():
            with begin() as server:
                print_row(name, measure(server, path, options))
    print_row(f"{OURS}, in process", measure_in_process(options.threads, options.tokens, options.seconds))


def print_row(name: str, found: list[tuple[float, float, float, float]]) -> None:
    """Print what `load` found, by callers."""
    cells = [f"{rate:.1f} ({first:.0f}; {mid:.1f}, {late:.1f})" for rate, first, mid, late in found]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _servers(checkpoint: str, threads: int) -> dict[str, tuple[Callable[[], AbstractContextManager[Server]], str]]:
    """Return what starts each server, and the path to post to."""

    @contextmanager
    def transformers() -> Iterator[Server]:
        args = {"checkpoint": checkpoint, "threads": threads}
        with serve_run({"import_path": "benchmarks.streams:plain", "args": args}, plain=True) as server:
            yield server

    @contextmanager
    def ours() -> Iterator[Server]:
        args = {
            "model": "deployments.generate:TextGenerator",
            "model_args": {"checkpoint": checkpoint, "length": SPAN, "prefill": list(PIECES)},
            "name": "bench",
            "threads": threads,
            "batching": {"batch_sizes": list(CALLERS), "lengths": [SPAN]},
        }
        with serve_run({"import_path": "deployments.app:build", "args": args}) as server:
            yield server

    return {"Ray Serve, transformers": (transformers, "/"), OURS: (ours, "/v1/completions")}


if __name__ == "__main__":
    main()
