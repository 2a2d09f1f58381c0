"""Images become views: read and drawn by the loader's processes, realised there or on the device.

Legend: n: images of a batch; S: side of a view, px.
"""

import importlib.util
import random
from typing import Any

import torch
from torch import Tensor

from convert.errors import UserError
from convert.pixels import IMAGENET_PIXELS, Pixels
from pretrain.sources import ImageList
from pretrain.views import Augmentation, Drawn, draw_view

PILLOW, OPENCV, DEVICE = "pillow", "opencv", "device"
BACKENDS = (PILLOW, OPENCV, DEVICE)
SMALL = 128  # px: images of one size up to here become views together
Decoded = tuple[Tensor, list[Drawn]]  # (H, W, 3) uint8, and what each of its views is


def choose_backend(wanted: str, device: str, *, randaugment: bool = False) -> str:
    """Return what realises the views: what was asked for, or the fastest at hand.

    Args:
        wanted: one of `BACKENDS`, or empty.
        device: cpu or cuda, of the encoders.
        randaugment: whether the views have it; it is Pillow's, in the loader.

    Raises:
        UserError: there is no such backend, or OpenCV is not installed.
    """
    if wanted not in ("", *BACKENDS):
        raise UserError(f"views is '{wanted}', want one of {', '.join(BACKENDS)}")
    found = importlib.util.find_spec("cv2") is not None
    if wanted == OPENCV and not found:
        raise UserError("views opencv: OpenCV is not installed; pip install opencv-python-headless")
    if wanted == DEVICE and randaugment:
        raise UserError("views device: randaugment runs in the loader; want views opencv or pillow")
    if not wanted and device == "cuda" and not randaugment:
        return DEVICE
    return wanted or (OPENCV if found else PILLOW)


class Views(torch.utils.data.Dataset[list[Tensor] | Decoded]):
    """Images as views, two of them; an item is asked for by (epoch, index).

    Args:
        images: where they come from.
        recipe: what a view draws.
        size: S.
        seed: of the whole run.
        count: how many views of each image; a memory bank takes one.
        backend: what realises them.
    """

    def __init__(
        self,
        images: ImageList,
        recipe: Augmentation,
        size: int,
        seed: int,
        count: int = 2,
        backend: str = PILLOW,
    ) -> None:
        self.images = images
        self.recipe = recipe
        self.size = size
        self.seed = seed
        self.count = count
        self.backend = backend

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> list[Tensor] | Decoded:
        """Return the views, each (3, S, S) uint8; for the device the image and what they are."""
        _, index = item
        if self.backend == PILLOW:
            from pretrain import on_pillow

            image = self.images.read(index)
            drawn = self.draw(item, image.size)
            made = [on_pillow.realise(image, view, self.size) for view in drawn]
        else:
            pixels = self.images.array(index)
            drawn = self.draw(item, (pixels.shape[1], pixels.shape[0]))
            if self.backend == DEVICE:
                return torch.from_numpy(pixels), drawn
            from pretrain import on_opencv

            made = [on_opencv.realise(pixels, view, self.size) for view in drawn]
        return [torch.from_numpy(view.transpose(2, 0, 1).copy()) for view in made]

    def draw(self, item: tuple[int, int], width_height: tuple[int, int]) -> list[Drawn]:
        """Draw what each view is of the (epoch, index) image, of so many pixels."""
        epoch, index = item
        places = [f"{self.seed} {epoch} {index} {view}" for view in range(self.count)]
        return [draw_view(*width_height, self.recipe, random.Random(place)) for place in places]


def collate(items: list[Any]) -> Any:
    """Put a batch's views together, each (n, 3, S, S); decoded images too, if small and alike."""
    if isinstance(items[0], tuple):
        images, drawn = [image for image, _ in items], [drawn for _, drawn in items]
        alike = len({image.shape for image in images}) == 1 and max(images[0].shape) <= SMALL
        return (torch.stack(images) if alike else images), drawn
    return [torch.stack(list(views)) for views in zip(*items, strict=True)]


def on_device(
    batch: Any, device: torch.device, size: int, pixels: Pixels = IMAGENET_PIXELS
) -> list[Tensor]:
    """Bring a batch to the device and make it what the encoders take.

    Args:
        batch: what `collate` gave.
        device: where to.
        size: S.
        pixels: the statistics to normalise with.

    Returns:
        The views, each (n, 3, S, S) float32, normalised.
    """
    if isinstance(batch, tuple):
        from pretrain.on_device import realise

        images, drawn = batch
        if isinstance(images, Tensor):
            images = images.to(device, non_blocking=True)
        else:
            images = [image.to(device, non_blocking=True) for image in images]
        views = [realise(images, own, size) for own in zip(*drawn, strict=True)]
    else:
        views = [view.to(device, non_blocking=True).float() for view in batch]
    return [normalised(view, pixels) for view in views]


def normalised(x: Tensor, pixels: Pixels) -> Tensor:
    """Normalise levels 0..255, (n, 3, S, S); x is overwritten."""
    mean, std = (x.new_tensor(values)[:, None, None] for values in (pixels.mean, pixels.std))
    return x.div_(255).sub_(mean).div_(std)
