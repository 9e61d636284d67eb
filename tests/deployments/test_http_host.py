from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray

from deployments.args import AuthArgs
from deployments.http_host import find_http_host
from deployments.keys import Keys
from optim.errors import ConfigError


def test_a_ray_serve_that_does_not_tell_where_it_listens_is_one_that_asks_for_keys(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_such_actor(name: str, namespace: str) -> None:
        raise ValueError(f"no actor {name}")

    for get_actor in (no_such_actor, lambda name, namespace: SimpleNamespace()):
        monkeypatch.setattr(ray, "get_actor", get_actor)
        caplog.clear()
        assert find_http_host() == ""
        assert "so keys are asked for" in caplog.text
    with pytest.raises(ConfigError, match="where Ray Serve listens is not known: put keys into"):
        Keys(AuthArgs(), "", {})
