"""The race: engines tried best prospect first, timed side by side bucket by bucket, until the budget is spent."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from optim.buckets import Bucket
from optim.budget import Budget
from optim.builder import serving
from optim.engines import EngineJob, make_engine
from optim.engines.base import Runner
from optim.errors import is_device_error
from optim.reference import Reference
from optim.report import Refusal
from optim.timing import time_in_turn
from optim.trial import Trial

#: Engines this close count as one, and the simpler stays.
TIE = 1.05
#: An engine beside another has to be this much faster somewhere: it costs a start its build and as much memory again
#: (MiniLM: ONNX Runtime, 5 % ahead of OpenVINO at 3 of 19 buckets, cost a cold start 57 s of 175).
PAYS = 1.10
#: Engines this close to the best stay in the race, and are timed again beside each newcomer.
CLOSE = 1.15
#: An engine this much slower than the best, at the largest and the smallest bucket, is not built for the others.
HOPELESS = 1.3

#: Variants of Inductor: not tried where it was itself this much slower than the best, since they differ by less
#: (EfficientNet-Lite0: unfrozen 1.2 to 1.4 times as slow as frozen; the others change matrix products alone).
VARIANTS = ("inductor-onednn", "inductor-gemv", "inductor-unfrozen", "inductor-max-autotune")
FAR_BEHIND = 1.5

#: Simplest first: what breaks a tie. Eager is nothing added; then what torch itself brings, then single packages.
SIMPLICITY = (
    "eager",
    "channels_last",
    "inductor",
    "inductor-default",
    "inductor-onednn",
    "inductor-unfrozen",
    "inductor-gemv",
    "inductor-max-autotune",
    "aot",
    "aot-amx",
    "onnxruntime",
    "openvino",
    "ipex",
    "ipex-compile",
)


@dataclass(frozen=True)
class Round:
    """Median ms of several engines on one bucket, timed in turn; see `Race` for what they were given."""

    bucket: Bucket
    ms: Mapping[str, float]

    def __str__(self) -> str:
        return f"bucket {self.bucket}: {', '.join(f'{name} {ms:.3g} ms' for name, ms in self.ms.items())}"


@dataclass(frozen=True)
class Note:
    """Something worth knowing about an engine's code that is no refusal."""

    text: str

    def __str__(self) -> str:
        return self.text


Event = str | Round | Refusal | Note
"""What a race tells as it goes: an engine's name as its turn begins, then what became of it."""


@dataclass
class Standing:
    """What a race found: its rounds, why engines fell out, and what came to no trial."""

    rounds: list[Round] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    handed_over: list[str] = field(default_factory=list)
    """The engines of which the job's `kept` folder has what a race in another process made."""
    stretch: float = 1.0
    """How much longer it took than with cores of its own (`Budget.stretch`)."""

    def take(self, event: Event) -> None:
        """Take down what a race tells; that an engine's turn begins is no finding."""
        if isinstance(event, Round):
            self.rounds.append(event)
        elif isinstance(event, Refusal):
            self.refusals.append(event)
        elif isinstance(event, Note):
            self.notes.append(event.text)


def nearest(bucket: Bucket, others: Iterable[Bucket]) -> Bucket:
    """Return the bucket among others whose number of tokens is closest by ratio, then whose rows are."""

    def distance(other: Bucket) -> tuple[float, float, Bucket]:
        tokens = abs(math.log(other.tokens / bucket.tokens))
        return tokens, abs(math.log(other.batch_size / bucket.batch_size)), other

    return min(others, key=distance)


def not_tried(name: str, bucket: Bucket | None = None) -> Refusal:
    """Return that the budget was spent before an engine, or one of its buckets, had its turn."""
    where = None if bucket is None else str(bucket)
    return Refusal(name, "budget", where, None, "not tried: the race's budget was spent")


