"""Work on a module in a process of its own: what the process is given, how it tells what it found, how it ends."""

from __future__ import annotations

import math
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from optim import pages
from optim.buckets import Bucket
from optim.budget import Budget
from optim.config import OPTIONAL_BACKENDS, OWN_BACKENDS
from optim.device import ensure_cache_folder, is_room_for
from optim.engines import EngineJob
from optim.errors import describe
from optim.reference import Reference
from optim.scratch import Scratch

_FILE = "job.pt"
#: What a process needs to start and load torch, the model and its eager figures, seconds.
_START_S = 120.0


class NotCarried(Exception):
    """The module cannot be handed to another process, or none can be started; the message says why."""


@dataclass(frozen=True)
class Carried:
    """What a child was given: the job with its reference, made anew, and whatever else was packed."""

    job: EngineJob
    reference: Reference
    more: Mapping[str, Any]


def make_folder(what_for: str) -> Scratch:
    """Make a folder for a job that is carried over; NotCarried where there can be none."""
    try:
        return Scratch(what_for)
    except OSError as error:  # a full disk
        raise NotCarried(f"there can be no folder for it: {error}") from error


def pack(folder: Path, job: EngineJob, reference: Reference, names: Sequence[str], **more: Any) -> None:
    """Write a job for the engines named into a folder that only this user can write; NotCarried where it cannot be."""
    try:
        import cloudpickle  # takes classes of scripts and notebooks along
    except ImportError as error:
        raise NotCarried("cloudpickle is not installed") from error
    data = {
        "module": job.module,
        "examples": reference.record(probes=bool(job.config.compile.dynamic)),
        "buckets": tuple(job.samples),
        "config": job.config,
        "phase": job.phase,
        "state": job.state,
        "threads": torch.get_num_threads(),
        "backends": _registered(names),
        "more": more,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(data, folder / _FILE, pickle_module=cloudpickle)
    except Exception as error:  # whatever the module's own classes raise
        raise NotCarried("the module cannot be pickled: {}: {}".format(*describe(error, 300))) from error


def unpack(folder: Path) -> Carried:
    """Read, in the child, what `pack` wrote: set the threads, register the backends, and run eager for its figures."""
    data = torch.load(folder / _FILE, weights_only=False, mmap=True, pickle_module=pickle)
    if pages.are_for(data["phase"]) and is_room_for((folder / _FILE).stat().st_size):
        # A file's pages cannot be moved into huge ones: engines would be timed on other memory than the server's.
        data = torch.load(folder / _FILE, weights_only=False, pickle_module=pickle)
    torch.set_num_threads(data["threads"])
    examples = data["examples"]
    for name, backend in data["backends"].items():
        if name not in torch.compiler.list_backends(exclude_tags=()):
            torch._dynamo.register_backend(backend, name=name)
    device = torch.device("cpu")
    reference = Reference(
        data["module"],
        lambda rows, length: examples[Bucket(rows, length or 0)],
        data["buckets"],
        device,
        data["state"],
    )
    return Carried(
        EngineJob.of(data["module"], data["config"], reference, device, data["phase"]), reference, data["more"]
    )


def _registered(names: Sequence[str]) -> dict[str, Any]:
    """Return the backends of torch.compile among the names that someone registered in this process."""
    others = set(names) - {"inductor", *OWN_BACKENDS, *OPTIONAL_BACKENDS}
    if not others:  # to list them imports every compiler that torch knows
        return {}
    from torch._dynamo.backends.registry import lookup_backend

    return {name: lookup_backend(name) for name in others & set(torch.compiler.list_backends(exclude_tags=()))}


class Child:
    """A process that runs `python -m <module> <folder> <pipe>`, and ends with this one; `end` says how it ended.

    `nicer` is by how much its priority is lower. The lines that it writes into the pipe are what it has to tell; the
    first of them has to be `ready`. OSError where no process can be started.
    """

    def __init__(self, module: str, folder: Path, nicer: int = 0) -> None:
        self.end = "never started"
        self.had_no_time = False
        """Whether it was given up for what it took."""
        self._budget: Budget | None = None
        self.is_ready = False
        """Whether it has said that it is."""
        self._log = folder / "stderr"
        # The same import paths as here (-P: and not the working directory before them), and not this __main__.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        threads = str(torch.get_num_threads())
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
        with self._log.open("wb") as log:
            read, write = os.pipe()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-W", "ignore", "-m", module, str(folder), str(write)],
                    stdin=subprocess.PIPE,  # its end tells the child that this process is gone
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=[write],
                    env=env,
                    # Compilers that it starts are ended with it. Not a session of its own: Linux gives each session
                    # the same share of the cores, however nice its processes are (autogroups, sched(7)).
                    process_group=0,
                )
            except OSError:
                os.close(read)
                raise
            finally:
                os.close(write)
        if nicer:
            with suppress(ProcessLookupError):  # it has ended, which will be seen
                os.setpriority(os.PRIO_PROCESS, self._process.pid, os.getpriority(os.PRIO_PROCESS, 0) + nicer)
        self._pipe = os.fdopen(read, "rb", buffering=0)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def left_s(self) -> float:
        """What is left of the seconds that it may take once it is ready."""
        return self._budget.left_s if self._budget else math.inf

    @property
    def stretch(self) -> float:
        """How much longer it has taken than with cores of its own, since it was ready or, before that, started."""
        return self._budget.stretch if self._budget else 1.0

    def lines(self, seconds: float | None, start_s: float = _START_S) -> Iterator[bytes]:
        """Yield what it tells until it ends, or has had so many seconds since it was ready (None: any number).

        It has to be ready within `start_s`. What it waits for a core does not count (see `Budget`).
        """
        told = select.poll()  # not select(2), which knows no descriptor from 1024 on: each caller has one
        told.register(self._pipe, select.POLLIN)

        def has_data(wait_s: float | None) -> bool:
            return bool(told.poll(None if wait_s is None else math.ceil(wait_s * 1000)))

        pending = b""
        self._budget = Budget(start_s, self.pid)
        while True:
            if not (self._budget.wait(has_data) if self._budget else has_data(None)):
                self.had_no_time = True
                if self.is_ready:
                    self.end = f"did not end within the {seconds:.0f} s it had and was stopped"
                else:
                    self.end = f"was not ready within {start_s:.0f} s"
                return
            data = self._pipe.read(65536)
            if not data:
                self.end = self._how_it_ended()
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                if line == b"ready" and not self.is_ready:
                    self.is_ready = True
                    self._budget = None if seconds is None else Budget(seconds, self.pid)
                else:
                    yield line

    def stop(self) -> None:
        """Make sure that it is gone, and what it started."""
        self._pipe.close()
        self.kill()
        self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()

    def kill(self) -> None:
        """End it at once; may be called while another thread reads its lines."""
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        how = f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        words = self._log.read_text(errors="replace").strip().splitlines()
        return f"{how}{f': {words[-1][:300]}' if words else ''}"


def be_a_child(work: Callable[[Path, IO[bytes]], None]) -> None:
    """Do the work of a process that `Child` has started; what it writes into the pipe is told line by line."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    ensure_cache_folder()
    folder, descriptor = sys.argv[1:3]
    with os.fdopen(int(descriptor), "wb", buffering=0) as pipe:
        # What a compiler left running must not keep the process from ending, however the work ended.
        try:
            work(Path(folder), pipe)
        except Exception:  # whatever engines and the module raise; the parent tells the last line of it
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


def _end_with_parent() -> None:
    """End this process as soon as the parent's end of stdin closes, killed or not."""
    while os.read(sys.stdin.fileno(), 1):  # not a buffered read, whose lock would abort the interpreter's own end
        pass
    os.killpg(0, signal.SIGKILL)
