"""Compile a PyTorch module with the fastest engine that this machine can prove right, shape by shape."""

from __future__ import annotations

from optim.buckets import Bucket
from optim.compiler import compile_model
from optim.config import Pt2Config
from optim.errors import CompileError, ConfigError, ModelError, is_device_error
from optim.model import CompiledModel
from optim.report import CompileReport

__all__ = [
    "Bucket",
    "CompileError",
    "CompileReport",
    "CompiledModel",
    "ConfigError",
    "ModelError",
    "Pt2Config",
    "compile_model",
    "is_device_error",
]
