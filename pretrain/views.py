"""The augmented views of an image: the recipes of MoCo v1 and v2, of its CIFAR notebook, of SimCLR.

A view is drawn first, as a crop and a list of changes, and then realised by a backend: Pillow's
operators as the reference has them (`on_pillow.py`), OpenCV's (`on_opencv.py`), or batched on the
device (`on_device.py`). All three take the same drawn view, so a recipe is one thing whatever
realises it.

Every number that a view draws comes from (seed, epoch, image, view) alone: whatever the workers,
their order, and wherever a run was stopped, an image's crops in an epoch are the same.
"""

import hashlib
import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pretrain.config import PretrainConfig

RANDAUGMENT = "randaugment"
CROP_RATIO = (3 / 4, 4 / 3)  # aspect ratios of a random crop, torchvision's
CROP_TRIES = 10  # torchvision's too: after that, the largest centred crop


@dataclass(frozen=True)
class Augmentation:
    """What a recipe draws for each view.

    Attributes:
        crop_scale: smallest and largest share of the image's area that a crop keeps.
        jitter: strengths of brightness, contrast, saturation (factors) and hue (turns).
        jitter_p, gray_p, blur_p, flip_p: probabilities.
        gray_first: v1 takes the colour away before the jitter, v2 after it.
        blur_sigma: range of the Gaussian's sigma, in pixels of the view.
        randaugment: operations and magnitude (0 to 30) of RandAugment (arXiv:1909.13719), which
            comes after the crop and beside the rest; empty: none.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.4)
    jitter_p: float = 1.0
    gray_p: float = 0.2
    gray_first: bool = True
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    flip_p: float = 0.5
    randaugment: tuple[int, ...] = ()


AUGMENTATIONS = {
    "v1": Augmentation(),  # arXiv:1911.05722, Sec. 3.3, "Technical details"
    # arXiv:2003.04297, Sec. 2: blur added, hue of .1 as in SimCLR; Table 1, column "aug+".
    "v2": Augmentation(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_first=False, blur_p=0.5),
    # The reference's CIFAR-10 notebook: v2's without blur.
    "cifar": Augmentation(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_first=False),
    # arXiv:2002.05709, Appendix A, with a colour strength of 1.
    "simclr": Augmentation(jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, gray_first=False, blur_p=0.5),
}


@dataclass(frozen=True)
class Drawn:
    """All that is done to an image to make one view of it; a backend realises it.

    Attributes:
        box: the crop (top, left, height, width), pixels of the image; it is resized to the view.
        changes: what follows, in this order, each with its strength: `brightness`, `contrast`,
            `saturation` by a factor, `hue` by so many turns, `gray`, `blur` with a sigma in pixels
            of the view, `flip`, and `randaugment N M` of N operations and magnitude M, whose
            strength is the seed of its own draws.
    """

    box: tuple[int, int, int, int]
    changes: tuple[tuple[str, float], ...]


def draw_view(width: int, height: int, recipe: Augmentation, draw: random.Random) -> Drawn:
    """Draw what makes one view of an image of this size, pixels."""
    box = crop_box(width, height, recipe.crop_scale, draw)
    steps = [_gray, _jitter] if recipe.gray_first else [_jitter, _gray]
    changes = [
        change for step in [_randaugment, *steps, _blur, _flip] for change in step(recipe, draw)
    ]
    return Drawn(box, tuple(changes))


def augmentation_of(config: PretrainConfig) -> Augmentation:
    """Return what a config's views draw."""
    low, high = config.crop_scale
    return replace(
        AUGMENTATIONS[config.augmentation], crop_scale=(low, high), randaugment=config.randaugment
    )


def _randaugment(recipe: Augmentation, draw: random.Random) -> list[tuple[str, float]]:
    """Draw the seed of RandAugment's own draws."""
    if not recipe.randaugment:
        return []
    operations, magnitude = recipe.randaugment
    return [(f"{RANDAUGMENT} {operations} {magnitude}", float(draw.getrandbits(52)))]


def _gray(recipe: Augmentation, draw: random.Random) -> list[tuple[str, float]]:
    return [("gray", 1.0)] if draw.random() < recipe.gray_p else []


def _jitter(recipe: Augmentation, draw: random.Random) -> list[tuple[str, float]]:
    """Change brightness, contrast, saturation and hue in an order drawn for this view."""
    if draw.random() >= recipe.jitter_p:
        return []
    brightness, contrast, saturation, hue = recipe.jitter
    changes = [
        ("brightness", draw.uniform(1 - brightness, 1 + brightness)),
        ("contrast", draw.uniform(1 - contrast, 1 + contrast)),
        ("saturation", draw.uniform(1 - saturation, 1 + saturation)),
        ("hue", draw.uniform(-hue, hue)),
    ]
    draw.shuffle(changes)
    return changes


def _blur(recipe: Augmentation, draw: random.Random) -> list[tuple[str, float]]:
    if draw.random() >= recipe.blur_p:
        return []
    return [("blur", draw.uniform(*recipe.blur_sigma))]


def _flip(recipe: Augmentation, draw: random.Random) -> list[tuple[str, float]]:
    return [("flip", 1.0)] if draw.random() < recipe.flip_p else []


def crop_box(
    width: int, height: int, scale: tuple[float, float], draw: random.Random
) -> tuple[int, int, int, int]:
    """Draw a crop of torchvision's RandomResizedCrop: (top, left, height, width) in pixels."""
    for _ in range(CROP_TRIES):
        area = width * height * draw.uniform(*scale)
        ratio = math.exp(draw.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, height - h), draw.randint(0, width - w), h, w
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch visits the images: a permutation from (seed, epoch)."""
    return torch.randperm(images, generator=generator(seed, "order", epoch))


def generator(seed: int, *words: object) -> torch.Generator:
    """Make a generator whose numbers depend on these words alone."""
    digest = hashlib.sha256(" ".join(str(word) for word in (seed, *words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
