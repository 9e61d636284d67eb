"""The eager engine: the module itself, the reference for numbers and for speed."""

from __future__ import annotations

from optim.buckets import Bucket
from optim.engines.base import Engine, Runner


class EagerEngine(Engine):
    """Runs the module as it is."""

    name = "eager"

    def compile(self, bucket: Bucket) -> Runner:
        """Return the module."""
        return self.job.module
