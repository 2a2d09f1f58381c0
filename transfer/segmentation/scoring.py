"""Mean intersection over union, counted over all pixels of a set."""

from collections.abc import Sequence

import torch
from torch import Tensor

from transfer.segmentation.sets import IGNORED


class Confusion:
    """Counts of pixels by true class and predicted class.

    Args:
        classes: names of the classes.

    Attributes:
        counts: (L, L), int64; rows are the truth.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count an image's pixels; those whose truth is 255 do not count.

        Args:
            predicted: class numbers, (H, W).
            truth: the same, with 255 for ignored.
        """
        kept = truth != IGNORED
        pairs = truth[kept].long() * len(self.classes) + predicted[kept].long()
        self.counts += torch.bincount(pairs.cpu(), minlength=self.counts.numel()).view_as(
            self.counts
        )

    def iou(self) -> dict[str, float]:
        """Return each class's intersection over union, percent; a class seen nowhere has none."""
        hits = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return {
            name: 100 * float(hit) / float(all_)
            for name, hit, all_ in zip(self.classes, hits, union, strict=True)
            if all_ > 0
        }

    def metrics(self, task: str) -> dict[str, float]:
        """Return the mean IoU over the classes, and the share of pixels that are right, percent."""
        values = list(self.iou().values())
        total = int(self.counts.sum())
        return {
            f"{task}/mIoU": sum(values) / len(values) if values else 0.0,
            f"{task}/pixel_accuracy": 100 * int(self.counts.diagonal().sum()) / max(total, 1),
        }
