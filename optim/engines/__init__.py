"""Engines: each turns an eager module into a callable for given shapes, one file an engine."""

from __future__ import annotations

from optim.engines.base import Engine, EngineJob, Unavailable
from optim.engines.choice import choose_engines
from optim.engines.eager import EagerEngine

__all__ = ["EagerEngine", "Engine", "EngineJob", "Unavailable", "choose_engines"]
