from __future__ import annotations

from typing import Any

import pytest

from deployments.gateway import GatewayArgs, parse_args
from optim.errors import ConfigError


def test_what_may_be_written() -> None:
    assert parse_args(None) == parse_args({}) == GatewayArgs()
    parsed = parse_args({"applications": ["a"], "limits": {"body_bytes": 5}, "auth": {"required": False}})
    assert (parsed.applications, parsed.limits.body_bytes, parsed.auth.required) == (["a"], 5, False)


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"limits": {"body_s": 0.0}}, "args.limits.body_s"),
        ({"limits": {"bytes_in_flight": -5}}, "args.limits.bytes_in_flight"),
        ({"limits": {"rows": 3}}, "args.limits.rows"),
        ({"application": "a"}, "args.application"),
        ([], "args"),
    ],
)
def test_mistakes_are_named(args: Any, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    assert str(caught.value).startswith(f"{key}:")
