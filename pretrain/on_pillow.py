"""Views by Pillow's operators, one image at a time: what the reference's loader computes."""

import random
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torchvision.transforms import RandAugment, functional

from pretrain.views import RANDAUGMENT, Augmentation, Drawn, draw_view


def realise(image: Image.Image, view: Drawn, size: int) -> NDArray[np.uint8]:
    """Make a view of an image, (size, size, 3) RGB."""
    return np.asarray(_realise(image, view, size))


def augment(
    image: Image.Image, recipe: Augmentation, size: int, draw: random.Random
) -> Image.Image:
    """Draw one view of an image, as an image of size x size pixels."""
    return _realise(image, draw_view(*image.size, recipe, draw), size)


def _realise(image: Image.Image, view: Drawn, size: int) -> Image.Image:
    top, left, height, width = view.box
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    for name, strength in view.changes:
        if name.startswith(RANDAUGMENT):
            image = randaugment(image, name, strength)
        else:
            image = CHANGES[name](image, strength)
    return image


def randaugment(image: Image.Image, name: str, seed: float) -> Image.Image:
    """Apply torchvision's RandAugment, `randaugment N M`, drawn from a seed."""
    operations, magnitude = map(int, name.split()[1:])
    # Torchvision draws from torch's generator: it is lent a seed of this view's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        changed: Image.Image = RandAugment(operations, magnitude)(image)
    return changed


def _gray(image: Image.Image, _: float) -> Image.Image:
    gray: Image.Image = functional.to_grayscale(image, num_output_channels=3)
    return gray


def _blur(image: Image.Image, sigma: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=sigma))


def _flip(image: Image.Image, _: float) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


CHANGES: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": functional.adjust_brightness,
    "contrast": functional.adjust_contrast,
    "saturation": functional.adjust_saturation,
    "hue": functional.adjust_hue,
    "gray": _gray,
    "blur": _blur,
    "flip": _flip,
}
