"""`build`: the application builder that serve_config.yaml names."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException

from deployments.args import ModelArgs
from deployments.deployment import make_deployment
from deployments.driver import stop_serve_run_soon
from optim.errors import ConfigError


def build(args: dict[str, Any]) -> serve.Application:
    """Check `args` and return the application of one model; nothing is loaded here.

    Raises RayServeException, the one error that Ray Serve reports without a traceback and without trying again;
    a `serve run` that has started its own Ray then ends.
    """
    try:
        parsed = ModelArgs.parse(args)
    except ConfigError as error:
        stops = "; stopping `serve run`" if stop_serve_run_soon() else ""
        raise RayServeException(f"configuration error: {error}{stops}") from None
    return make_deployment(parsed).bind(parsed)
