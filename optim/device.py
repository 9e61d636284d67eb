"""What this machine can do: device, compilers, IPEX, precision; every "no" comes with its reason."""

from __future__ import annotations

import atexit
import gc
import getpass
import importlib.metadata
import logging
import os
import platform
import re
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from optim import pages
from optim.cache import CacheUnusable, default_folder
from optim.errors import describe
from optim.private import why_unusable
from optim.scratch import Scratch

logger = logging.getLogger(__name__)

_INDUCTOR_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_CGROUPS = Path("/sys/fs/cgroup")
#: Limit, use, and what of that is kept of files, by the version of control groups.
_MEMORY_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_MEMORY_V2 = ("memory.max", "memory.current", "inactive_file")


@dataclass(frozen=True)
class Capability:
    """One thing an engine may need: whether it is there, and the version found or the reason it is not."""

    available: bool
    detail: str


@dataclass(frozen=True)
class DeviceInfo:
    """The device a model is compiled for, as found by `inspect_device`."""

    device: torch.device
    name: str
    threads: int
    capabilities: dict[str, Capability]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "device": str(self.device),
            "name": self.name,
            "threads": self.threads,
            "capabilities": {
                name: {"available": c.available, "detail": c.detail} for name, c in self.capabilities.items()
            },
        }


def pick_device(device: str | torch.device | None) -> torch.device:
    """Return the device asked for, or CUDA where there is one, else the CPU; RuntimeError if it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {device} was asked for, but {_no_cuda()}")
    return device


def set_threads(count: int) -> None:
    """Give torch on this thread so many threads, and as many on threads that begin later.

    A thread that torch has not looked at yet would go back to the process's number at its first operator.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)


def give_memory_back(device: torch.device) -> None:
    """Return what was freed to the system, which glibc keeps else, and to the GPU, where torch's allocator does."""
    gc.collect()
    if sys.platform == "linux":
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def inspect_device(device: torch.device) -> DeviceInfo:
    """Look at the machine without compiling anything or importing an extension."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    capabilities = {
        "cuda": Capability(True, str(torch.version.cuda))
        if torch.cuda.is_available()
        else Capability(False, _no_cuda()),
        "cxx": _ask_torch(_find_compiler),
        "python_headers": _find_headers(),
        "triton": _find_distribution("triton"),
        "ipex": _find_ipex(device),
        "openvino": _find_distribution("openvino"),
        "onnxruntime": _find_onnxruntime(),
        "tensorrt": _find_distribution("torch-tensorrt"),
        "bfloat16": _ask_torch(_find_bfloat16, device),
        "amx": _ask_torch(_find_amx, device),
        "huge_pages": _find_huge_pages(device),
    }
    return DeviceInfo(device, name, torch.get_num_threads(), capabilities)


@cache
def ensure_cache_folder() -> str | None:
    """See to it, once a process, that Inductor's cache is this user's; return what was done, if something had to be.

    It runs what it finds there, and from torch 2.13 on, Dynamo cannot even be imported where it cannot write. In both
    cases this process, and those that it starts, use a folder that is theirs. Call before anything imports Dynamo.
    """
    tell_nobody()
    asked = os.environ.get(_INDUCTOR_FOLDER)
    default = Path(tempfile.gettempdir()) / f"torchinductor_{_user_name()}"
    # Anybody can put a link where the default is, which is what Dynamo asks for once it was imported.
    folder = Path(asked).resolve() if asked and Path(asked) != default else default
    why = why_unusable(folder)
    if why is None:
        if asked is not None:
            os.environ[_INDUCTOR_FOLDER] = str(folder)  # what was looked at, wherever a link will lead to
        return None
    # Not of this process alone: beside a torch that has made its own for a group, the next start is to find it, too.
    own = _find_own_folder()
    os.environ[_INDUCTOR_FOLDER] = str(own)
    note = f"Inductor's cache folder {why}; {own} is used instead"
    logger.warning(note)
    return note


def tell_nobody() -> None:
    """Keep what is imported from now on from reporting to its makers what is served here.

    ONNX Runtime does so on Linux, too (its Privacy.md), unless this variable is set when it is imported, which torch's
    exporter does as well; who sets it has their way. OpenVINO sends events when it is imported and for each conversion
    if `openvino_telemetry` can be imported, and goes without otherwise.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: an import fails


