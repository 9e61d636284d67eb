from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optim.device import inspect_device, pick_device
from optim.errors import causes, describe, is_device_error


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
