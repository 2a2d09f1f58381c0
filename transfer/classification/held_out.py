"""A share of the training images, set apart to choose by: never an image of the test set."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from convert.errors import UserError
from pretrain.sources import ImageList
from pretrain.views import generator


@dataclass(frozen=True, kw_only=True)
class Part(ImageList):
    """Some images of a list.

    Attributes:
        whole: the list. places: which of its images, in order.
    """

    whole: ImageList
    places: tuple[int, ...]

    @classmethod
    def of(cls, whole: ImageList, places: Tensor) -> "Part":
        """Take the images at some places, (n,) int64."""
        chosen = tuple(places.tolist())
        paths = tuple(whole.paths[i] for i in chosen)
        labels = tuple(whole.labels[i] for i in chosen)
        return cls(whole.root, paths, labels, whole.classes, whole=whole, places=chosen)

    def name(self, index: int) -> str:
        """Return an image's name, for people."""
        return self.whole.name(self.places[index])

    def data(self, index: int) -> bytes:
        """Read one image's file."""
        return self.whole.data(self.places[index])

    def read(self, index: int) -> Image.Image:
        """Decode one image to RGB."""
        return self.whole.read(self.places[index])

    def listing_hash(self) -> str:
        """Hash the whole list's listing and the places."""
        text = f"{self.whole.listing_hash()} {self.places}"
        return hashlib.sha256(text.encode()).hexdigest()


def held_out(labels: Any, share: float, seed: int) -> Tensor:
    """Draw the places of held-out images, of each class its share, from the seed alone.

    Args:
        labels: (N,) class indices of the training images.
        share: of each class, rounded; of a class of two images or more, one at least is held out
            and one at least is not.
        seed: of the draw.

    Returns:
        (n,) int64, sorted.

    Raises:
        UserError: no class has two images.
    """
    of = torch.as_tensor(labels)
    drawn = []
    for label in of.unique().tolist():
        places = (of == label).nonzero().flatten()
        count = min(max(round(share * len(places)), 1), len(places) - 1)
        order = torch.randperm(len(places), generator=generator(seed, "held out", label))
        drawn.append(places[order[:count]])
    held = torch.cat(drawn).sort().values if drawn else of
    if len(held) == 0:
        raise UserError(
            f"grid: {len(of)} training images and no class with two of them: nothing can be held "
            "out to choose by; leave --grid out"
        )
    return held
