"""The clients that people have, against a running server."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import openai
import pytest
import torch
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from deployments.text import SentenceEncoder
from deployments.vision import ImageClassifier
from tests.e2e.conftest import JSON, KEY, ROOT, ROW, Server
from tests.support.fuzz import main

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PHOTO = (ROOT / "examples" / "cat.jpg").read_bytes()
TEXTS = ["A cat.", "Zwei Hunde auf der Straße."]


@pytest.fixture(scope="module")
def photo() -> Any:
    """The sample photo as the model takes it, and the logits that eager finds. [1, 3, 224, 224], [1, 1000]"""
    classifier = ImageClassifier()
    network = classifier.load()
    (pixels,) = classifier.preprocess(PHOTO)
    with torch.no_grad():
        return pixels[None].numpy(), network(pixels[None]).numpy()


def eagers_embeddings() -> Any:
    encoder = SentenceEncoder()
    network = encoder.load()
    with torch.no_grad():
        return np.concatenate([network(*(t.unsqueeze(0) for t in encoder.preprocess(text))).numpy() for text in TEXTS])


def test_the_server_lives_while_its_models_compile(server: Server) -> None:
    assert server.lived_before_ready
    assert server.request("/sentence-encoder/v2/health/live")[0] == 200


def test_tritons_http_client(server: Server, photo: Any) -> None:
    pixels, logits = photo
    client = triton_http.InferenceServerClient(f"127.0.0.1:{server.port}")
    assert client.is_server_ready()
    image = triton_http.InferInput("image", [1, 3, 224, 224], "FP32")
    image.set_data_from_numpy(pixels)
    for coding in (None, "gzip"):
        reply = client.infer("image-classifier", [image], request_compression_algorithm=coding)
        assert reply.as_numpy("logits") == pytest.approx(logits, abs=2e-3)
    file = triton_http.InferInput("payload", [1], "BYTES")
    file.set_data_from_numpy(np.array([PHOTO], dtype=np.object_))
    assert client.infer("image-classifier", [file]).as_numpy("logits") == pytest.approx(logits, abs=2e-3)
    client.close()


def test_tritons_grpc_client_names_the_application(server: Server, photo: Any) -> None:
    pixels, logits = photo
    before = len(server.log.read_text())
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        here = {"application": "image-classifier"}
        assert client.is_model_ready("image-classifier", headers=here)
        image = triton_grpc.InferInput("image", [1, 3, 224, 224], "FP32")
        image.set_data_from_numpy(pixels)
        reply = client.infer("image-classifier", [image], headers=here)
        assert reply.as_numpy("logits") == pytest.approx(logits, abs=2e-3)
        texts = triton_grpc.InferInput("payload", [2], "BYTES")
        texts.set_data_from_numpy(np.array([text.encode() for text in TEXTS], dtype=np.object_))
        reply = client.infer("sentence-encoder", [texts], headers={"application": "sentence-encoder"})
        assert reply.as_numpy("embedding") == pytest.approx(eagers_embeddings(), abs=1e-5)
        with pytest.raises(InferenceServerException, match="Model not found: other") as caught:
            client.infer("other", [image], headers=here)
        assert caught.value.status() == "StatusCode.NOT_FOUND"
    assert "Traceback" not in server.log.read_text()[before:]


def own_address() -> str | None:
    """Return the address that this machine would send from to another one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
        try:
            found.connect(("198.51.100.1", 9))
        except OSError:
            return None
        address = str(found.getsockname()[0])
    return None if address.startswith("127.") else address


def test_ray_serves_own_grpc_servers_answer_this_machine_alone(server: Server) -> None:
    outside = own_address()
    if outside is None:
        pytest.skip("this machine has no address but loopback")
    said = "Successfully started RequestProtocol.GRPC server on port "
    lines = [line for line in server.log.read_text().splitlines() if said in line and "image-classifier" in line]
    assert lines
    for line in lines:
        with (
            triton_grpc.InferenceServerClient(f"{outside}:{line.rpartition(said)[2]}") as client,
            pytest.raises(InferenceServerException, match="only callers on the same machine"),
        ):
            client.is_model_ready("image-classifier", headers={"application": "image-classifier"})


def test_openais_client(server: Server) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/sentence-encoder/v1", api_key="unused") as client:
        assert [model.id for model in client.models.list()] == ["sentence-encoder"]
        reply = client.embeddings.create(model="sentence-encoder", input=TEXTS)
        found = np.array([item.embedding for item in reply.data])
        assert found == pytest.approx(eagers_embeddings(), abs=1e-5)
        many = client.embeddings.create(model="sentence-encoder", input=[f"text {n}" for n in range(300)])
        assert len(many.data) == 300


