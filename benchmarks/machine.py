"""Naming the machine that figures were measured on."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import torch

from optim.device import inspect_device, pick_device


def describe_machine() -> str:
    """Return one line: device, cores, threads, torch, IPEX, date."""
    info = inspect_device(pick_device(None))
    ipex = info.capabilities["ipex"]
    return (
        f"{info.name}, {os.cpu_count()} cores, {info.threads} threads; torch {torch.__version__}, "
        f"IPEX {ipex.detail if ipex.available else 'none'}; {datetime.now(UTC):%Y-%m-%d}"
    )
