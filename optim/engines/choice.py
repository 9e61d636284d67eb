"""Which engines are tried on a device, in which order."""

from __future__ import annotations

from optim.engines.aot import AotEngine
from optim.engines.base import Engine, EngineJob
from optim.engines.inductor import TorchCompileEngine
from optim.engines.ipex import IpexEngine
from optim.engines.openvino import OpenVinoEngine


def choose_engines(job: EngineJob) -> tuple[list[Engine], list[str]]:
    """Return the engines to try besides eager, best prospect first, and notes on how the choice came about.

    With `auto` on a CPU that is IPEX, and Inductor for the buckets that IPEX does not serve; on a GPU Inductor.
    A named backend is tried alone. Settings that only torch.compile can honour rule IPEX out.
    """
    config = job.config
    if config.export.aot_compile:
        return [AotEngine(job)], []
    asked = config.compile
    if not asked.enable or asked.backend == "eager":
        return [], ["compilation is switched off by the configuration"]
    if asked.backend == "ipex":
        return [IpexEngine(job)], []
    if asked.backend == "openvino" and asked.options is None:  # its options are those of its torch.compile backend
        return [OpenVinoEngine(job)], []
    if asked.backend != "auto":
        return [TorchCompileEngine(job, asked.backend)], []
    inductor = TorchCompileEngine(job)
    if job.info.device.type != "cpu":
        return [inductor], []
    only_compile = [
        key
        for key, is_set in (
            ("options", asked.options is not None),
            ("dynamic", bool(asked.dynamic)),
            ("fullgraph", asked.fullgraph),
        )
        if is_set
    ]
    if only_compile:
        return [inductor], [f"auto means inductor alone: compile.{only_compile[0]} is a setting of torch.compile"]
    notes = []
    if asked.mode == "reduce-overhead":
        notes.append("mode reduce-overhead means CUDA graphs; on a CPU it changes nothing")
    return [IpexEngine(job), inductor], notes