def rank(rounds: Sequence[Round], *, keep_eager: bool = True) -> dict[Bucket, list[str]]:
    """Return for every bucket the engines worth using, the winner first; eager, where it stands in, ends the list.

    Figures of different rounds are brought together over the engines that they share. Of engines within TIE of
    the best, eager stays if it is one; else the one that wins the most buckets (each engine costs memory and start-up),
    then the simplest. An engine whose buckets others that won serve within PAYS gives them up. With `keep_eager` false,
    eager is no candidate.
    """
    scores = {bucket: _score([r for r in rounds if r.bucket == bucket]) for bucket in {r.bucket for r in rounds}}
    racing = {
        bucket: {name: value for name, value in ms.items() if keep_eager or name != "eager"}
        for bucket, ms in scores.items()
    }
    tied: dict[Bucket, list[str]] = {}
    for bucket, ms in racing.items():
        best = min(ms.values(), default=0.0)
        tied[bucket] = [name for name, value in ms.items() if value <= best * TIE]
    winners: dict[Bucket, str] = {bucket: "eager" for bucket, names in tied.items() if "eager" in names}
    waiting = {bucket for bucket, names in tied.items() if names and bucket not in winners}
    while waiting:
        names = {name for bucket in waiting for name in tied[bucket]}
        chosen = min(names, key=lambda n: (-sum(n in tied[b] for b in waiting), _simplicity(n)))
        won = {bucket for bucket in waiting if chosen in tied[bucket]}
        winners.update(dict.fromkeys(won, chosen))
        waiting -= won
    winners = _give_up_what_hardly_pays(winners, racing)
    ranking = {}
    for bucket, winner in winners.items():
        others = sorted((ms, name) for name, ms in scores[bucket].items() if name != winner)
        names_in_order = [winner, *(name for _, name in others)]
        ranking[bucket] = names_in_order[: names_in_order.index("eager") + 1 if keep_eager else None]
    return ranking


def _give_up_what_hardly_pays(
    winners: Mapping[Bucket, str], racing: Mapping[Bucket, Mapping[str, float]]
) -> dict[Bucket, str]:
    """Return the winners without engines whose every bucket another of them serves nearly as fast."""
    left = dict(winners)
    for name, _ in reversed(Counter(winners.values()).most_common()):  # the one with the fewest buckets first
        own = [bucket for bucket, winner in left.items() if winner == name]
        others = {*left.values()} - {name, "eager"}
        instead: dict[Bucket, str] = {}
        for bucket in own if name != "eager" else ():
            ms = racing[bucket]
            limit = min(min(ms.values()) * PAYS, ms.get("eager", math.inf))
            if near := [(ms[other], other) for other in others if ms.get(other, math.inf) <= limit]:
                instead[bucket] = min(near)[1]
        if len(instead) == len(own):
            left.update(instead)
    return left


def _score(rounds: Sequence[Round]) -> dict[str, float]:
    """Return ms by engine, every engine on the scale of the best one's own rounds.

    An engine that fell out early was timed beside others than the last ones: its ms is carried over by the ratio to
    an engine that both its rounds and the later ones have, so that the machine's drift between rounds cancels.
    """
    seen: dict[str, list[float]] = {}
    for last in reversed(rounds):
        shared = [name for name in last.ms if name in seen]
        scale = median(median(seen[name]) / last.ms[name] for name in shared) if shared else 1.0
        for name, ms in last.ms.items():
            seen.setdefault(name, []).append(ms * scale)
    return {name: median(values) for name, values in seen.items()}


def _simplicity(name: str) -> tuple[int, str]:
    return (SIMPLICITY.index(name) if name in SIMPLICITY else len(SIMPLICITY), name)


