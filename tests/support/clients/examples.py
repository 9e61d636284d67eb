"""Hooks of schemathesis, which runs this: put a test's examples of bodies into the description that a server serves.

What schemathesis makes up fits a description and no model. EXAMPLES has bodies that the model takes, as JSON: {path:
{name: body}}; they are sent as they are, and again with changes.
"""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis  # type: ignore[import-not-found]  # it is in .venv-clients alone


def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Add the examples to each operation of their path."""
    for path, bodies in json.loads(os.environ["EXAMPLES"]).items():
        for operation in raw_schema["paths"][path].values():
            content = operation["requestBody"]["content"]["application/json"]
            content["examples"] = {name: {"value": body} for name, body in bodies.items()}


schemathesis.hook(before_load_schema)
