"""`Pt2Config`: the strict, documented form of the `pt2` section, and the parser of TorchServe's forms."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal, get_origin

import torch

from optim.device import ensure_cache_folder
from optim.errors import ConfigError
from optim.strict import read_section

#: Names for `compile.backend` that are ours: measured choice, no compilation, channels_last without compilation, IPEX
#: traced or through torch.compile, OpenVINO and ONNX Runtime converted, Inductor as the race varies it, AOTInductor.
OWN_BACKENDS = (
    "auto",
    "eager",
    "channels_last",
    "ipex",
    "ipex-compile",
    "openvino",
    "onnxruntime",
    "inductor-default",
    "inductor-onednn",
    "inductor-gemv",
    "aot-amx",
    "inductor-unfrozen",
    "inductor-max-autotune",
    "aot",
)

#: Backends that exist but come in packages of their own, and the module whose import registers them with torch:
#: naming one that is absent is a fallback, not a mistake.
OPTIONAL_BACKENDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "ipex": ("intel-extension-for-pytorch", "intel_extension_for_pytorch"),
        "onnxrt": ("onnxruntime and onnxscript", "onnxruntime"),
        "openvino": ("openvino", "openvino.torch"),
        "openxla": ("torch-xla", "torch_xla"),
        "openxla_eval": ("torch-xla", "torch_xla"),
        "tensorrt": ("torch-tensorrt", "torch_tensorrt"),
        "torch_tensorrt": ("torch-tensorrt", "torch_tensorrt"),
        "torchxla_trace_once": ("torch-xla", "torch_xla"),
        "hpu_backend": ("habana-torch-plugin", "habana_frameworks.torch"),
        "tvm": ("apache-tvm", "tvm"),
    }
)


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """What `torch.compile` and its peers are asked to do."""

    enable: bool = True
    """Compile at all; `false` serves the module eager. Default true (TorchServe demanded it, we do not)."""
    backend: str = "auto"
    """`auto` (the measured best), `eager`, `inductor`, `openvino`, `onnxruntime`, `ipex`, or any that torch lists."""
    mode: str | None = None
    """Inductor's mode: `default`, `reduce-overhead` (CUDA graphs), `max-autotune`, `max-autotune-no-cudagraphs`."""
    options: Mapping[str, Any] | None = None
    """Inductor options by name, as `torch.compile(options=...)`; not together with `mode`."""
    dynamic: bool | None = None
    """`true`: torch.compile makes code for any size up to the largest bucket; default: for exactly each bucket."""
    fullgraph: bool = False
    """Refuse (and so serve eager) a module that Dynamo cannot trace as one graph. Default false."""
    freeze: bool = True
    """Freeze weights into Inductor's code on CPU (tried: 25.8 ms against 40.5 ms without). Default true."""
    when: Literal["start", "background"] = "start"
    """`start`: ready when compiled; `background`: ready at once and eager, another process compiles, and each bucket
    moves over when it is proven (on a CPU; where the cache has a plan, both start warm). Default start."""
    only_if_faster: bool = True
    """Use an engine on a bucket only where it is at least as fast as eager. Default true."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Ahead-of-time compilation: TorchServe's `export` section."""

    aot_compile: bool = False
    """Compile ahead of time with AOTInductor (torch.export) instead of `torch.compile`. Default false."""
    path: str | None = None
    """A package to load instead of compiling (`torch._inductor.aoti_compile_and_package`); it is code, so trust it."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """How a compiled result is held against eager's."""

    tolerance: float | None = None
    """Allowed error, relative to the value plus the RMS; default 1e-3 (float32), 2e-2 (half), 1e-6 (float64)."""
    warmup_calls: int | None = None
    """Calls of each bucket before it is verified, 3 or more. Default 1 for engines whose first is like all, else 3."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How `backend: auto` chooses."""

    budget_s: float | None = None
    """Seconds the race may take, waits for a core not counted; default 60. Given, it bounds a named backend too."""
    engines: list[str] | None = None
    """The engines that race, best prospect first; default all that the device supports."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where what compiling found and made is kept, so that the next replica verifies it instead of racing."""

    enable: bool = True
    """Keep and use it. Default true."""
    folder: str | None = None
    """A folder of this user's that others cannot write to; default pt2-serve in $XDG_CACHE_HOME, else in ~/.cache."""
    uri: str | None = None
    """A folder of any storage that fsspec knows (file, s3, gs, ...), read at a start and written by whoever compiled
    first; entries are signed with the key in the environment variable PT2_CACHE_KEY. Default none."""
    not_before: str | None = None
    """A time ("2026-11-30T12:00Z", in quotes; UTC unless it says): once it has come, plans made before are made anew.
    Default none."""
    max_gb: float = 10.0
    """What it may hold, 10^9 bytes; the entries not used for longest are removed. Default 10."""

    def oldest(self) -> float:
        """Return `not_before` in seconds since the epoch; ValueError where it is no time.

        It is 0 without it, and until it has come: each plan that is made till then would be too old at once.
        """
        if self.not_before is None:
            return 0.0
        found = datetime.fromisoformat(self.not_before)
        oldest = (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        return oldest if oldest <= time.time() else 0.0


Kernel = Literal["math", "flash", "efficient", "cudnn"]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which SDPA kernel compiled code may use, by what a call of the model is; eager is never restricted."""

    forward: Literal["flash", "efficient", "cudnn"] | None = None
    """A whole forward pass; default PyTorch's choice. `math` is refused: it holds every score in memory."""
    prefill: Literal["flash", "efficient", "cudnn"] | None = None
    """The prefill of a prompt; as `forward`."""
    decode: Kernel | None = "math"
    """Decoding one token; default `math`, which Inductor fuses."""


@dataclass(frozen=True, kw_only=True)
class Pt2Config:
    """The `pt2` section of one model.

    Build it with `parse` from whatever stands in the YAML file; errors are `ConfigError`.
    """

    compile: CompileConfig = field(default_factory=CompileConfig)
    """What to compile with."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """Ahead-of-time compilation."""
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    """How the result is proven."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """How `auto` chooses."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """What is kept for the next start."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Which attention kernels compiled code may use."""
    autocast: bool = False
    """Run compiled code under bf16 autocast where the device has bf16 (eager stays as it is). Default false."""
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """Float32 products in compiled code: `high` allows TF32 (TorchServe's setting), `medium` bf16, `highest` not even
    the 16 bits of `aot-amx`. Default none of them."""
    fallback: Literal["eager", "fail"] = "eager"
    """After a compile failure: serve `eager` with the reason in the report, or `fail` to start. Default eager."""
    strict: bool = False
    """Make every silent loss an error: a compile failure, a skipped CUDA graph, a call that compiles. Default false."""

    @classmethod
    def parse(cls, section: Any = None) -> Pt2Config:
        """Read any form TorchServe took, or our own; the argument is never changed.

        Forms: nothing; a backend's name; a flat mapping of torch.compile arguments; `{compile: {...}}`;
        `{export: {aot_compile: true}}`, or `export` for that. Raises ConfigError naming key, value and what is allowed.
        """
        ensure_cache_folder()  # the lists of backends and options are Dynamo's
        if isinstance(section, Pt2Config):
            return section
        if section is None:
            section = {}
        if section == "export":  # what TorchServe's example of compiled artifacts said before there was `export:`
            section = {"export": {"aot_compile": True}}
        if isinstance(section, str):
            section = {"compile": {"backend": section}}
        if not isinstance(section, Mapping):
            raise ConfigError("pt2", section, "use a backend's name or a mapping such as {compile: {enable: true}}")
        config = read_section("pt2", _unflatten(section), cls, prepare={"compile": _prepare_compile})
        _check(config, section)
        return config

    @property
    def must_compile(self) -> bool:
        """Whether a start fails where a bucket could not be compiled."""
        return self.strict or self.fallback == "fail"

    def at_start(self) -> Pt2Config:
        """Return the same with nothing left to the background: for whoever wants to see the result."""
        return replace(self, compile=replace(self.compile, when="start"))

    def to_dict(self) -> dict[str, Any]:
        """Return the whole section as plain data."""
        return asdict(self)


def _unflatten(section: Mapping[Any, Any]) -> dict[Any, Any]:
    """Move torch.compile arguments written at the top level (TorchServe's older form) under `compile`."""
    flat_keys = {*CompileConfig.__dataclass_fields__, "disable"}
    flat = {k: v for k, v in section.items() if k in flat_keys}
    rest = {k: v for k, v in section.items() if k not in flat_keys}
    if not flat:
        return rest
    if "compile" in rest:
        key = next(iter(flat))
        raise ConfigError(f"pt2.{key}", flat[key], f"write it inside pt2.compile, as pt2.compile.{key}")
    return {**rest, "compile": flat}


def _prepare_compile(section: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Translate torch.compile's own `disable` into `enable`."""
    if "disable" not in section:
        return section
    if "enable" in section:
        raise ConfigError("pt2.compile.disable", section["disable"], "use enable alone")
    if not isinstance(section["disable"], bool):
        raise ConfigError("pt2.compile.disable", section["disable"], "use true or false")
    return {**{k: v for k, v in section.items() if k != "disable"}, "enable": not section["disable"]}


def _check(config: Pt2Config, section: Mapping[Any, Any]) -> None:
    compile_ = config.compile
    if config.export.aot_compile and compile_.enable and _asks_for_compile(section):
        # TorchServe silently dropped one of the two.
        raise ConfigError(
            "pt2.export.aot_compile", True, "not together with pt2.compile; remove one, or set compile.enable: false"
        )
    if compile_.mode is not None and compile_.options is not None:
        raise ConfigError(
            "pt2.compile.mode",
            compile_.mode,
            "torch.compile takes mode or options, not both; modes can be written as options "
            "(reduce-overhead is {triton.cudagraphs: true})",
        )
    _check_backend("pt2.compile.backend", compile_.backend)
    if compile_.backend == "auto" or compile_.backend.startswith("inductor"):
        _check_mode(compile_.mode)
        _check_options(compile_.options)
    if config.verify.warmup_calls is not None and config.verify.warmup_calls < 3:
        raise ConfigError("pt2.verify.warmup_calls", config.verify.warmup_calls, "use 3 or more")
    if config.tune.budget_s is not None and not config.tune.budget_s > 0:
        raise ConfigError("pt2.tune.budget_s", config.tune.budget_s, "use seconds above 0")
    for i, engine in enumerate(config.tune.engines or ()):
        _check_backend(f"pt2.tune.engines[{i}]", engine, not_allowed=("auto", "eager"))
    if config.tune.engines and (compile_.backend != "auto" or config.export.aot_compile):
        raise ConfigError("pt2.tune.engines", config.tune.engines, "only with pt2.compile.backend: auto")
    if compile_.when == "background":
        _check_background(config)
    if config.export.path is not None and not config.export.aot_compile:
        raise ConfigError("pt2.export.path", config.export.path, "only with pt2.export.aot_compile: true")
    try:
        config.cache.oldest()
    except ValueError as error:
        raise ConfigError("pt2.cache.not_before", config.cache.not_before, f"use an ISO 8601 time ({error})") from error
    if not config.cache.max_gb > 0:
        raise ConfigError("pt2.cache.max_gb", config.cache.max_gb, "use gigabytes above 0")
    tolerance = config.verify.tolerance
    if tolerance is not None and not 0 < tolerance < 1:
        raise ConfigError("pt2.verify.tolerance", tolerance, "use a number between 0 and 1")


def _check_background(config: Pt2Config) -> None:
    """Refuse what a replica that is ready before it is compiled cannot do."""
    key, value = "pt2.compile.when", "background"
    if config.must_compile:
        other = "pt2.strict: true" if config.strict else "pt2.fallback: fail"
        raise ConfigError(key, value, f"not together with {other}: the replica is ready before anything can fail")
    if not config.cache.enable:
        raise ConfigError(key, value, "not together with pt2.cache.enable: false, where the result would go")


def _asks_for_compile(section: Mapping[Any, Any]) -> bool:
    """Say whether a section has settings of torch.compile; when to compile is none of them."""
    given = section.get("compile", {})
    keys = {key for key in section if key in ("disable", *CompileConfig.__dataclass_fields__)}
    keys |= {*given} if isinstance(given, Mapping) else {"compile"}
    return bool(keys - {"when"})


def _check_backend(key: str, backend: str, not_allowed: tuple[str, ...] = ()) -> None:
    # To list them imports every compiler that torch knows: 110 MB of a process that needs none of them.
    known = backend in {"inductor", *OWN_BACKENDS, *OPTIONAL_BACKENDS}
    if backend not in not_allowed and (known or backend in torch.compiler.list_backends(exclude_tags=())):
        return
    usual = [*OWN_BACKENDS, *torch.compiler.list_backends()]
    names = sorted({*usual, *OPTIONAL_BACKENDS} - {*not_allowed})
    close = difflib.get_close_matches(backend, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(key, backend, f"{hint}use one of {', '.join(names)}")


def _check_mode(mode: str | None) -> None:
    if mode is None:
        return
    import torch._inductor as inductor  # the tables of modes and options; slow to import, so only where asked

    modes = list(inductor.list_mode_options())
    if mode not in modes:
        raise ConfigError("pt2.compile.mode", mode, f"use one of {', '.join(modes)}")


def _check_options(options: Mapping[str, Any] | None) -> None:
    if not options:
        return
    import torch._inductor as inductor
    from torch._inductor import config as inductor_config

    known = {name.replace("_", "-"): name for name in inductor.list_options()}
    for key, value in options.items():
        name = known.get(key.replace("_", "-"))
        if name is None:
            close = difflib.get_close_matches(key, known.values(), n=3)
            hint = f"close ones: {', '.join(close)}" if close else "see torch._inductor.list_options()"
            raise ConfigError(f"pt2.compile.options.{key}", value, f"Inductor has no such option; {hint}")
        wanted = inductor_config.get_type(name)  # type: ignore[attr-defined]
        # The same test as torch.compile's own: subscripted generics cannot be checked with isinstance.
        if get_origin(wanted) is None and not isinstance(value, wanted):
            raise ConfigError(
                f"pt2.compile.options.{key}", value, f"Inductor expects {getattr(wanted, '__name__', wanted)}"
            )
