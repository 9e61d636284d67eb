"""Where Ray Serve listens for HTTP, which decides whether requests need a key."""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE


def find_http_host() -> str:
    """Return the host of Ray Serve's HTTP options, an empty one where it does not say; blocks for a moment."""
    controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    asked: ray.ObjectRef[Any] = controller.get_http_config.remote()
    options = ray.get(asked)
    return options.host or ""
