"""`ModelArgs`: what may be written under `args` in serve_config.yaml, checked before any replica starts."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from deployments.servable import Model, Servable
from optim.buckets import make_grid
from optim.config import Pt2Config
from optim.device import ensure_cache_folder
from optim.errors import ConfigError, describe
from optim.strict import read_section


@dataclass(frozen=True, kw_only=True)
class BatchingArgs:
    """How requests are put together."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Rows of the compiled buckets; batches are covered by them at the least measured cost."""
    lengths: list[int] | None = None
    """Lengths of the compiled buckets, for models whose inputs vary in length; default the servable's, else none."""
    token_budget: int | None = None
    """Most tokens (rows x length) of a bucket of several rows; default 128 on a CPU, no limit on a GPU."""
    streams: int | None = None
    """Runs at a time under load, each on its share of the CPU threads; default as many as were measured to pay."""
    wait_ms: float = 0.0
    """How long `@serve.batch` waits for more requests; waiting ones merge on the model thread anyway. Default 0."""
    max_queue: int = 64
    """Rows a replica holds, waiting and running, before it answers 503 with Retry-After. Default 64."""

    def token_budget_on(self, device: str) -> int | None:
        """Return the token budget for a kind of device."""
        # On a CPU eight texts of 64 tokens take seven times as long as one, and every bucket takes memory.
        return self.token_budget or (128 if device == "cpu" else None)


@dataclass(frozen=True, kw_only=True)
class LimitsArgs:
    """What a single request may ask for."""

    body_bytes: int = 16 * 1024 * 1024
    """Largest request body, packed or unpacked; more is answered 413 before it is read. Default 16 MiB."""
    body_s: float = 30.0
    """Seconds until a request's body has to be there; slower senders are answered 408. Default 30."""
    rows: int = 64
    """Most rows of tensors in one request. Default 64."""
    items: int = 2048
    """Most texts (photos, answers) in one request of a protocol that takes lists of them. Default 2048, as OpenAI's."""
    bytes_in_flight: int = 256 * 1024 * 1024
    """Bodies and tensors a replica holds before it answers 503 with Retry-After. Default 256 MiB."""
    timeout_s: float | None = None
    """Seconds a request may take before it is answered 408; `x-request-timeout-seconds` replaces it. Default none."""


@dataclass(frozen=True, kw_only=True)
class AuthArgs:
    """Who is let in over HTTP."""

    keys_env: str = "PT2_API_KEYS"
    """Environment variable with API keys, between commas or white space. Default PT2_API_KEYS."""
    keys_file: str | None = None
    """File with API keys, one a line; read again when it changes. Default none."""
    required: bool | None = None
    """Whether a key is needed; default: where there are keys, or the host is not loopback. false lets everybody in."""
    open_health: bool = True
    """Whether /ping, /v2/health/live and the ready paths answer without a key. Default true."""


@dataclass(frozen=True, kw_only=True)
class UserConfig:
    """What Ray Serve's `user_config` of the deployment may change while it runs; what is left out is as in `args`."""

    wait_ms: float | None = None
    """`batching.wait_ms`."""
    max_queue: int | None = None
    """`batching.max_queue`; not more than there, since `max_ongoing_requests` is derived from it."""
    body_bytes: int | None = None
    """`limits.body_bytes`."""
    body_s: float | None = None
    """`limits.body_s`."""
    rows: int | None = None
    """`limits.rows`."""
    items: int | None = None
    """`limits.items`."""
    bytes_in_flight: int | None = None
    """`limits.bytes_in_flight`."""
    timeout_s: float | None = None
    """`limits.timeout_s`."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] | None = None
    """How much `optim` and `deployments` log; default Ray Serve's own level."""


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """One served model: the `args` of one application."""

    model: str
    """Import path of the Servable, or TextGenerator: `package.module:Class`. Required."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of its constructor. Default none."""
    name: str | None = None
    """The model's name in URLs and of its deployment; default the class name as in `image-classifier`."""
    version: str = "1"
    """The model's version in URLs and replies. Default 1."""
    pt2: Pt2Config = field(default_factory=Pt2Config)
    """How it is compiled; any form TorchServe took. Default: the best engine for the replica's device."""
    batching: BatchingArgs = field(default_factory=BatchingArgs)
    """How requests are put together."""
    limits: LimitsArgs = field(default_factory=LimitsArgs)
    """What a request may ask for."""
    auth: AuthArgs = field(default_factory=AuthArgs)
    """Who is let in."""
    threads: int | None = None
    """CPU threads of the model; default the replica's `num_cpus`, at least 1."""

    @classmethod
    def parse(cls, args: Any) -> ModelArgs:
        """Read and check `args`; ConfigError names the key, the value and what is allowed."""
        if not isinstance(args, Mapping):
            raise ConfigError("args", args, "use a mapping with at least `model: package.module:Class`")
        if "model" not in args:
            raise ConfigError("args.model", None, "name the model as package.module:Class")
        rest = {key: value for key, value in args.items() if key != "pt2"}
        # The model's module is imported before pt2 is read, since it may register a torch.compile backend.
        model_class = find_model(args["model"])
        parsed = read_section("args", rest, cls, given={"pt2": lambda: Pt2Config.parse(args.get("pt2"))})
        _check(parsed)
        model = _make_model(model_class, parsed.model_args)
        if parsed.batching.lengths is None and model.default_lengths:
            parsed = replace(parsed, batching=replace(parsed.batching, lengths=list(model.default_lengths)))
        model.check_args(parsed)
        return replace(parsed, name=parsed.name or _kebab(model_class.__name__))

    def with_user_config(self, user_config: Any) -> tuple[ModelArgs, str | None]:
        """Return these args as a `user_config` changes them, and the log level; ConfigError for what it must not."""
        changes = read_section("user_config", user_config, UserConfig)
        most = self.batching.max_queue
        if changes.max_queue is not None and changes.max_queue > most:
            raise ConfigError("user_config.max_queue", changes.max_queue, f"use {most} (batching.max_queue) or less")
        given = {key: value for key, value in asdict(changes).items() if value is not None and key != "log_level"}
        batching = {key: value for key, value in given.items() if key in ("wait_ms", "max_queue")}
        limits = {key: value for key, value in given.items() if key not in batching}
        changed = replace(self, batching=replace(self.batching, **batching), limits=replace(self.limits, **limits))
        _check(changed)
        return changed, changes.log_level

    @property
    def max_ongoing_requests(self) -> int:
        """Ray Serve's limit for a replica: more than the queue, so that what is over is answered 503 at once."""
        return self.batching.max_queue + EXTRA_REQUESTS

    def check_target_ongoing_requests(self, value: float) -> None:
        """Raise ConfigError where a replica's queue would be full before Ray Serve adds another replica."""
        most = self.batching.max_queue
        if value > most:
            raise ConfigError(
                "autoscaling_config.target_ongoing_requests",
                value,
                f"use {most} (batching.max_queue) or less: what is over that is answered 503, and adds no replica",
            )

    def check_max_ongoing_requests(self, value: int) -> None:
        """Raise ConfigError where Ray Serve's limit would keep the queue, or a bucket, from filling."""
        least = self.batching.max_queue + 1
        if value < least:
            raise ConfigError(
                "max_ongoing_requests",
                value,
                f"leave it out ({self.max_ongoing_requests} is derived from batching.max_queue), or use {least} or "
                "more: below, requests wait in Ray's router, where they fill no batch and are not answered 503",
            )

    def make_model(self) -> Model:
        """Return a new instance of the model."""
        return _make_model(find_model(self.model), self.model_args)

    def make_servable(self) -> Servable:
        """Return a new instance of a model that is a servable."""
        model = self.make_model()
        assert isinstance(model, Servable), f"{self.model} is none"
        return model


