"""Where Ray Serve listens for HTTP, which decides whether requests need a key."""

from __future__ import annotations

import logging
from typing import Any

import ray

logger = logging.getLogger(__name__)
# Ray Serve has no public name for its controller, nor a public way to ask for its HTTP options.
_CONTROLLER, _NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"


def find_http_host() -> str:
    """Return the host of Ray Serve's HTTP options, an empty one where it does not say; blocks for a moment.

    An empty one is taken for all interfaces, where requests need a key.
    """
    try:
        controller: Any = ray.get_actor(_CONTROLLER, namespace=_NAMESPACE)
        asked: ray.ObjectRef[Any] = controller.get_http_config.remote()
        host: str | None = ray.get(asked).host
    except (AttributeError, ValueError) as error:  # another Ray Serve than 2.60, where it has another name
        logger.warning("where Ray Serve listens could not be found out, so keys are asked for: %r", error)
        return ""
    return host or ""
