from __future__ import annotations

import base64
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from deployments.errors import BadRequest
from deployments.vision import ImageClassifier, imagenet_labels, to_rgb

PHOTO = Path(__file__).parents[2] / "examples" / "cat.jpg"


@pytest.fixture(scope="module")
def classifier() -> ImageClassifier:
    classifier = ImageClassifier()
    classifier.load()
    return classifier


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
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


def test_sixteen_bit_gray_looks_like_eight_bit_gray(classifier: ImageClassifier) -> None:
    eight = np.tile(np.linspace(0, 255, 300), (250, 1)).astype(np.uint8)
    sixteen = eight.astype(np.uint16) * 257  # from black to white, 0 to 65535
    file = encode(Image.fromarray(sixteen), "PNG")
    with Image.open(io.BytesIO(file)) as opened:
        assert opened.mode == "I;16"
    (expected,) = classifier.preprocess(encode(Image.fromarray(eight), "PNG"))
    (found,) = classifier.preprocess(file)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
    for mode, kind in (("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I", "=i4")):
        image = Image.frombytes(mode, (300, 250), sixteen.astype(kind).tobytes())
        assert np.array_equal(np.asarray(to_rgb(image))[..., 0], eight), mode
    beyond = Image.frombytes("I", (2, 1), np.array([-5, 2**30], "=i4").tobytes())
    assert np.asarray(to_rgb(beyond))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_exif_transpose_turns_it(classifier: ImageClassifier, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(PHOTO) as photo:
        file = encode(photo.resize((300, 240)), kind, exif=exif.tobytes())
    with Image.open(io.BytesIO(file)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    (found,) = classifier.preprocess(file)
    assert torch.equal(found, classifier.preprocess(upright)[0])


SIDEWAYS = (0x0112, 3, 1, struct.pack("<H", 6))


def make_exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Tags, types, counts and values of up to four bytes, as EXIF carries them."""
    rows = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries)) + rows + bytes(4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "other",
    [
        (0x0100, 11, 1, struct.pack("<f", 300.0)),  # a width that is no whole number
        (0x0100, 2, 4, b"300\0"),  # and one that is text
        (0x011A, 2, 3, b"72\0"),  # a resolution that is text
    ],
)
def test_a_photo_with_odd_exif_is_turned_upright(
    classifier: ImageClassifier, kind: str, other: tuple[int, int, int, bytes]
) -> None:
    with Image.open(PHOTO) as photo:
        image = photo.resize((300, 240))
    (expected,) = classifier.preprocess(encode(image, kind, exif=make_exif(SIDEWAYS)))
    (found,) = classifier.preprocess(encode(image, kind, exif=make_exif(*sorted([SIDEWAYS, other]))))
    assert torch.equal(found, expected)
    assert not torch.equal(found, classifier.preprocess(encode(image, kind))[0])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II*\0"])
def test_a_photo_with_broken_exif_stays_as_it_is(classifier: ImageClassifier, kind: str, exif: bytes) -> None:
    with Image.open(PHOTO) as photo:
        image = photo.resize((300, 240))
    (found,) = classifier.preprocess(encode(image, kind, exif=exif))
    assert torch.equal(found, classifier.preprocess(encode(image, kind))[0])


def test_a_photo_may_come_as_base64_and_in_an_object(classifier: ImageClassifier) -> None:
    file = PHOTO.read_bytes()
    (expected,) = classifier.preprocess(file)
    text = base64.b64encode(file).decode()
    lines = base64.encodebytes(file).decode()
    for payload in (text, lines, {"data": text}, {"body": text}, {"data": file}):
        assert torch.equal(classifier.preprocess(payload)[0], expected)


def test_nested_lists_are_the_normalised_image(classifier: ImageClassifier) -> None:
    (tensor,) = classifier.preprocess(PHOTO.read_bytes())
    for payload in (tensor.tolist(), {"data": tensor.tolist()}):
        (found,) = classifier.preprocess(payload)
        assert found.dtype == torch.float32
        assert torch.equal(found, tensor)


def spoil(value: Any) -> list[Any]:
    """The lists of a normalised image, but for one value in their midst."""
    lists = torch.zeros(3, 224, 224).tolist()
    lists[1][100][7] = value
    return lists


@pytest.mark.parametrize(
    "payload",
    [
        [],
        [1, 2, 3],
        [[[]]],
        [[0.0] * 1_000_000] + [[]] * 100_000,  # as a tensor it would have 10**11 values
        torch.zeros(1, 3, 224, 224).tolist(),
        torch.zeros(224, 224, 3).tolist(),
        [*torch.zeros(2, 224, 224).tolist(), [[0.0] * 223] * 224],
        [*torch.zeros(2, 224, 224).tolist(), ["1" * 224] * 224],
        *map(spoil, ("5", "x" * 1_000_000, None, [], {}, 10**400)),
    ],
)
def test_other_lists_are_a_bad_request(classifier: ImageClassifier, payload: list[Any]) -> None:
    with pytest.raises(BadRequest, match=r"lists must be the normalised image, \[3, 224, 224\]"):
        classifier.preprocess(payload)


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
        ({"image": "x"}, "an image file .* is needed, or its base64 text, not dict"),
        ({"data": {"data": "x"}}, "not dict"),
        ({"data": "eA==", "body": "eA=="}, "not dict"),
        (None, "not NoneType"),
        ("a cat on a sofa", "text must be an image file in base64"),
        ("Katze, grün", "text must be an image file in base64"),
        (base64.b64encode(PHOTO.read_bytes()).decode().replace("+", " "), "in base64"),  # from a form, not escaped
        ("eA==", "not a JPEG, PNG, WEBP image"),
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