class Race:
    """Runs the engines named, in order, against each other and, where they must beat it, eager; losers are closed.

    It is held on all of the job's buckets, or on those given, by the buckets' examples. Engines that take requests as
    they are, where the others pad them, are timed on an example of their average length, if there is one (MiniLM: IPEX,
    4 % faster than OpenVINO at the buckets' own lengths, served 12 to 27 % fewer texts a second).
    `tell` sees everything as it happens. In an `expendable` process an engine that runs out of memory falls out; else
    that is an error. All engines live on the calling thread, which must own the model.
    """

    def __init__(
        self,
        job: EngineJob,
        reference: Reference,
        names: Sequence[str],
        budget: Budget,
        tell: Callable[[Event], None] = lambda event: None,
        *,
        buckets: Iterable[Bucket] | None = None,
        expendable: bool = False,
    ) -> None:
        self._job, self._reference = job, reference
        self._names, self._budget = list(names), budget
        self._tell, self._expendable = tell, expendable
        self.standing = Standing()
        #: The engines close to the best of each bucket so far.
        self._in_race: dict[Bucket, list[str]] = {bucket: ["eager"] for bucket in buckets or job.samples}
        self._inductor_is_behind = 0.0
        #: Where an engine is used also if it is slower than eager, it is held against other engines alone.
        self._against_eager = job.config.compile.only_if_faster
        #: What is still alive at the end: engines that are close to the best somewhere, with what runs their buckets.
        self.trials: dict[str, Trial] = {}

    def run(self) -> Standing:
        """Race to the end of the list or of the budget."""
        for bucket in self._in_race:
            self._time(bucket)
        for name in self._names:
            if self._budget.left_s <= 0:
                self._report(not_tried(name))
                continue
            if name in VARIANTS and self._inductor_is_behind >= FAR_BEHIND:
                message = f"not tried: inductor was {self._inductor_is_behind:.2f} times as slow as the best"
                self._report(Refusal(name, "time", None, None, message))
                continue
            self._report(name)
            try:
                self._try_engine(name)
            except (MemoryError, RuntimeError) as error:
                if not is_device_error(error) or not self._expendable:
                    raise
                self._report(Refusal.of(name, "warm-up", None, error))
                self._drop(name)
            self._drop_losers()
        return self.standing

    def _try_engine(self, name: str) -> None:
        trial = Trial(make_engine(name, self._job), self._reference, self._budget)
        refusal = trial.prepare()
        if refusal:
            self._report(refusal)
            return
        self.trials[name] = trial
        # The largest first: with CUDA graphs, the smaller ones then share its memory. Then the smallest: slow at both
        # ends is slow between them.
        buckets = sorted(self._in_race, reverse=True)
        hopeless: list[str] = []
        behind: list[float] = []
        for done, bucket in enumerate([buckets[0], *reversed(buckets[1:])]):
            if done >= 2 and len(hopeless) == 2:
                message = f"not built: it was {' and '.join(hopeless)}"
                self._report(Refusal(name, "time", str(bucket), None, message))
                continue
            if self._budget.left_s <= 0:
                self._report(not_tried(name, bucket))
                continue
            for refusal in trial.prove(bucket).values():
                self._report(refusal)
            if bucket not in trial.proven:
                continue
            slower = self._time(bucket, name)
            if slower is None:
                continue
            behind.append(slower)
            if slower > HOPELESS and done < 2:
                hopeless.append(f"{slower:.2f} times as slow as the best at {bucket}")
        if name == "inductor" and behind:
            self._inductor_is_behind = min(behind)
        for note in trial.engine.notes():
            self._report(Note(note))

    def _time(self, bucket: Bucket, newcomer: str = "") -> float | None:
        """Time what is in the race on a bucket, and a newcomer; return its ms over its best rival's, if it has one."""
        racing = [name for name in self._in_race[bucket] if name == "eager" or bucket in self.trials[name].proven]
        racing = racing or ["eager"]
        names = [*racing, newcomer] if newcomer else racing
        runs = [self._runner(name, bucket) for name in names]
        times = time_in_turn(runs, self._reference.samples[bucket], self._job.info.device)
        ms = dict(zip(names, times, strict=True))
        found = Round(bucket, {name: round(value, 4) for name, value in ms.items()})
        self._report(found)
        best = min(self._of_rivals(ms, names), default=math.inf)
        self._in_race[bucket] = [name for name in names if ms[name] <= best * CLOSE]
        rivals = self._of_rivals(ms, racing)
        return ms[newcomer] / min(rivals) if newcomer and rivals else None

    def _of_rivals(self, ms: Mapping[str, float], names: Iterable[str]) -> list[float]:
        return [ms[name] for name in names if self._against_eager or name != "eager"]

    def _runner(self, name: str, bucket: Bucket) -> Runner:
        if name == "eager":
            return self._job.module
        trial = self.trials[name]
        run = serving(trial.engine, trial.proven[bucket].run)
        # With CUDA graphs another size would be one more recording.
        if not trial.engine.takes_any_size or trial.engine.reuses_outputs:
            return run
        typical = self._reference.typical(bucket)
        if typical is None:
            return run
        try:
            run(*typical)
        except Exception as error:  # a size that was not proven: where requests have it, eager will answer
            if is_device_error(error):
                raise
            return run
        return lambda *inputs: run(*typical)

    def _report(self, event: Event) -> None:
        self.standing.take(event)
        self._tell(event)

    def _drop_losers(self) -> None:
        racing = {name for names in self._in_race.values() for name in names}
        for name in [name for name in self.trials if name not in racing]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        trial = self.trials.pop(name, None)
        if trial is not None:
            trial.proven.clear()
            trial.engine.close()
        for bucket, names in self._in_race.items():
            self._in_race[bucket] = [other for other in names if other != name]
        gc.collect()
