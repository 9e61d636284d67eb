"""What a replica counts, through Ray Serve's metrics (which tag application, deployment and replica themselves)."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from ray.serve.metrics import Counter, Gauge, Histogram

from deployments.batch import BatchRecord
from deployments.generation import Step
from deployments.sampling import Picked
from optim.report import AfterReady, CompileReport

logger = logging.getLogger(__name__)
#: How much later than they happened runs are counted, seconds.
_LATER_S = 0.1
_MS: list[float] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
_SHARES: list[float] = [0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75]
_ROWS: list[float] = [1, 2, 4, 8, 16, 32, 64, 128]


class ModelMetrics:
    """The metrics of one replica; `record_batch` may come from any thread, the rest comes from the event loop."""

    def __init__(self, model: str) -> None:
        tags = {"tag_keys": ("model",)}
        self._rejected = Counter(
            "pt2_rejected_total", "Requests answered 503 because the queue or the memory for them was full.", **tags
        )
        self._failed = Counter("pt2_failed_total", "Requests that the model or the servable failed on.", **tags)
        self._dropped = Counter(
            "pt2_dropped_total",
            "Requests given up, by reason: their deadline passed, or their caller had gone away.",
            tag_keys=("model", "reason"),  # type: ignore[arg-type]  # Ray annotates one key, and takes any number
        )
        self._refused_changes = Counter("pt2_user_config_refused_total", "Hot changes that were refused.", **tags)
        self._batch_rows = Histogram("pt2_batch_rows", "Rows of each run of the model.", boundaries=_ROWS, **tags)
        self._stream_runs = Counter("pt2_stream_runs_total", "Runs on a share of the threads, beside others.", **tags)
        self._run_ms = Histogram(
            "pt2_run_ms",
            "Time of each run of the model, ms; of what generates on a GPU, from step to step.",
            boundaries=_MS,
            **tags,
        )
        self._wait_ms = Histogram("pt2_queue_wait_ms", "Wait of each request for its run, ms.", boundaries=_MS, **tags)
        self._first_token_ms = Histogram(
            "pt2_first_token_ms",
            "From a prompt's arrival to its answer's first token, ms.",
            boundaries=_MS,
            **tags,
        )
        self._padding = Histogram(
            "pt2_padding_fraction", "Share of each run that was padding, 0 to 1.", boundaries=_SHARES, **tags
        )
        self._tokens = Counter(
            "pt2_tokens_total",
            "Tokens (rows, where there is no length), by kind: asked for, padding, generated, reused (not run again).",
            tag_keys=("model", "kind"),  # type: ignore[arg-type]
        )
        self._eager_buckets = Gauge(
            "pt2_eager_buckets", "Buckets served eager although they were compiled for.", **tags
        )
        self._compilations = Gauge(
            "pt2_compilations_after_ready", "Compilations since ready, CUDA graphs too; should stay 0.", **tags
        )
        self._fallbacks = Gauge(
            "pt2_fallback_calls",
            "Calls since ready that ran eager instead, by reason.",
            tag_keys=("model", "reason"),  # type: ignore[arg-type]
        )
        self._background = Gauge(
            "pt2_background",
            "1 for how far compiling in the background is: compiling, moving, done or failed.",
            tag_keys=("model", "state"),  # type: ignore[arg-type]
        )
        self._bucket_ms = Gauge(
            "pt2_bucket_ms",
            "Measured ms of each bucket's engine; 0 for one that serves it no more.",
            tag_keys=("model", "bucket", "engine"),  # type: ignore[arg-type]
        )
        metrics = (
            self._rejected,
            self._failed,
            self._dropped,
            self._refused_changes,
            self._batch_rows,
            self._stream_runs,
            self._run_ms,
            self._wait_ms,
            self._first_token_ms,
            self._padding,
            self._tokens,
            self._eager_buckets,
            self._compilations,
            self._fallbacks,
            self._background,
            self._bucket_ms,
        )
        self._served: dict[str, str] = {}
        self._eager: dict[str, int] = {}
        for metric in metrics:
            metric.set_default_tags({"model": model})

    def record_batch(self, batch: BatchRecord) -> None:
        """Count one run."""
        self._batch_rows.observe(batch.rows)
        self._run_ms.observe(batch.run_s * 1e3)
        self._padding.observe(batch.padding)
        self._tokens.inc(batch.tokens, tags={"kind": "asked"})
        if batch.tokens_run > batch.tokens:  # Ray refuses to count 0
            self._tokens.inc(batch.tokens_run - batch.tokens, tags={"kind": "padding"})
        if batch.on_stream:
            self._stream_runs.inc()
        for wait_s in batch.waits_s:
            self._wait_ms.observe(wait_s * 1e3)

    def count(self, what: str) -> None:
        """Count what became of a request, or of a change: `rejected`, `failed`, `deadline`, `gone`, `refused`."""
        if what in ("deadline", "gone"):
            self._dropped.inc(tags={"reason": what})
        else:
            {"rejected": self._rejected, "failed": self._failed, "refused": self._refused_changes}[what].inc()

    def record_report(self, report: CompileReport, function: str = "") -> None:
        """Publish what serves each bucket now, of a model or of one of its functions."""
        for bucket in report.buckets:
            name = f"{bucket.batch_size}x{bucket.length}" if bucket.length else str(bucket.batch_size)
            name = f"{function} {name}".lstrip()
            before = self._served.get(name, bucket.engine)
            if before != bucket.engine:
                self._bucket_ms.set(0.0, tags={"bucket": name, "engine": before})
            self._served[name] = bucket.engine
            self._bucket_ms.set(bucket.ms or 0.0, tags={"bucket": name, "engine": bucket.engine})
        wanted = bool(report.candidates)
        self._eager[function] = sum(b.engine == "eager" for b in report.buckets) if wanted else 0
        self._eager_buckets.set(sum(self._eager.values()))
        for state in ("compiling", "moving", "done", "failed") if report.background else ():
            self._background.set(float(state == report.background), tags={"state": state})

    def record_after_ready(self, after: Sequence[AfterReady]) -> None:
        """Publish what should stay 0, of all that was compiled."""
        self._compilations.set(sum(one.compilations + one.graph_recordings for one in after))
        self._fallbacks.set(sum(one.refused_compilations for one in after), tags={"reason": "compilation"})
        self._fallbacks.set(sum(one.failed_runs for one in after), tags={"reason": "failure"})
        self._fallbacks.set(sum(one.shapes_without_bucket for one in after), tags={"reason": "shape"})

    def record_step(self, step: Step, seconds: float) -> None:
        """Count one step of a model that generates."""
        if step.rows:
            self._batch_rows.observe(step.rows)
        if step.rows or step.prefilled or step.events:
            self._run_ms.observe(seconds * 1e3)
        if step.prefilled:
            self._tokens.inc(step.prefilled, tags={"kind": "asked"})
        if step.reused:
            self._tokens.inc(step.reused, tags={"kind": "reused"})
        if picked := sum(isinstance(what, Picked) and not what.is_end for _, what in step.events):
            self._tokens.inc(picked, tags={"kind": "generated"})

    def record_first_token(self, seconds: float) -> None:
        """Count how long a request waited for the first token of its answer."""
        self._first_token_ms.observe(seconds * 1e3)


class LateCount:
    """Counts runs a moment after they happened, on a thread of the pool.

    At once, on the model thread, it takes Python's lock five times while the reply to that run is being made, which one
    client waits for (issue 4). `add` may be called from any thread, the rest from the event loop that it is made on.
    """

    def __init__(self, record: Callable[[BatchRecord], None], pool: Executor) -> None:
        self._record, self._pool = record, pool
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[BatchRecord] = deque()
        self._is_due = False
        self._is_over = False

    def add(self, batch: BatchRecord) -> None:
        """Take down a run."""
        self._waiting.append(batch)
        # Two threads may both find it false: then what waits is counted once, and nothing the second time.
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon_threadsafe(self._loop.call_later, _LATER_S, self._begin)

    def close(self) -> None:
        """Count what is left; nothing may be added any more."""
        self._is_over = True
        self._count()

    def _begin(self) -> None:
        self._is_due = False  # before it looks: what comes from now on is counted next time at the latest
        if not self._is_over:
            self._pool.submit(self._count)

    def _count(self) -> None:
        while True:
            try:
                batch = self._waiting.popleft()
            except IndexError:
                return
            try:
                self._record(batch)
            except Exception:  # a metric that cannot be written must not keep others from it
                logger.exception("a run could not be counted")