def spare_compile_workers(device: torch.device) -> None:
    """Keep Inductor from starting processes that compile for Triton as soon as it is imported, where none will.

    IPEX and torch's exporters import it, too: every replica on a CPU had three processes beside it for as long as it
    lived, one of 620 MB, which took 3 s to start while engines raced. Code for a GPU still starts them when it is
    compiled. Who sets TORCH_WARM_POOL has their way.
    """
    if device.type == "cpu":
        os.environ.setdefault("TORCH_WARM_POOL", "0")


def _find_own_folder() -> Path:
    """Return a folder for code that is this user's, or this process's if it has to be."""
    own = Path(tempfile.gettempdir()) / f"pt2-inductor-{os.getuid()}"
    if why_unusable(own) is None:
        return own
    with suppress(CacheUnusable):  # where the one for temporary files is mounted noexec
        base = default_folder()
        # The compile cache's own: made for others to write to (a umask), it would be of no use to that either.
        if why_unusable(base) is None and why_unusable(base / "inductor") is None:
            return base / "inductor"
    scratch = Scratch("inductor")
    atexit.register(scratch.remove)  # which keeps it until then
    return scratch.path


def _user_name() -> str:
    """Return the user's name as Inductor's default folder has it.

    A container's user may have none (Kubernetes' `runAsUser`), and torch 2.8 cannot even import Dynamo then: so
    this process, and those that it starts, have the name that torch 2.13 takes.
    """
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # the second from Python 3.13 on
        name = os.environ["LOGNAME"] = f"uid_{os.getuid()}"
    return re.sub(r'[\\/:*?"<>|]', "_", name)


