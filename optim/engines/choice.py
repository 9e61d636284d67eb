"""Which engines are tried on a device, in which order, and how each is made from its name."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from optim.engines.amx import AmxEngine
from optim.engines.aot import AotEngine
from optim.engines.base import Engine, EngineJob, Unavailable
from optim.engines.eager import ChannelsLastEngine
from optim.engines.gemv import GemvEngine
from optim.engines.inductor import TorchCompileEngine
from optim.engines.inductor_files import keep_headers_private
from optim.engines.ipex import IpexEngine, optimize
from optim.engines.onednn import OneDnnEngine
from optim.engines.onnxruntime import OnnxRuntimeEngine
from optim.engines.openvino import OpenVinoEngine
from optim.errors import describe, is_device_error

_MAKERS: Mapping[str, Callable[[EngineJob], Engine]] = MappingProxyType(
    {
        "aot": AotEngine,
        "channels_last": ChannelsLastEngine,
        "inductor": TorchCompileEngine,
        "aot-amx": AmxEngine,
        # Inductor without CUDA graphs; on a CPU the same as `inductor`.
        "inductor-default": lambda job: TorchCompileEngine(job, name="inductor-default", mode="default"),
        "inductor-onednn": OneDnnEngine,
        "inductor-gemv": GemvEngine,
        "inductor-unfrozen": lambda job: TorchCompileEngine(job, name="inductor-unfrozen", freeze=False),
        "inductor-max-autotune": lambda job: TorchCompileEngine(job, name="inductor-max-autotune", mode="max-autotune"),
        "ipex": IpexEngine,
        "ipex-compile": lambda job: TorchCompileEngine(
            job, "ipex", name="ipex-compile", prepare=lambda job: optimize(job, prepack=False)
        ),
        "onnxruntime": OnnxRuntimeEngine,
        "openvino": OpenVinoEngine,
    }
)

#: Best prospects first: what converts in seconds and was fastest on most models, then what compiles for long.
_CPU_ORDER = (
    "openvino",
    "aot-amx",
    "onnxruntime",
    "ipex",
    "channels_last",
    "inductor",
    "inductor-onednn",
    "inductor-gemv",
    "ipex-compile",
    "inductor-unfrozen",
    "inductor-max-autotune",
)
#: Tried where the weights may be taken for constants: frozen, or in a layout of the engine's own.
_OF_OTHER_WEIGHTS = ("inductor-onednn", "inductor-unfrozen", "inductor-gemv", "aot-amx")
#: Tried in one phase alone. Generation stays with float32's own products: the likeliest tokens can be next to equal.
_FOR_PHASE = MappingProxyType({"inductor-gemv": "decode", "aot-amx": "forward"})
#: What is not installed, or not in the processor, is no candidate; what is there and cannot be used is refused.
_NEEDS = MappingProxyType(
    {
        "openvino": "openvino",
        "onnxruntime": "onnxruntime",
        "ipex": "ipex",
        "ipex-compile": "ipex",
        "aot-amx": "amx",
        "tensorrt": "tensorrt",
    }
)
_GPU_ORDER = ("inductor", "inductor-default", "tensorrt", "inductor-max-autotune")


@dataclass(frozen=True)
class Choice:
    """The engines to try besides eager, in order; with `race` the best is measured, else there is one at most."""

    names: tuple[str, ...]
    race: bool = False
    notes: tuple[str, ...] = ()


def make_engine(name: str, job: EngineJob) -> Engine:
    """Return the engine of this name; one that is not ours is a backend of torch.compile.

    Where it cannot even be made, as with a torch that lacks what the engine asks it for, its preflight says so.
    """
    keep_headers_private()
    maker = _MAKERS.get(name)
    try:
        # The options given for OpenVINO are those of its torch.compile backend.
        if maker is None or (name == "openvino" and job.config.compile.options is not None):
            return TorchCompileEngine(job, name)
        return maker(job)
    except Exception as error:
        if is_device_error(error):
            raise
        return _Unmade(job, name, ": ".join(describe(error, 300)))


class _Unmade(Engine):
    keeps_state = True  # else it would be refused for that, before its preflight says why

    def __init__(self, job: EngineJob, name: str, why: str) -> None:
        super().__init__(job)
        self.name, self._why = name, why

    def preflight(self) -> None:
        raise Unavailable(f"it cannot be made: {self._why}")


def choose_engines(job: EngineJob) -> Choice:
    """Return what the configuration and the device leave to be tried.

    A named backend is tried alone. `auto` races all that the device supports; settings that only torch.compile can
    honour leave only its variants.
    """
    config, asked = job.config, job.config.compile
    if config.export.aot_compile:
        return Choice(("aot",))
    if not asked.enable or asked.backend == "eager":
        return Choice((), notes=("compilation is switched off by the configuration",))
    if asked.backend != "auto":
        return Choice((asked.backend,))
    on_cpu = job.info.device.type == "cpu"
    names = config.tune.engines or _all_engines(job, on_cpu=on_cpu)
    notes = []
    if only := _only_compile(job):
        names = [name for name in names if name.startswith("inductor")]
        notes.append(f"the race is among Inductor's variants: compile.{only} is a setting of torch.compile")
    if asked.mode is not None or asked.options is not None or asked.dynamic:
        # These decide what the variants would vary.
        names = [name for name in names if name not in ("inductor-default", "inductor-max-autotune")]
    if on_cpu and asked.mode == "reduce-overhead":
        notes.append("mode reduce-overhead means CUDA graphs; on a CPU it changes nothing")
    return Choice(tuple(names), race=True, notes=tuple(notes))


def _all_engines(job: EngineJob, *, on_cpu: bool) -> list[str]:
    capabilities = job.info.capabilities
    names = [
        name
        for name in (_CPU_ORDER if on_cpu else _GPU_ORDER)
        if (name not in _NEEDS or capabilities[_NEEDS[name]].available)
        and (name not in _OF_OTHER_WEIGHTS or job.config.compile.freeze)
        and (name not in _FOR_PHASE or job.phase == _FOR_PHASE[name])
    ]
    others = {entry.name for entry in importlib.metadata.entry_points(group="torch_dynamo_backends")}
    return [*names, *sorted(others - {*_MAKERS, "tensorrt", "torch_tensorrt"})]


def _only_compile(job: EngineJob) -> str | None:
    asked = job.config.compile
    settings = {"options": asked.options is not None, "dynamic": bool(asked.dynamic), "fullgraph": asked.fullgraph}
    return next((key for key, is_set in settings.items() if is_set), None)
