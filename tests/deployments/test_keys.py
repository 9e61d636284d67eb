from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.http as triton
import yaml
from starlette.testclient import TestClient
from tritonclient.utils import InferenceServerException

from deployments.args import AuthArgs, ModelArgs
from deployments.check import check_file
from deployments.http import make_app
from deployments.keys import Keys, is_loopback
from deployments.service import ModelService
from optim.errors import ConfigError
from tests.support.http_server import listen
from tests.support.local import serve_locally

KEY, OTHER = "k" * 16, "0123456789abcdef"
TINY = {"model": "tests.support.servables:Tiny", "pt2": {"compile": {"enable": False}}}


@pytest.mark.parametrize(
    ("host", "found"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "", "example.org")),
    ],
)
def test_what_is_loopback(host: str, found: bool) -> None:
    assert is_loopback(host) is found


def test_keys_are_needed_where_there_are_some_or_others_can_reach_us(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{OTHER}\n")
    environment = {"PT2_API_KEYS": f" {KEY},\n", "OURS": OTHER}
    assert not Keys(AuthArgs(), "127.0.0.1", {}).needed
    assert Keys(AuthArgs(), "127.0.0.1", environment).needed
    assert Keys(AuthArgs(keys_file=str(file)), "0.0.0.0", {}).accepts({"x-api-key": OTHER})
    assert Keys(AuthArgs(keys_env="OURS"), "0.0.0.0", environment).accepts({"x-api-key": OTHER})
    assert not Keys(AuthArgs(required=False), "0.0.0.0", environment).needed
    for auth, host in ((AuthArgs(), "0.0.0.0"), (AuthArgs(required=True), "127.0.0.1"), (AuthArgs(), "")):
        with pytest.raises(ConfigError, match="no API key"):
            Keys(auth, host, {})


def test_a_key_is_read_from_both_headers_and_compared_whole() -> None:
    keys = Keys(AuthArgs(), "127.0.0.1", {"PT2_API_KEYS": f"{KEY} {OTHER}"})
    for headers in ({"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {OTHER} "}, {"x-api-key": KEY}):
        assert keys.accepts(headers), headers
    for headers in (
        {},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer"},
        {"x-api-key": KEY[:-1]},
        {"x-api-key": f"{KEY}x"},
        {"x-api-key": f"{KEY} {OTHER}"},
        {"x-api-key": "\udcff" * 16},
    ):
        assert not keys.accepts(headers), headers


def test_mistakes_name_the_place_and_never_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Keys(AuthArgs(), "127.0.0.1", {"PT2_API_KEYS": f"{KEY},topsecret"})
    assert "key 2 in the environment's PT2_API_KEYS" in str(caught.value)
    assert "topsecret" not in str(caught.value)
    with pytest.raises(ConfigError, match="printable ASCII"):
        Keys(AuthArgs(), "127.0.0.1", {"PT2_API_KEYS": "schlüsselschlüssel"})
    with pytest.raises(ConfigError, match="it cannot be read"):
        Keys(AuthArgs(keys_file=str(tmp_path / "none")), "127.0.0.1", {})


def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    keys = Keys(AuthArgs(keys_file=str(file)), "127.0.0.1", {})
    file.write_text(f"{OTHER}\n{OTHER}x")
    keys.refresh()
    assert (keys.accepts({"x-api-key": OTHER}), keys.accepts({"x-api-key": KEY})) == (True, False)
    for content in ("short", "# none\n"):
        file.write_text(content)
        with caplog.at_level(logging.ERROR, logger="deployments.keys"):
            keys.refresh()
        assert "the API keys stay as they were" in caplog.text
        assert keys.accepts({"x-api-key": OTHER})
        caplog.clear()
    file.write_text(KEY)
    reads = Keys._read
    with pytest.MonkeyPatch.context() as patch:  # a moment at which it cannot be read
        patch.setattr(Keys, "_read", lambda self: exec("raise ConfigError('a', 'b', 'c')", globals()))
        keys.refresh()
    assert keys.accepts({"x-api-key": OTHER})
    assert Keys._read is reads
    keys.refresh()
    assert keys.accepts({"x-api-key": KEY})
    file.write_text(OTHER)
    keys.refresh()
    file.unlink()
    keys.refresh()
    assert keys.accepts({"x-api-key": OTHER})


@pytest.fixture(scope="module")
def service() -> Iterator[ModelService]:
    with serve_locally(TINY) as found:
        yield found


def test_without_a_key_nothing_but_health_answers_in_its_protocols_shape(service: ModelService) -> None:
    app = make_app(service, Keys(AuthArgs(), "127.0.0.1", {"PT2_API_KEYS": KEY}))
    health = ["/ping", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready"]
    with TestClient(app) as client:
        for path in health:
            assert client.get(path).status_code == 200
        for method, path, keys in (
            ("GET", "/models", {"code", "type", "message"}),
            ("POST", "/predictions/tiny", {"code", "type", "message"}),
            ("GET", "/v2", {"error"}),
            ("POST", "/v2/models/tiny/infer", {"error"}),
            ("GET", "/v1/models", {"message", "type", "param", "code"}),
            ("POST", "/v1/embeddings", {"message", "type", "param", "code"}),
        ):
            reply = client.request(method, path, headers={"x-api-key": "wrong"})
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
            body = reply.json()
            assert set(body["error"] if path.startswith("/v1") else body) == keys
            assert client.request(method, path, headers={"x-api-key": KEY}).status_code != 401
    assert "compileReport" not in reply.text


def test_health_can_be_closed_too() -> None:
    with serve_locally({**TINY, "auth": {"open_health": False}}) as service:
        app = make_app(service, Keys(service.args.auth, "127.0.0.1", {"PT2_API_KEYS": KEY}))
        with TestClient(app) as client:
            assert client.get("/ping").status_code == 401
            assert client.get("/ping", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_the_clients_send_keys(service: ModelService) -> None:
    row = triton.InferInput("features", [1, 8], "FP32")
    row.set_data_from_numpy(np.zeros((1, 8), np.float32))
    with listen(make_app(service, Keys(AuthArgs(), "127.0.0.1", {"PT2_API_KEYS": KEY}))) as port:
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        assert client.is_model_ready("tiny")
        assert client.infer("tiny", [row], headers={"authorization": f"Bearer {KEY}"}).as_numpy("output_0").size == 4
        with pytest.raises(InferenceServerException, match="a key is needed"):
            client.infer("tiny", [row])
        client.close()
        for key, works in ((KEY, True), (OTHER, False)):
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key) as ours:
                if works:
                    assert ours.models.retrieve("tiny").id == "tiny"
                else:
                    with pytest.raises(openai.AuthenticationError) as caught:
                        ours.models.list()
                    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("options", "environment", "mistakes"),
    [
        ({"host": "127.0.0.1"}, "", 0),
        ({"host": "0.0.0.0"}, "", 1),
        ({}, "", 1),  # Ray Serve's own default is every interface
        ({"host": "0.0.0.0"}, KEY, 0),
        ({"host": "127.0.0.1"}, "short", 1),
    ],
)
def test_the_configuration_is_checked_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], environment: str, mistakes: int
) -> None:
    monkeypatch.setitem(os.environ, "PT2_API_KEYS", environment)
    application = {
        "name": "tiny",
        "import_path": "deployments.app:build",
        "args": TINY,
        "deployments": [{"name": "tiny"}],
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"http_options": options, "applications": [application]}))
    found = check_file(path)
    assert len(found) == mistakes, found
    assert all("args.auth" in line and "short" not in line.replace("too short", "") for line in found)


def test_what_may_be_written(tmp_path: Path) -> None:
    assert ModelArgs.parse({**TINY, "auth": {"required": False}}).auth == AuthArgs(required=False)
    with pytest.raises(ConfigError, match=r"args\.auth\.key"):
        ModelArgs.parse({**TINY, "auth": {"key": KEY}})
