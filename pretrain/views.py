"""The augmented views of an image: the recipes of MoCo v1 and v2, of its CIFAR notebook, of SimCLR.

Every number that a view draws comes from (seed, epoch, image, view) alone: whatever the workers,
their order, and wherever a run was stopped, an image's crops in an epoch are the same.
"""

import hashlib
import math
import random
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import RandAugment, functional

from convert.pixels import IMAGENET_PIXELS, Pixels
from pretrain.config import PretrainConfig
from pretrain.sources import ImageList

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


class Views(torch.utils.data.Dataset[list[Tensor]]):
    """Images as views, two of them; an item is asked for by (epoch, index).

    Args:
        images: where they come from.
        augmentation: the recipe.
        size: side of a view in pixels.
        seed: of the whole run.
        count: how many views of each image; a memory bank takes one.
        pixels: the statistics to normalise with.
    """

    def __init__(
        self,
        images: ImageList,
        augmentation: Augmentation,
        size: int,
        seed: int,
        count: int = 2,
        pixels: Pixels = IMAGENET_PIXELS,
    ) -> None:
        self.images = images
        self.augmentation = augmentation
        self.size = size
        self.seed = seed
        self.count = count
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> list[Tensor]:
        """Return the views, each (3, size, size) float32, normalised."""
        epoch, index = item
        image = self.images.read(index)
        views = []
        for view in range(self.count):
            draw = random.Random(f"{self.seed} {epoch} {index} {view}")
            small = augment(image, self.augmentation, self.size, draw)
            tensor = functional.to_tensor(small)
            views.append(functional.normalize(tensor, self.pixels.mean, self.pixels.std))
        return views


def augment(
    image: Image.Image, augmentation: Augmentation, size: int, draw: random.Random
) -> Image.Image:
    """Draw one view of an image, as an image of size x size pixels."""
    image = _random_resized_crop(image, augmentation.crop_scale, size, draw)
    if augmentation.randaugment:
        image = _randaugment(image, augmentation.randaugment, draw)
    steps = [_gray, _jitter] if augmentation.gray_first else [_jitter, _gray]
    for step in [*steps, _blur]:
        image = step(image, augmentation, draw)
    if draw.random() < augmentation.flip_p:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def _random_resized_crop(
    image: Image.Image, scale: tuple[float, float], size: int, draw: random.Random
) -> Image.Image:
    top, left, height, width = crop_box(image.width, image.height, scale, draw)
    box = (left, top, left + width, top + height)
    return image.crop(box).resize((size, size), Image.Resampling.BILINEAR)


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


def _randaugment(image: Image.Image, strength: tuple[int, ...], draw: random.Random) -> Image.Image:
    operations, magnitude = strength
    # Torchvision draws from torch's generator: it is lent a seed of this view's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw.getrandbits(63))
        changed: Image.Image = RandAugment(operations, magnitude)(image)
    return changed


def augmentation_of(config: PretrainConfig) -> Augmentation:
    """Return what a config's views draw."""
    low, high = config.crop_scale
    return replace(
        AUGMENTATIONS[config.augmentation], crop_scale=(low, high), randaugment=config.randaugment
    )


def _jitter(image: Image.Image, augmentation: Augmentation, draw: random.Random) -> Image.Image:
    """Change brightness, contrast, saturation and hue in an order drawn for this view."""
    if draw.random() >= augmentation.jitter_p:
        return image
    brightness, contrast, saturation, hue = augmentation.jitter
    changes = [
        (functional.adjust_brightness, draw.uniform(1 - brightness, 1 + brightness)),
        (functional.adjust_contrast, draw.uniform(1 - contrast, 1 + contrast)),
        (functional.adjust_saturation, draw.uniform(1 - saturation, 1 + saturation)),
        (functional.adjust_hue, draw.uniform(-hue, hue)),
    ]
    draw.shuffle(changes)
    for change, strength in changes:
        image = change(image, strength)
    return image


def _gray(image: Image.Image, augmentation: Augmentation, draw: random.Random) -> Image.Image:
    if draw.random() >= augmentation.gray_p:
        return image
    gray: Image.Image = functional.to_grayscale(image, num_output_channels=3)
    return gray


def _blur(image: Image.Image, augmentation: Augmentation, draw: random.Random) -> Image.Image:
    if draw.random() >= augmentation.blur_p:
        return image
    return image.filter(ImageFilter.GaussianBlur(radius=draw.uniform(*augmentation.blur_sigma)))


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch visits the images: a permutation from (seed, epoch)."""
    return torch.randperm(images, generator=generator(seed, "order", epoch))


def generator(seed: int, *words: object) -> torch.Generator:
    """Make a generator whose numbers depend on these words alone."""
    digest = hashlib.sha256(" ".join(str(word) for word in (seed, *words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
