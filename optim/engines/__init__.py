"""Engines: each turns an eager module into a callable for given shapes, one file an engine."""

from __future__ import annotations

from optim.engines.base import Engine, EngineJob, Unavailable
from optim.engines.choice import Choice, choose_engines, make_engine
from optim.engines.eager import EagerEngine

__all__ = ["Choice", "EagerEngine", "Engine", "EngineJob", "Unavailable", "choose_engines", "make_engine"]
