"""Training crops: scaled, cut out and mirrored at random, all drawn from the place in the run.

Legend: S: side of a crop, px.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional

from convert.errors import UserError
from convert.pixels import Pixels
from pretrain.views import epoch_order, generator
from transfer.segmentation.sets import IGNORED, Labels, Pairs

FLIP_P = 0.5


@dataclass(frozen=True)
class Crops(Dataset[tuple[Tensor, Tensor] | UserError]):
    """The crop of every place in the run: (seed, place) decides the image and all that is drawn.

    Attributes:
        pairs: the training split. pixels: what the backbone expects.
        side: S. scale: range of the factor that an image is resized by before it is cut.
        seed: of order and draws.
    """

    pairs: Pairs
    pixels: Pixels
    side: int
    scale: tuple[float, float]
    seed: int

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor] | UserError:
        """Return a crop (3, S, S) and its class numbers (S, S); what is wrong is returned."""
        epoch, at = divmod(place, len(self.pairs))
        index = int(epoch_order(len(self.pairs), self.seed, epoch)[at])
        try:
            image, labels = self.pairs.read(index)
        except UserError as error:
            return error
        low, high = self.scale
        draws = torch.rand(4, generator=generator(self.seed, "crop", place)).tolist()
        image, labels = resized(image, labels, low + (high - low) * draws[0])
        if draws[1] < FLIP_P:
            image, labels = functional.hflip(image), labels[:, ::-1]
        x, y = normalised(image, self.pixels), torch.from_numpy(labels.copy()).long()
        return cut(x, y, self.side, draws[2], draws[3])


def resized(image: Image.Image, labels: Labels, factor: float) -> tuple[Image.Image, Labels]:
    """Resize a photograph bilinearly and its class numbers to the nearest."""
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    numbers = Image.fromarray(labels).resize(size, Image.Resampling.NEAREST)
    return image.resize(size, Image.Resampling.BILINEAR), np.asarray(numbers)


def normalised(image: Image.Image, pixels: Pixels) -> Tensor:
    """Return a photograph as the backbone expects it, (3, H, W)."""
    x: Tensor = functional.to_tensor(image)
    x = functional.normalize(x, list(pixels.mean), list(pixels.std))
    return x if pixels.channel_order == "RGB" else x.flip(0)


def cut(x: Tensor, y: Tensor, side: int, right: float, down: float) -> tuple[Tensor, Tensor]:
    """Cut a square out; what is too small is padded with the mean pixel and ignored labels.

    Args:
        x: (3, H, W), normalised.
        y: (H, W).
        side: S.
        right: 0..1, where between the left and the right end the crop lies.
        down: 0..1, where between the upper and the lower end.
    """
    height, width = y.shape
    pad = (0, max(0, side - width), 0, max(0, side - height))
    x = torch.nn.functional.pad(x, pad)
    y = torch.nn.functional.pad(y, pad, value=IGNORED)
    left = min(int(right * (y.shape[1] - side + 1)), y.shape[1] - side)
    top = min(int(down * (y.shape[0] - side + 1)), y.shape[0] - side)
    return x[:, top : top + side, left : left + side], y[top : top + side, left : left + side]


@dataclass(frozen=True)
class Places:
    """The places that one process takes of each batch, as a batch sampler.

    Attributes:
        first, last: iterations. batch: images of one, over all processes.
        rank, size: this process, and how many there are.
    """

    first: int
    last: int
    batch: int
    rank: int = 0
    size: int = 1

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch // self.size
        for iteration in range(self.first, self.last):
            start = iteration * self.batch + self.rank * share
            yield list(range(start, start + share))
