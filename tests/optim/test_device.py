from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from optim.cache import Cache
from optim.device import (
    _left_in_control_groups,
    available_bytes,
    ensure_cache_folder,
    inspect_device,
    pick_device,
)
from optim.errors import causes, describe, is_device_error, is_out_of_memory


def test_every_no_has_its_reason() -> None:
    info = inspect_device(torch.device("cpu"))
    assert info.threads == torch.get_num_threads()
    for name, capability in info.capabilities.items():
        assert capability.detail, name
    if not torch.cuda.is_available():
        assert not info.capabilities["cuda"].available
        assert pick_device(None) == torch.device("cpu")
        with pytest.raises(RuntimeError, match="device cuda was asked for, but"):
            pick_device("cuda")


def test_a_torch_that_does_not_tell_what_the_cpu_has_costs_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.setitem(sys.modules, "torch._inductor.cpp_builder", None)
    monkeypatch.delattr("torch._inductor.cpp_builder", raising=False)
    found = inspect_device(torch.device("cpu")).capabilities
    for name in ("bfloat16", "amx"):
        assert not found[name].available
        assert "this torch does not tell: " in found[name].detail
    assert not found["cxx"].available
    assert "this torch does not tell: " in found["cxx"].detail


def test_another_minor_of_torch_keeps_ipex_from_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    ipex = inspect_device(torch.device("cpu")).capabilities["ipex"]
    assert not ipex.available
    assert "IPEX 1.2.3 needs the torch of its own minor version" in ipex.detail


def test_a_missing_compiler_is_told_before_anything_is_compiled(tmp_path: Path) -> None:
    script = """
from optim import compile_model
from tests.support import models
config = {"compile": {"backend": "inductor", "only_if_faster": False}}
model = compile_model(models.Mlp(), models.features, config, batch_sizes=(1,), device="cpu")
assert model.report.engines() == {"1": "eager"}, model.report
(refusal,) = model.report.refusals
assert refusal.stage == "preflight", refusal
assert "no C++ compiler" in refusal.message and "no-such-compiler" in refusal.message, refusal
"""
    # Inductor reads $CXX when it is imported, so this takes a process of its own.
    env = {**os.environ, "CXX": str(tmp_path / "no-such-compiler")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, env=env)


def test_device_errors_are_found_in_whatever_wraps_them() -> None:
    inner = torch.OutOfMemoryError("CUDA out of memory")
    outer = RuntimeError("backend failed")
    outer.__cause__ = inner
    assert is_device_error(outer)
    assert is_device_error(RuntimeError("CUDA error: device-side assert triggered"))
    assert is_device_error(MemoryError())
    assert not is_device_error(RuntimeError("cannot compile"))
    assert list(causes(outer)) == [outer, inner]
    assert describe(outer) == ("RuntimeError", "backend failed (caused by OutOfMemoryError: CUDA out of memory)")


def test_a_drivers_own_words_for_memory_that_ran_out() -> None:
    for text in ("CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: out of memory"):
        error = RuntimeError(text)
        assert is_out_of_memory(error) and is_device_error(error)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert is_out_of_memory(MemoryError())
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    broken.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_device_error(broken) and not is_out_of_memory(broken)
    captured = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    captured.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(captured)


def _write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(text)


def _group(folder: Path, limit: str, used: int, kept: int) -> None:
    """Write a control group of version 2."""
    stat = f"anon 5\ninactive_file {kept}\n"
    _write(folder, memory_dot_max=limit, memory_dot_current=f"{used}\n", memory_dot_stat=stat)


def test_a_control_groups_limit_counts_wherever_it_is(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/system.slice/model.service\n")
    _write(tmp_path / "v2")  # the machine's root has no limit
    _group(tmp_path / "v2" / "system.slice", "max\n", 9000, 0)
    _group(tmp_path / "v2" / "system.slice" / "model.service", "1000\n", 400, 30)
    assert list(_left_in_control_groups(tmp_path / "v2", own)) == [630]
    _group(tmp_path / "v2" / "system.slice", "9100\n", 9000, 0)
    assert list(_left_in_control_groups(tmp_path / "v2", own)) == [630, 100], "and those above it"
    own.write_text("0::/\n")
    _group(tmp_path / "container", "1000\n", 400, 0)
    assert list(_left_in_control_groups(tmp_path / "container", own)) == [600], "a container's is its root"
    own.write_text("0::/../../elsewhere\n")
    assert list(_left_in_control_groups(tmp_path / "container", own)) == [600], "a path outside of its namespace"


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("11:cpuset:/docker/1\n4:memory:/docker/1\n0::/docker/1\n")
    mount, stat = tmp_path / "mount", "inactive_file 1\ntotal_inactive_file 20\n"
    limits = {"memory_dot_limit_in_bytes": "500\n", "memory_dot_usage_in_bytes": "100\n", "memory_dot_stat": stat}
    _write(mount / "memory", **limits)  # the machine's /docker/1, which a container sees as the root
    assert list(_left_in_control_groups(mount, own)) == [420]


def test_without_control_groups_nothing_is_known_of_them(tmp_path: Path) -> None:
    assert list(_left_in_control_groups(tmp_path, tmp_path / "none")) == []
    assert available_bytes() is not None


def test_a_folder_for_code_that_is_mounted_noexec_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, cache = tmp_path / "temporary", tmp_path / "cache"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # not deleted: what is set here is to go
    real = os.statvfs

    def statvfs(path: Path) -> Any:
        flag = os.ST_NOEXEC if Path(path).is_relative_to(temporary) else 0
        return SimpleNamespace(f_flag=real(path).f_flag | flag)

    monkeypatch.setattr(os, "statvfs", statvfs)
    before = os.umask(0o002)  # as many a system has it
    try:
        note = ensure_cache_folder.__wrapped__()
    finally:
        os.umask(before)
    Cache(cache / "pt2-serve", 10**9)
    assert note is not None and "is mounted noexec" in note
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache / "pt2-serve" / "inductor")
