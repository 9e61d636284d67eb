from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deployments.errors import BadRequest
from deployments.vision import ImageClassifier, imagenet_labels

PHOTO = Path(__file__).parents[2] / "examples" / "cat.jpg"


@pytest.fixture(scope="module")
def classifier() -> ImageClassifier:
    classifier = ImageClassifier()
    classifier.load()
    return classifier


def encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_the_sample_photo_is_a_cat(classifier: ImageClassifier) -> None:
    network = classifier.load()
    (pixels,) = classifier.preprocess(PHOTO.read_bytes())
    with torch.no_grad():
        reply = classifier.postprocess(network(pixels.unsqueeze(0))[0])
    assert len(reply) == 5
    assert list(reply.values()) == sorted(reply.values(), reverse=True)
    assert {"tabby", "tiger cat", "Egyptian cat"} == set(list(reply)[:3])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_every_format_and_mode_becomes_the_same_tensor(classifier: ImageClassifier, kind: str, mode: str) -> None:
    if kind == "JPEG" and mode in ("RGBA", "P"):
        pytest.skip("JPEG has no such mode")
    image = Image.new("RGB", (300, 250), (90, 90, 90))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    (pixels,) = classifier.preprocess(encode(image, kind))
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.full_like(pixels, (90 - 127) / 128), atol=0.03, rtol=0)


def test_a_photo_taken_sideways_is_turned_upright(classifier: ImageClassifier) -> None:
    upright = Image.new("RGB", (300, 300))
    upright.paste((255, 255, 255), (0, 0, 300, 150))  # white above black
    sideways = upright.rotate(90)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 270 degrees to see it
    buffer = io.BytesIO()
    sideways.save(buffer, "PNG", exif=exif)
    (pixels,) = classifier.preprocess(buffer.getvalue())
    assert pixels[0, 10, 112] > 0.9
    assert pixels[0, 210, 112] < -0.9


def test_an_array_of_pixels_is_what_its_png_is(classifier: ImageClassifier) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (260, 310, 3), dtype=np.uint8)
    (from_array,) = classifier.preprocess(pixels)
    (from_file,) = classifier.preprocess(encode(Image.fromarray(pixels), "PNG"))
    assert torch.equal(from_array, from_file)


def bomb() -> bytes:
    """A small PNG file whose header claims 20,000 x 20,000 pixels."""
    data = bytearray(encode(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "not a JPEG, PNG, WEBP image"),
        (b"hello, I am a text file\n" * 50, "not a JPEG, PNG, WEBP image"),
        (PHOTO.read_bytes()[:5000], "damaged"),
        (PHOTO.read_bytes()[:30], "not a JPEG, PNG, WEBP image|damaged"),
        (bomb(), "the image is too large: Image size .400000000 pixels. exceeds"),
        (encode(Image.new("RGB", (9, 9)), "GIF"), "not a JPEG, PNG, WEBP image"),
        (encode(Image.new("RGB", (500, 1)), "PNG"), "too few to crop"),
        ({"image": "x"}, "an image file .* is needed, not dict"),
        ("text", "is needed, not str"),
        (np.zeros((4, 4), np.uint8), r"must be uint8 \[height, width, 3\], got uint8 \[4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), "got float32"),
        (np.zeros((9000, 9000, 3), np.uint8), "more than"),
    ],
)
def test_what_is_no_photo_is_a_bad_request_that_says_so(
    classifier: ImageClassifier, payload: object, message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        classifier.preprocess(payload)


def test_arguments_are_checked() -> None:
    for wrong in ({"weights": "resnet"}, {"top_k": 0}, {"top_k": 1001}, {"max_pixels": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ImageClassifier(**wrong)


def test_each_label_is_unique() -> None:
    labels = imagenet_labels()
    assert all(labels)
    assert len(set(labels)) == 1000
    assert labels[281] == "tabby"
    assert labels[134] != labels[517]  # the two cranes
