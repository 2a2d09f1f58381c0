"""Small sets lie decoded on the device: each image is read once, and a step only draws its views.

Legend: M: images of the set; H, W: their sides, px.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from convert.progress import Progress
from pretrain.loader import SMALL, Views, collate
from pretrain.views import Drawn
from pretrain.workers import load

MOST_BYTES = 3 * 2**30  # STL-10, 105,000 images of 96 px, is the largest set of the recipes
AT_ONCE = 512  # images that are read together


def hold(views: Views, device: torch.device, workers: int, *, quiet: bool = False) -> Tensor | None:
    """Decode a set whose images are small and of one size.

    Args:
        views: of the set, realised on the device.
        device: where it shall lie.
        workers: processes that decode.
        quiet: show no progress.

    Returns:
        (M, H, W, 3) uint8 on the device; None: some image is larger than `SMALL` or of another
        size, or all together are more than `MOST_BYTES`.

    Raises:
        UserError: an image cannot be read.
    """
    M = len(views)
    first = views.images.array(0)
    if max(first.shape) > SMALL or M * first.size > MOST_BYTES:
        return None
    held = torch.empty((M, *first.shape), dtype=torch.uint8, device=device)
    places = [[(0, i) for i in range(at, min(at + AT_ONCE, M))] for at in range(0, M, AT_ONCE)]
    done = 0
    with Progress(M, "reading", quiet=quiet) as shown:
        for pixels, drawn in load(views, places, workers, collate):
            if not isinstance(pixels, Tensor) or pixels.shape[1:] != first.shape:
                return None
            held[done : done + len(drawn)] = pixels.to(device)
            done += len(drawn)
            shown.add(len(drawn))
    return held


class Draws(torch.utils.data.Dataset[tuple[int, list[Drawn]]]):
    """What the views of held images are, asked for by (epoch, index) as the views are."""

    def __init__(self, views: Views, held: Tensor) -> None:
        self.views = views
        self.width_height = (held.shape[2], held.shape[1])

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, item: tuple[int, int]) -> tuple[int, list[Drawn]]:
        """Return the image's place, and what each of its views is."""
        return item[1], self.views.draw(item, self.width_height)


def batches(
    views: Views, held: Tensor, places: Any, workers: int
) -> Iterator[tuple[Tensor, list[list[Drawn]]]]:
    """Yield images and what their views are, as a loader of decoded images does.

    Args:
        views: of the set.
        held: its images, as `hold` gave them.
        places: the (epoch, index) pairs of each batch.
        workers: processes that draw.
    """
    for items in load(Draws(views, held), places, workers, list):
        indices = torch.tensor([index for index, _ in items])
        yield held[indices.to(held.device, non_blocking=True)], [drawn for _, drawn in items]
