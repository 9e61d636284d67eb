"""What a user does: `make serve` with the configuration as shipped, then requests."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from deployments.text import SentenceEncoder
from deployments.vision import ImageClassifier
from optim.device import inspect_device
from tests.e2e.conftest import METRICS, ROOT, STATS, Server, describe, haproxy_folder

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    # Sockets of a server that is being killed, and Ray's own files.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PREDICT = "/predictions/image-classifier"


def photos() -> list[bytes]:
    """The sample photo seen in other ways, in every format: none of them is in the repository."""
    cat = Image.open(ROOT / "examples" / "cat.jpg")
    views = [
        cat,
        ImageOps.mirror(cat),
        cat.rotate(15),
        cat.crop((50, 0, 350, 300)),
        ImageOps.solarize(cat),
        cat.resize((90, 60)),
    ]
    encoded = []
    for view, kind in zip(views, ["JPEG", "PNG", "WEBP"] * 2, strict=True):
        buffer = io.BytesIO()
        view.save(buffer, kind)
        encoded.append(buffer.getvalue())
    return encoded


def test_the_model_was_compiled_for_every_bucket_before_the_first_request(server: Server) -> None:
    report = describe(server, "/models/image-classifier")
    capabilities = inspect_device(torch.device("cpu")).capabilities
    assert [b["batch_size"] for b in report["buckets"]] == [1, 2, 4, 8]
    installed = [name for name in ("openvino", "onnxruntime", "ipex") if capabilities[name].available]
    assert [name for name in report["candidates"] if name in installed] == installed
    for bucket in report["buckets"]:
        assert {name for ms in bucket["race"] for name in ms} >= {"eager", *installed[:1]}
        assert bucket["engine"] != "eager", report  # on any CPU one of them is faster
        assert bucket["ms"] <= bucket["eager_ms"]
        assert bucket["max_abs_error"] < 1e-2


def test_photos_get_eagers_labels_and_probabilities(server: Server) -> None:
    classifier = ImageClassifier()
    network = classifier.load()
    for photo in photos():
        status, headers, body = server.request(PREDICT, photo)
        assert status == 200, body
        assert headers["content-type"] == "application/json"
        reply = json.loads(body)
        with torch.no_grad():
            want = classifier.postprocess(network(classifier.preprocess(photo)[0].unsqueeze(0))[0])
        assert next(iter(reply)) == next(iter(want))
        assert reply == pytest.approx(want, abs=1e-3)


def test_many_callers_at_once_and_no_compilation(server: Server) -> None:
    shots = photos()
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda i: (i, *server.request(PREDICT, shots[i % len(shots)])), range(200)))
    assert Counter(status for _, status, _, _ in replies) == {200: 200}
    bodies: dict[int, dict[str, float]] = {}
    for i, _, _, body in replies:
        first = bodies.setdefault(i % len(shots), json.loads(body))
        assert json.loads(body) == pytest.approx(first, abs=1e-3)
    for _ in range(8):  # whichever replica answers
        after = describe(server, "/models/image-classifier")["after_ready"]
        assert {key: count for key, count in after.items() if key != "calls" and count} == {}


def test_a_handle_takes_bytes_and_arrays(server: Server) -> None:
    script = """
import io, sys, numpy, ray
from PIL import Image
from ray import serve
from deployments.errors import BadRequest
ray.init(address="auto", namespace="serve", log_to_driver=False)
handle = serve.get_app_handle("image-classifier")
photo = open("examples/cat.jpg", "rb").read()
from_bytes = handle.predict.remote(photo).result()
from_array = handle.predict.remote(numpy.asarray(Image.open(io.BytesIO(photo)))).result()
assert from_bytes == from_array and len(from_bytes) == 5, (from_bytes, from_array)
outputs = handle.infer.remote({"image": numpy.zeros((3, 3, 224, 224), numpy.float32)}).result()
assert outputs["logits"].shape == (3, 1000)
assert handle.report.remote().result()["buckets"]
try:
    handle.predict.remote(b"no photo").result()
except BadRequest as error:
    assert "not a JPEG" in str(error)
else:
    raise AssertionError("a text is no photo")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        env=server.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_infer_gives_eagers_logits(server: Server) -> None:
    images = torch.rand(3, 3, 224, 224) * 2 - 1
    tensor = {"name": "image", "shape": [3, 3, 224, 224], "datatype": "FP32", "data": images.flatten().tolist()}
    status, _, body = server.request("/v2/models/image-classifier/infer", json.dumps({"inputs": [tensor]}).encode())
    assert status == 200, body
    (output,) = json.loads(body)["outputs"]
    assert output["shape"] == [3, 1000]
    with torch.no_grad():
        want = ImageClassifier().load()(images)
    torch.testing.assert_close(torch.tensor(output["data"]).reshape(3, 1000), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/predictions/dog-classifier", b"x", 404, "ModelNotFoundException"),
        (PREDICT, b"a text file", 400, "BadRequestException"),
        (PREDICT, (ROOT / "examples" / "cat.jpg").read_bytes()[:9000], 400, "BadRequestException"),
        (PREDICT, b"0" * (16 * 1024 * 1024 + 1), 413, "RequestEntityTooLargeException"),
    ],
)
def test_bad_requests(server: Server, path: str, body: bytes, status: int, kind: str) -> None:
    got, headers, text = server.request(path, body, {"x-request-id": "abc-123"})
    reply = json.loads(text)
    assert (got, reply["code"], reply["type"]) == (status, status, kind)
    assert headers["x-request-id"] == "abc-123"
    assert server.request(PREDICT, photos()[0])[0] == 200


def test_serving_listens_on_loopback_alone(server: Server) -> None:
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:] + Path("/proc/net/tcp6").read_text().splitlines()[1:]
    ports = [server.port, server.grpc_port, int(server.env[STATS]), int(server.env[METRICS])]
    for port in ports:
        addresses = {
            fields[1].split(":")[0]
            for fields in map(str.split, listening)
            if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == port
        }
        assert addresses == {"0100007F"}, (port, ports)
    folder = haproxy_folder(server.port)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (admin,) = folder.rglob("admin.sock")
    assert stat.S_IMODE(admin.stat().st_mode) == 0o600


def test_embeddings_of_any_mix_are_eagers(server: Server) -> None:
    words = [*"abcdefgh", "cat", "dogs"]
    texts = [" ".join(words[i % 5 :] * (1 + i % 6)) for i in range(64)]
    encoder = SentenceEncoder()
    network = encoder.load()
    with ThreadPoolExecutor(16) as pool:
        path = "/sentence-encoder/predictions/sentence-encoder"
        replies = list(pool.map(lambda text: server.request(path, text.encode()), texts))
    assert Counter(status for status, _, _ in replies) == {200: 64}
    for text, (_, _, body) in zip(texts, replies, strict=True):
        with torch.no_grad():
            want = network(*(t.unsqueeze(0) for t in encoder.preprocess(text)))[0]
        torch.testing.assert_close(torch.tensor(json.loads(body)), want, rtol=0, atol=1e-5)