#: Requests on top of the queue that a replica takes at once: health checks, metadata, and those answered 503.
EXTRA_REQUESTS = 64


def find_model(path: Any) -> type[Model]:
    """Import a model's class by `package.module:Class`; ConfigError says what went wrong."""
    if not isinstance(path, str) or not re.fullmatch(r"[\w.]+:\w+", path):
        raise ConfigError("args.model", path, "use package.module:Class")
    module_name, _, class_name = path.partition(":")
    ensure_cache_folder()  # the module may import Dynamo
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        kind, message = describe(error)
        raise ConfigError("args.model", path, f"importing {module_name} ended in {kind}: {message}") from error
    found = getattr(module, class_name, None)
    if found is None:
        names = sorted(
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Model) and value not in (Model, Servable)
        )
        raise ConfigError("args.model", path, f"{module_name} has the models {', '.join(names) or '(none)'}")
    if not isinstance(found, type) or not issubclass(found, Model):
        raise ConfigError("args.model", path, "name a subclass of deployments.servable.Servable")
    return found


def _make_model(model_class: type[Model], model_args: Mapping[str, Any]) -> Model:
    try:
        return model_class(**model_args)
    except ConfigError:
        raise
    except Exception as error:  # a TypeError for an unknown keyword, or the servable's own ValueError
        kind, message = describe(error)
        raise ConfigError("args.model_args", dict(model_args), f"{model_class.__name__}: {kind}: {message}") from error


def _check(args: ModelArgs) -> None:
    make_grid(args.batching.batch_sizes, args.batching.lengths, args.batching.token_budget)
    if args.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name):
        raise ConfigError("args.name", args.name, "use letters, digits, '.', '_' and '-'")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.version):
        raise ConfigError("args.version", args.version, "use letters, digits, '.', '_' and '-'")
    at_least = (
        ("batching.wait_ms", args.batching.wait_ms, 0),
        ("batching.streams", 1 if args.batching.streams is None else args.batching.streams, 1),
        ("batching.max_queue", args.batching.max_queue, max(args.batching.batch_sizes)),
        ("limits.body_bytes", args.limits.body_bytes, 1),
        ("limits.body_s", args.limits.body_s, 0.001),
        ("limits.rows", args.limits.rows, 1),
        ("limits.items", args.limits.items, 1),
        ("limits.bytes_in_flight", args.limits.bytes_in_flight, 1),
        ("limits.timeout_s", 1 if args.limits.timeout_s is None else args.limits.timeout_s, 0.001),
        ("threads", 1 if args.threads is None else args.threads, 1),
    )
    for key, value, least in at_least:
        if not value >= least:  # so that NaN is refused as well
            raise ConfigError(f"args.{key}", value, f"use {least} or more")
    if args.threads is not None and (args.batching.streams or 1) > args.threads:
        raise ConfigError("args.batching.streams", args.batching.streams, f"use {args.threads} (threads) or less")


def _kebab(name: str) -> str:
    """Return a class name as it reads in a URL: ImageClassifier becomes image-classifier."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()
