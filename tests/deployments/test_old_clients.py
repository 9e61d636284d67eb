"""Clients that do not go with the main environment: openai 1.0.0, and schemathesis, which reads the description."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from deployments.http import make_app
from deployments.openapi import describe
from deployments.service import ModelService
from tests.support.http_server import listen
from tests.support.local import serve_locally

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".venv-clients"
SCRIPTS = ROOT / "tests" / "support" / "clients"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.any_torch,
    pytest.mark.skipif(not (CLIENTS / ".installed").exists(), reason="there is no .venv-clients: make install-clients"),
    pytest.mark.filterwarnings("default"),  # transformers' own are not ours to judge
]

EAGER = {"compile": {"enable": False}}
TEXTS = ["A cat sat.", "", "Zwei Hunde liefen über die Straße."]
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("negative_data_rejection", "unsupported_method", "allow_header_conformance"),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Run models on one thread: two that wait for each other beside a busy client take several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder() -> Iterator[ModelService]:
    args = {
        "model": "deployments.text:SentenceEncoder",
        "pt2": EAGER,
        "batching": {"batch_sizes": [1, 4], "lengths": [16, 64, 256]},
    }
    with serve_locally(args) as service:
        yield service


def test_openais_first_client_of_version_1(encoder: ModelService) -> None:
    async def predict() -> list[Any]:
        return await asyncio.gather(*map(encoder.predict, TEXTS))

    expected = np.array(asyncio.run(predict()), np.float32)
    tokens = [encoder.servable.preprocess(text)[0].tolist() for text in TEXTS]
    inputs = {"text": TEXTS[0], "texts": TEXTS, "tokens": tokens[0], "tokens of all": tokens}
    with listen(make_app(encoder)) as port:
        done = subprocess.run(
            [CLIENTS / "bin" / "python", SCRIPTS / "openai_1.py", f"http://127.0.0.1:{port}/v1"],
            input=json.dumps({"model": encoder.name, "inputs": inputs}),
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["version"] == "1.0.0"
    assert set(found["embeddings"]) == set(inputs)
    for name, replies in found["embeddings"].items():
        wanted = 1 if name in ("text", "tokens") else len(TEXTS)
        assert set(replies) == {"float", "base64", "default"}
        for form, reply in replies.items():
            rows = reply["rows"]
            if form == "base64":
                rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
            assert np.array(rows) == pytest.approx(expected[:wanted], abs=1e-5)
            assert reply["indices"] == list(range(wanted))
            assert reply["tokens"] == [sum(map(len, tokens[:wanted]))] * 2
            assert reply["model"] == encoder.name
    described = {"id": encoder.name, "object": "model", "created": encoder.started, "owned_by": "pt2-serve"}
    assert found["models"] == [found["model"]] == [described]
    assert [(error["status"], error["error"]["code"]) for error in found["errors"]] == [(404, "model_not_found")] * 2
    assert all("gpt-4" in error["error"]["message"] for error in found["errors"])


def fill(name: str, datatype: str, shape: list[int], value: float) -> dict[str, Any]:
    """Return an input of an infer request, every element of it `value`."""
    return {"name": name, "datatype": datatype, "shape": shape, "data": [value] * int(np.prod(shape))}


def check_description(service: ModelService, payload: Any, inputs: list[Any], folder: Path, **more: Any) -> None:
    """Let schemathesis ask what the description allows, and what it does not; every operation has to answer once.

    What it makes up fits a description and no model: it is also given a payload and an infer request's inputs that
    the model takes, and `more` of those examples, {path: {name: body}}.
    """
    infers = {"tensors": {"inputs": inputs}, "not here": {"inputs": inputs, "parameters": {"classification": 3}}}
    examples = dict(more)
    for version in ("", "/{version}"):
        examples[f"/predictions/{{model}}{version}"] = {"payload": payload}
    for version in ("", "/versions/{version}"):
        examples[f"/v2/models/{{model}}{version}/infer"] = infers
    with listen(make_app(service)) as port:
        command: list[str | Path] = [
            *(CLIENTS / "bin" / "schemathesis", "--config-file", SCRIPTS / "schemathesis.toml", "--no-color"),
            *("run", f"http://127.0.0.1:{port}/openapi.json", "--checks", ",".join(CHECKS)),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--seed", "1"),
            # These models ask for no key: a wrong one is no reason to refuse.
            *("--generation-with-security-parameters", "false", "--generation-database", "none"),
            *("--report", "har", "--report-har-path", "asked.har"),
        ]
        env = {**os.environ, "SCHEMATHESIS_HOOKS": str(SCRIPTS / "examples.py"), "EXAMPLES": json.dumps(examples)}
        done = subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = json.loads((folder / "asked.har").read_text())["log"]["entries"]
    seen = {
        (entry["request"]["method"].lower(), urlsplit(entry["request"]["url"]).path, entry["response"]["status"])
        for entry in asked
    }
    for path, operations in describe(service)["paths"].items():
        path = path.format(model=service.name, version=service.version)
        for method in operations:
            assert (method, path, 200) in seen
            assert not path.endswith("/infer") or (method, path, 501) in seen
    assert service.admission.rows == service.admission.bytes == 0


def test_schemathesis_finds_the_description_of_an_image_model_true(tmp_path: Path) -> None:
    args = {
        "name": "small-cnn",
        "model": "deployments.tensor:TensorModel",
        "model_args": {"module": "tests.support.models:SmallCnn", "inputs": [{"shape": [3, 4, 4]}]},
        "pt2": EAGER,
    }
    with serve_locally(args) as service:
        check_description(
            service, np.full((3, 4, 4), 0.5).tolist(), [fill("image", "FP32", [2, 3, 4, 4], 0.5)], tmp_path
        )


def test_schemathesis_finds_the_description_of_a_text_encoder_true(encoder: ModelService, tmp_path: Path) -> None:
    inputs = [fill("input_ids", "INT64", [1, 5], 101), fill("attention_mask", "INT64", [1, 5], 1)]
    embeddings = {"texts": {"model": encoder.name, "input": TEXTS}}
    check_description(encoder, {"text": "A cat."}, inputs, tmp_path, **{"/v1/embeddings": embeddings})
