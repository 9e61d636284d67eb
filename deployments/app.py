"""`build`: the application builder that serve_config.yaml names."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from deployments.driver import stop_serve_run_soon
from deployments.priority import last_in_line_for_good


def build(args: dict[str, Any]) -> serve.Application:
    """Check `args` and return the application of one model; nothing is loaded here.

    Raises RayServeException, the one error that Ray Serve reports without a traceback and without trying again;
    a `serve run` that has started its own Ray then ends.
    """
    in_task = is_the_task_of_ray_serve()
    if in_task:
        last_in_line_for_good()
    # Imported here, since importing torch takes seconds, during which requests to the version before are served.
    from deployments.args import ModelArgs
    from deployments.deployment import make_deployment
    from deployments.http_host import find_http_host
    from deployments.keys import Keys
    from optim.errors import ConfigError

    try:
        parsed = ModelArgs.parse(args)
        if in_task:  # where keys are needed and there are none, say so at once; every replica looks as well
            Keys(parsed.auth, find_http_host(), os.environ)
    except ConfigError as error:
        stops = "; stopping `serve run`" if stop_serve_run_soon() else ""
        raise RayServeException(f"configuration error: {error}{stops}") from None
    return make_deployment(parsed).bind(parsed)


def is_the_task_of_ray_serve() -> bool:
    """Return whether this process is the one in which Ray Serve builds an application, and which ends with that."""
    name = ray.get_runtime_context().get_task_function_name() if ray.is_initialized() else None
    return name is not None and name.endswith("build_serve_application")