def test_the_readmes_clients(server: Server) -> None:
    readme = (ROOT / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "triton" in block]
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    before = """
import numpy, ray
ray.init(address="auto", namespace="serve", log_to_driver=False)
pixels = numpy.zeros((1, 3, 224, 224), numpy.float32)
"""
    command = [sys.executable, "-W", "ignore", "-c", before + code + "print('all answered')"]
    done = subprocess.run(command, cwd=ROOT, env=server.env, check=False, capture_output=True, text=True)
    assert "all answered" in done.stdout, done.stderr[-3000:]


def test_the_gateway_answers_for_every_model(server: Server, photo: Any) -> None:
    pixels, logits = photo
    client = triton_http.InferenceServerClient(f"127.0.0.1:{server.port}/all")
    assert client.is_server_live()
    assert client.get_server_metadata()["name"] == "pt2-serve"
    for model in ("image-classifier", "sentence-encoder", "tiny"):
        assert client.is_model_ready(model)
    image = triton_http.InferInput("image", [1, 3, 224, 224], "FP32")
    image.set_data_from_numpy(pixels)
    for coding in (None, "gzip"):
        reply = client.infer(
            "image-classifier", [image], request_compression_algorithm=coding, response_compression_algorithm=coding
        )
        assert reply.as_numpy("logits") == pytest.approx(logits, abs=2e-3)
    with pytest.raises(InferenceServerException, match="Model not found: other") as caught:
        client.infer("other", [image])
    assert caught.value.status() == "404"
    client.close()
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/all/v1", api_key="unused") as ours:
        names = [model.id for model in ours.models.list()]
        assert {"image-classifier", "sentence-encoder", "tiny"} <= set(names)
        assert "broken" not in names  # it asks for a key
        reply = ours.embeddings.create(model="sentence-encoder", input=TEXTS)
        assert np.array([item.embedding for item in reply.data]) == pytest.approx(eagers_embeddings(), abs=1e-5)
        with pytest.raises(openai.BadRequestError, match="tiny makes no embeddings"):
            ours.embeddings.create(model="tiny", input="a")
        with pytest.raises(openai.NotFoundError):
            ours.embeddings.create(model="text-embedding-3-small", input="a")
    key = KEY["Authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/all/v1", api_key=key) as keyed:
        assert "broken" in [model.id for model in keyed.models.list()]
    status, _, body = server.request("/all/predictions/image-classifier", PHOTO)
    assert (status, next(iter(json.loads(body)))) == (200, "tiger cat")
    assert server.request("/all/predictions/broken", ROW, JSON)[0] == 401
    assert server.request("/all/predictions/broken/1", ROW, {**JSON, **KEY})[0] == 200
    status, _, body = server.request("/all/predictions/tiny/7", ROW, JSON)
    assert (status, json.loads(body)["type"]) == (404, "ModelVersionNotFoundException")
    assert server.request("/all/nothing")[0] == 404
    assert server.request("/all/v1/embeddings", b"[]")[0] == 400


def test_a_key_opens_the_model_that_asks_for_one(server: Server) -> None:
    path = "/broken/predictions/broken"
    status, headers, body = server.request(path, ROW, JSON)
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert json.loads(body)["type"] == "InvalidKeyException"
    assert server.request(path, ROW, {**JSON, "Authorization": "Bearer wrong-wrong-wrong"})[0] == 401
    assert server.request(path, ROW, {**JSON, **KEY})[0] == 200
    assert server.request("/broken/v2/health/ready")[0] == 200
    row = triton_grpc.InferInput("features", [1, 8], "FP32")
    row.set_data_from_numpy(np.zeros((1, 8), np.float32))
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        here = {"application": "broken"}
        with pytest.raises(InferenceServerException, match="a key is needed"):
            client.infer("broken", [row], headers=here)
        reply = client.infer("broken", [row], headers={**here, "authorization": KEY["Authorization"]})
        assert reply.as_numpy("output_0").shape == (1, 4)


def test_requests_that_nobody_should_send_harm_nobody(server: Server) -> None:
    for prefix in ("/tiny", "/all"):
        odd = f"GET {prefix}/v2/models/tiny HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: \xff7\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as caller:
            caller.sendall(odd.encode("latin-1"))
            assert caller.recv(4096).startswith(b"HTTP/1.1 200 ")  # Ray Serve would say 500
    assert main(f"http://127.0.0.1:{server.port}/tiny", 2000) == 0
    assert server.request("/tiny/predictions/tiny", ROW, JSON)[0] == 200