def import_ipex() -> ModuleType:
    """Import IPEX; ImportError with the reason where that ends in one of its odd exits.

    With another torch minor it ends in AttributeError (it calls os.exit), without AVX2 in SystemExit, so
    `inspect_device` compares versions first and this function turns both into ImportError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it announces each kernel that it overrides
            import intel_extension_for_pytorch as ipex
    except (Exception, SystemExit) as error:
        kind, message = describe(error)
        raise ImportError(f"importing intel_extension_for_pytorch ended in {kind}: {message}") from error
    return ipex  # type: ignore[no-any-return]


def import_openvino() -> ModuleType:
    """Import OpenVINO without the telemetry it brings along."""
    tell_nobody()
    import openvino

    return openvino  # type: ignore[no-any-return]


def total_bytes(device: torch.device) -> int:
    """Return the memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int | None:
    """Return the memory that a process here could still take, a control group's limit included; None where unknown."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    return min([*found, *_left_in_control_groups()], default=None)


def _left_in_control_groups(mount: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yield what this process's control group may still take, and each that it is part of, where there is a limit.

    A container sees its own as the root, unless it has the machine's namespace (`--cgroupns=host`); a service of
    systemd's has one further down. Version 1 has a hierarchy for memory, other files, and no word for no limit.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # no Linux
        return
    for number, controllers, path in lines:
        if "memory" in controllers.split(","):
            root, (limit, used, kept) = mount / "memory", _MEMORY_V1
        elif number == "0":
            root, (limit, used, kept) = mount, _MEMORY_V2
        else:
            continue
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:
            with suppress(OSError, ValueError):  # it lies outside of the namespace, or has no limit
                most = int((folder / limit).read_text())
                # What the kernel only keeps of files counts as used there, and is given up when asked for.
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield most - int((folder / used).read_text()) + int(stat.get(kept, 0))
            if folder == root:
                break


def is_room_for(size: int) -> bool:
    """Say whether taking so many bytes leaves half of the free memory to others; yes, where that is not known."""
    available = available_bytes()
    return available is None or size < available / 2


def _no_cuda() -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    return "torch sees no CUDA device (no GPU, no driver, or CUDA_VISIBLE_DEVICES hides it)"


def _cpu_name() -> str:
    return next(iter(cpuinfo().get("model name", ())), "") or platform.processor() or platform.machine()


@cache
def cpuinfo() -> Mapping[str, tuple[str, ...]]:
    """Return what Linux says of the CPUs, by its key: the values that differ; nothing where it does not tell."""
    found: dict[str, dict[str, None]] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), {})[value.strip()] = None
    return {key: tuple(values) for key, values in found.items()}


def _ask_torch(find: Callable[..., Capability], *given: torch.device) -> Capability:
    """Ask what torch has no public function for; another torch may have none at all."""
    try:
        return find(*given)
    except (AttributeError, ImportError) as error:
        return Capability(False, f"this torch does not tell: {error}")


def _find_compiler() -> Capability:
    """Look for the C++ compiler where Inductor will look: $CXX, else its own search."""
    # Importing Inductor takes a second; only compile_model pays it.
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return Capability(True, str(get_cpp_compiler()))
    except Exception as error:  # its own InvalidCxxCompiler, and whatever probing a broken $CXX may raise
        _, message = describe(error)
        asked = f"CXX={os.environ['CXX']}" if "CXX" in os.environ else "no g++ or clang++ on PATH"
        return Capability(False, f"no C++ compiler ({asked}): {message}")


def _find_headers() -> Capability:
    include = Path(sysconfig.get_paths()["include"])
    if (include / "Python.h").exists():
        return Capability(True, str(include))
    return Capability(False, f"Python.h is not in {include}; install the headers of Python {platform.python_version()}")


def _find_distribution(name: str) -> Capability:
    try:
        return Capability(True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Capability(False, f"the package {name} is not installed")


def _find_onnxruntime() -> Capability:
    """Look for the runtime and for what torch.onnx.export stands on."""
    needed = [_find_distribution(name) for name in ("onnxruntime", "onnx", "onnxscript")]
    return next((found for found in needed if not found.available), needed[0])


def _find_ipex(device: torch.device) -> Capability:
    """Compare versions before anything is imported: a mismatched IPEX leaves by os.exit or sys.exit."""
    found = _find_distribution("intel-extension-for-pytorch")
    if not found.available:
        return Capability(False, "intel-extension-for-pytorch is not installed")
    if device.type != "cpu":
        return Capability(False, f"IPEX {found.detail} serves CPUs, and this device is {device}")
    if found.detail.split(".")[:2] != torch.__version__.split(".")[:2]:
        return Capability(
            False, f"IPEX {found.detail} needs the torch of its own minor version, not {torch.__version__}"
        )
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        return Capability(False, f"IPEX {found.detail} needs a CPU with AVX2")
    return Capability(True, found.detail)


def _find_huge_pages(device: torch.device) -> Capability:
    reason = pages.why_not() if device.type == "cpu" else "they are for a model in the CPU's memory"
    return Capability(reason is None, reason or "for decoders")


def _find_bfloat16(device: torch.device) -> Capability:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        ok = major >= 8
        return Capability(ok, f"compute capability {major}.{minor}{'' if ok else ', below 8.0'}")
    # Without these instructions bf16 is emulated, and slower than float32.
    flags = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx": torch.cpu._is_amx_tile_supported()}
    names = [name for name, there in flags.items() if there]
    return Capability(bool(names), ", ".join(names) or "this CPU has neither avx512_bf16 nor AMX")


def _find_amx(device: torch.device) -> Capability:
    if device.type != "cpu":
        return Capability(False, f"AMX is of CPUs, and this device is {device}")
    supported = torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()
    if not supported or "amx_bf16" not in " ".join(cpuinfo().get("flags", ())).split():
        return Capability(False, "this CPU has no AMX with bfloat16")
    if not torch.cpu._init_amx():
        return Capability(False, "Linux does not permit this process to use AMX")
    return Capability(True, "with bfloat16")
