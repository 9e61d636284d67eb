"""The race in a process of its own: what loses leaves nothing behind, and what hangs or crashes can be ended.

In one process the losers stay: after Inductor and IPEX had been dropped, a process that served EfficientNet-Lite0 by
OpenVINO held 1530 MB, against 950 MB of one that had never seen them (imported libraries, most of it).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import torch

from optim.buckets import Bucket
from optim.budget import Budget
from optim.child import Child, NotCarried, be_a_child, make_folder, pack, unpack
from optim.engines import EngineJob
from optim.engines.base import keep
from optim.race import Event, Note, Race, Round, Standing, not_tried
from optim.reference import Reference
from optim.report import Refusal

#: What a race may overrun its budget by, to end a timing that has begun: seconds, and a part of the budget, since its
#: process counts what it waited for a core by itself.
_OVERRUN_S, _OVERRUN = 5.0, 0.25


def race_apart(
    job: EngineJob,
    reference: Reference,
    names: Sequence[str],
    buckets: Sequence[Bucket],
    budget_s: float,
    tell: Callable[[Event], None],
) -> Standing:
    """Race the engines on some of the job's buckets in child processes; one that dies or hangs costs its engine alone.

    Raises NotCarried where the module cannot be carried over (the race then has to be held in this process).
    """
    standing = Standing()
    waiting = list(names)
    with make_folder("race") as folder:
        pack(folder, job, reference, names)
        while waiting and budget_s > 0:
            turn, stage = None, "build"
            try:
                running = _Racing(folder, waiting, buckets, budget_s)
            except OSError as error:  # there can be no more processes, or files
                end = f"could not be started ({error.strerror})"
            else:
                for event in running.events():
                    standing.take(event)
                    tell(event)
                    turn = event if isinstance(event, str) else turn
                    name = event.engine if isinstance(event, Refusal) else event
                    if name in waiting:  # it has its turn, or is said to get none
                        waiting.remove(name)
                budget_s = running.left_s
                standing.stretch = max(standing.stretch, running.stretch)
                if running.finished:
                    if running.handed_over:
                        _take_over(folder, job, standing)
                    else:
                        standing.notes.append(f"what the race made is made once more: its process {running.end}")
                    return standing
                end, stage = running.end, "budget" if running.had_no_time else "build"
            if turn is not None:
                lost = [Refusal(turn, stage, None, None, f"its process {end}")]
            elif len(waiting) == len(names):
                raise NotCarried(f"the process that was to hold the race {end}")
            else:  # not in this process either: here they would be raced that have ended a process before
                message = f"not tried: the process that was to go on with the race {end}"
                lost = [Refusal(name, stage, None, None, message) for name in waiting]
                waiting = []
            for refusal in lost:
                standing.take(refusal)
                tell(refusal)
        for late in map(not_tried, waiting):
            standing.take(late)
            tell(late)
    return standing


def _take_over(folder: Path, job: EngineJob, standing: Standing) -> None:
    """Move what the race's process left for this one to where engines look for it."""
    if job.kept is None:
        return
    for made in [path for path in folder.iterdir() if path.is_dir()]:
        try:
            made.rename(job.kept / made.name)
        except OSError as error:
            standing.notes.append(f"{made.name}: what the race made is made once more: {error}")
        else:
            standing.handed_over.append(made.name)


class _Racing:
    """One child that races `names`; `end` says how it ended where it did not finish."""

    def __init__(self, folder: Path, names: Sequence[str], buckets: Sequence[Bucket], budget_s: float) -> None:
        self.finished = False
        """Whether the race is over, and all of it told."""
        self.handed_over = False
        """Whether what its winners made is there, too."""
        self._budget_s, self._overrun_s = budget_s, _OVERRUN_S + _OVERRUN * budget_s
        sizes = [[bucket.batch_size, bucket.length] for bucket in buckets]
        order = {"names": list(names), "buckets": sizes, "budget_s": budget_s}
        (folder / "order.json").write_text(json.dumps(order))
        self._child = Child(__name__, folder)

    @property
    def end(self) -> str:
        """How the process ended."""
        return self._child.end

    @property
    def left_s(self) -> float:
        """What it has left of its budget."""
        return self._child.left_s - self._overrun_s if self._child.is_ready else self._budget_s

    @property
    def stretch(self) -> float:
        """How much longer it has taken so far because it waited for cores."""
        return self._child.stretch

    @property
    def had_no_time(self) -> bool:
        """Whether it was ended because its time was over."""
        return self._child.had_no_time

    def events(self) -> Iterator[Event]:
        """Yield what the child tells, until it ends or its time is over; then make sure that it is gone."""
        child = self._child
        try:
            for line in child.lines(self._budget_s + self._overrun_s):
                message = json.loads(line)
                kind = message.pop("event")
                if kind == "done":
                    self.handed_over = True
                    return
                if kind == "over":
                    self.finished = True
                    continue
                yield _decode(kind, message)
        finally:
            child.stop()


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

    def tell(event: Event) -> None:
        pipe.write(json.dumps(_encode(event)).encode() + b"\n")

    with torch.no_grad():
        given = unpack(folder)
        pipe.write(b"ready\n")
        budget = Budget(order["budget_s"])
        buckets = [Bucket(*size) for size in order["buckets"]]
        job = replace(given.job, kept=folder)
        race = Race(job, given.reference, order["names"], budget, tell, buckets=buckets, expendable=True)
        race.run()
        pipe.write(b'{"event": "over"}\n')
        notes: list[str] = []
        for trial in race.trials.values():
            if trial.engine.hands_over:
                keep(trial.engine, notes)  # see _take_over
            trial.engine.finish()  # nothing of this process is tidied up at its end
        for note in notes:
            tell(Note(f"what the race made is made once more: {note}"))
    pipe.write(b'{"event": "done"}\n')


if __name__ == "__main__":
    be_a_child(_hold_race)
