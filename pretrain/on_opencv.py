"""Views by the fastest operators of a CPU: torchvision's resize on bytes, OpenCV's for the rest.

They follow Pillow's: brightness, contrast and saturation are blends cut off to whole numbers, the
hue is cut off to a byte and turned in its steps, and the blur is the kernel of Pillow's three box
filters. `tests/test_backends.py` holds how far they are apart on photographs.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional

from pretrain.blur import blur_kernel
from pretrain.on_pillow import randaugment
from pretrain.views import RANDAUGMENT, Drawn

Bytes = NDArray[np.uint8]  # (H, W, 3) RGB

cv2.setNumThreads(0)  # the loader's processes fill the cores already
_LEVELS = np.arange(256)


def realise(image: Bytes, view: Drawn, size: int) -> Bytes:
    """Make a view of an image, (H, W, 3) RGB -> (size, size, 3).

    Args:
        image: decoded bytes.
        view: what is done to it.
        size: side of the view, pixels.
    """
    top, left, height, width = view.box
    crop = torch.from_numpy(image).permute(2, 0, 1)[:, top : top + height, left : left + width]
    small = functional.resize(crop, [size, size], antialias=True)
    pixels: Bytes = small.permute(1, 2, 0).contiguous().numpy()
    for name, strength in view.changes:
        if name.startswith(RANDAUGMENT):
            pixels = np.asarray(randaugment(Image.fromarray(pixels), name, strength))
        else:
            pixels = CHANGES[name](pixels, strength)
    return pixels


def _brightness(pixels: Bytes, factor: float) -> Bytes:
    return _mapped(pixels, _LEVELS * factor)


def _contrast(pixels: Bytes, factor: float) -> Bytes:
    mean = int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _mapped(pixels, mean + factor * (_LEVELS - mean))


def _saturation(pixels: Bytes, factor: float) -> Bytes:
    # It rounds to the nearest, so that half a level less is what is cut off.
    gray = _gray(pixels, 1.0)
    return np.asarray(cv2.addWeighted(pixels, factor, gray, 1 - factor, -0.5), np.uint8)


def _hue(pixels: Bytes, turns: float) -> Bytes:
    hsv = cv2.cvtColor(np.float32(pixels), cv2.COLOR_RGB2HSV)
    hue = (cv2.extractChannel(hsv, 0) * np.float32(255 / 360)).astype(np.uint8)
    hue += np.uint8(int(turns * 255) % 256)
    cv2.insertChannel(hue * np.float32(360 / 255), hsv, 0)
    return np.asarray(cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)), np.uint8)


def _gray(pixels: Bytes, _: float) -> Bytes:
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), np.uint8)


def _blur(pixels: Bytes, sigma: float) -> Bytes:
    kernel = blur_kernel(sigma)
    blurred = cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(blurred, np.uint8)


def _flip(pixels: Bytes, _: float) -> Bytes:
    return np.asarray(cv2.flip(pixels, 1), np.uint8)


def _mapped(pixels: Bytes, levels: NDArray[Any]) -> Bytes:
    """Replace each level by another, cut off to a whole number as Pillow's blend does."""
    return np.asarray(cv2.LUT(pixels, levels.clip(0, 255).astype(np.uint8)), np.uint8)


CHANGES: dict[str, Callable[[Bytes, float], Bytes]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "gray": _gray,
    "blur": _blur,
    "flip": _flip,
}
