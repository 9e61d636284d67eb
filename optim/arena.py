"""The race in a process of its own: what loses leaves nothing behind, and what hangs or crashes can be ended.

In one process the losers stay: after Inductor and IPEX had been dropped, a process that served EfficientNet-Lite0 by
OpenVINO held 1530 MB, against 950 MB of one that had never seen them (imported libraries, most of it).
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from optim.buckets import Bucket
from optim.config import OPTIONAL_BACKENDS, OWN_BACKENDS
from optim.engines import EngineJob
from optim.errors import describe
from optim.race import Event, Note, Race, Round, Standing, not_tried
from optim.reference import Reference
from optim.report import Refusal

#: What a race may overrun its budget by, to end a timing that has begun, seconds.
_OVERRUN_S = 5.0
#: What a process needs to start and load torch, the model and its eager figures, which the budget does not count.
_START_S = 120.0


class NoArena(Exception):
    """The module cannot be handed to another process, or none can be started; the message says why."""


def race_apart(
    job: EngineJob,
    reference: Reference,
    names: Sequence[str],
    buckets: Sequence[Bucket],
    budget_s: float,
    tell: Callable[[Event], None],
) -> Standing:
    """Race the engines on some of the job's buckets in child processes; one that dies or hangs costs its engine alone.

    Raises NoArena where the module cannot be carried over (the race then has to be held in this process).
    """
    standing = Standing()
    waiting = list(names)
    with tempfile.TemporaryDirectory(prefix="pt2-race-") as folder:  # mode 0700: what is unpickled is our own
        _pack(Path(folder), job, reference, names)
        while waiting and budget_s > 0:
            running = _Process(Path(folder), waiting, buckets, budget_s)
            turn = None
            for event in running.events():
                standing.take(event)
                tell(event)
                turn = event if isinstance(event, str) else turn
                name = event.engine if isinstance(event, Refusal) else event
                if name in waiting:  # it has its turn, or is said to get none
                    waiting.remove(name)
            budget_s -= running.raced_s
            if running.finished:
                return standing
            if turn is None:
                raise NoArena(f"the process that was to hold the race {running.end}")
            lost = Refusal(turn, "build", None, None, f"its process {running.end}")
            standing.take(lost)
            tell(lost)
        for late in map(not_tried, waiting):
            standing.take(late)
            tell(late)
    return standing


def _pack(folder: Path, job: EngineJob, reference: Reference, names: Sequence[str]) -> None:
    try:
        import cloudpickle  # takes classes of scripts and notebooks along
    except ImportError as error:
        raise NoArena("cloudpickle is not installed") from error
    data = {
        "module": job.module,
        "examples": reference.record(probes=bool(job.config.compile.dynamic)),
        "buckets": tuple(job.samples),
        "config": job.config,
        "phase": job.phase,
        "threads": torch.get_num_threads(),
        "backends": _registered(names),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(data, folder / "job.pt", pickle_module=cloudpickle)
    except Exception as error:  # whatever the module's own classes raise
        raise NoArena("the module cannot be pickled: {}: {}".format(*describe(error, 300))) from error


def _registered(names: Sequence[str]) -> dict[str, Any]:
    """Return the backends of torch.compile among the names that someone registered in this process."""
    from torch._dynamo.backends.registry import lookup_backend

    others = set(names) & set(torch.compiler.list_backends(exclude_tags=())) - {*OWN_BACKENDS, *OPTIONAL_BACKENDS}
    return {name: lookup_backend(name) for name in others if name != "inductor"}


class _Process:
    """One child that races `names`; `end` says how it ended where it did not finish."""

    def __init__(self, folder: Path, names: Sequence[str], buckets: Sequence[Bucket], budget_s: float) -> None:
        self.finished = False
        self.end = "never started"
        self.raced_s = 0.0
        self._budget_s = budget_s
        self._log = folder / "stderr"
        sizes = [[bucket.batch_size, bucket.length] for bucket in buckets]
        order = {"names": list(names), "buckets": sizes, "budget_s": budget_s}
        (folder / "order.json").write_text(json.dumps(order))
        read, write = os.pipe()
        # The same import paths as here, and not this process's __main__.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        threads = str(torch.get_num_threads())
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "optim.arena", str(folder), str(write)],
                stdin=subprocess.PIPE,  # its end tells the child that this process is gone
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=[write],
                env=env,
                start_new_session=True,  # compilers that it starts are ended with it
            )
        os.close(write)
        self._pipe = os.fdopen(read, "rb", buffering=0)

    def events(self) -> Iterator[Event]:
        """Yield what the child tells, until it ends or its time is over; then make sure that it is gone."""
        try:
            for line in self._lines():
                message = json.loads(line)
                kind = message.pop("event")
                if kind == "done":
                    self.finished = True
                    return
                yield _decode(kind, message)
        finally:
            self._stop()

    def _lines(self) -> Iterator[bytes]:
        pending = b""
        deadline = time.monotonic() + _START_S
        started: float | None = None
        while True:
            ready, _, _ = select.select([self._pipe], [], [], max(deadline - time.monotonic(), 0))
            if started is not None:
                self.raced_s = time.monotonic() - started
            if not ready:
                self.end = f"did not end within the race's budget of {self._budget_s:.0f} s and was stopped"
                if started is None:
                    self.end = f"was not ready within {_START_S:.0f} s"
                return
            data = self._pipe.read(65536)
            if not data:
                self.end = self._how_it_ended()
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                if line == b"ready":
                    started = time.monotonic()
                    deadline = started + self._budget_s + _OVERRUN_S
                else:
                    yield line

    def _how_it_ended(self) -> str:
        code = self._child.wait()
        how = f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        words = self._log.read_text(errors="replace").strip().splitlines()
        return f"{how}{f': {words[-1][:300]}' if words else ''}"

    def _stop(self) -> None:
        self._pipe.close()
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        if self._child.stdin:
            self._child.stdin.close()


def _decode(kind: str, message: dict[str, Any]) -> Event:
    if kind == "turn":
        return str(message["engine"])
    if kind == "round":
        return Round(Bucket(*message["bucket"]), message["ms"])
    return Note(message["text"]) if kind == "note" else Refusal(**message)


def _encode(event: Event) -> dict[str, Any]:
    if isinstance(event, str):
        return {"event": "turn", "engine": event}
    if isinstance(event, Round):
        return {"event": "round", "bucket": [event.bucket.batch_size, event.bucket.length], "ms": dict(event.ms)}
    return {"event": "note" if isinstance(event, Note) else "refusal", **asdict(event)}


def _hold_race(folder: Path, pipe: IO[bytes]) -> None:
    """Be the child: load the job, measure eager, race, and tell every event as a line of JSON."""
    order = json.loads((folder / "order.json").read_text())
    # Written by our parent, in a folder that only this user can write.
    data = torch.load(folder / "job.pt", weights_only=False, mmap=True, pickle_module=pickle)
    torch.set_num_threads(data["threads"])
    examples = data["examples"]
    for name, backend in data["backends"].items():
        if name not in torch.compiler.list_backends(exclude_tags=()):
            torch._dynamo.register_backend(backend, name=name)

    def tell(event: Event) -> None:
        pipe.write(json.dumps(_encode(event)).encode() + b"\n")

    with torch.no_grad():
        device = torch.device("cpu")
        reference = Reference(
            data["module"], lambda rows, length: examples[Bucket(rows, length or 0)], data["buckets"], device
        )
        job = EngineJob.of(data["module"], data["config"], reference, device, data["phase"])
        pipe.write(b"ready\n")
        deadline = time.monotonic() + order["budget_s"]
        buckets = [Bucket(*size) for size in order["buckets"]]
        Race(job, reference, order["names"], deadline, tell, buckets=buckets, expendable=True).run()
    pipe.write(b'{"event": "done"}\n')


def _end_with_parent() -> None:
    """End this process as soon as the parent's end of stdin closes, killed or not."""
    while os.read(sys.stdin.fileno(), 1):  # not a buffered read, whose lock would abort the interpreter's own end
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Hold the race described in the folder given; its second argument is the pipe to tell it on."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder, descriptor = sys.argv[1:3]
    with os.fdopen(int(descriptor), "wb", buffering=0) as pipe:
        _hold_race(Path(folder), pipe)
        # What a compiler left running must not keep the race from ending.
        os._exit(0)


if __name__ == "__main__":
    main()
