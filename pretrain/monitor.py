"""Is it learning? The log, the kNN vote, the mean loss against chance."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import functional as transforms

from convert.pixels import IMAGENET_PIXELS, Pixels
from pretrain.sources import ImageList

LOG_NAME = "log.jsonl"
QUERIES_AT_ONCE = 256


class Log:
    """`log.jsonl`: one line per logged step or epoch, appended, cut back when a run is resumed."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the log of a run that goes on after `step`, without the lines beyond it."""
        self.path = folder / LOG_NAME
        kept = [line for line in read_log(folder) if line["step"] <= step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def add(self, **values: float) -> None:
        """Append one line."""
        rounded = {k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read a run's log; a last line that was cut short by a kill is left out."""
    path = Path(folder) / LOG_NAME
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def mean_of_last_tenth(lines: list[dict[str, Any]], key: str) -> float:
    """Return the mean of a logged value over the last tenth of its lines; NaN without any."""
    values = [line[key] for line in lines if key in line]
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last) if last else math.nan


def verdict(loss: float, K: int, batch_top1: float, batch_size: int) -> str:
    """Say in words what a run's end means beside chance.

    Args:
        loss: mean of the last tenth; chance is log(K + 1).
        K: keys in the queue.
        batch_top1: share of queries nearest to their own key among the batch's, in percent. Unlike
            the loss it cannot fall for keys that are merely older than the positive.
        batch_size: images in a batch; chance is one of them.
    """
    chance = math.log(K + 1)
    below = 100 * (1 - loss / chance)
    sign = (
        f"{abs(below):.0f}% {'under' if below >= 0 else 'over'} chance, log(K + 1) = {chance:.2f}"
    )
    return (
        f"mean loss of the last tenth {loss:.3f}: {sign}; {batch_top1:.1f}% of queries are nearest "
        f"to their own key among the batch's {batch_size}, chance {100 / batch_size:.1f}%"
    )


def knn_top1(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    k: int = 200,
    tau: float = 0.1,
    num_classes: int,
) -> float:
    """Vote with weighted nearest neighbours, as InstDisc does (arXiv:1805.01978, Sec. 3.4).

    Args:
        bank: (M, D) features of the training images.
        bank_labels: (M,) their classes.
        queries: (N, D) features to classify.
        labels: (N,) their classes.
        k: neighbours that vote; more than M means all.
        tau: a neighbour's vote weighs exp(cosine / tau).
        num_classes: how many classes there are.

    Returns:
        Top-1 accuracy in percent.
    """
    bank = functional.normalize(bank.float(), dim=1)
    k = min(k, len(bank))
    right = 0
    for part, truth in zip(
        queries.split(QUERIES_AT_ONCE), labels.split(QUERIES_AT_ONCE), strict=True
    ):
        cosine = functional.normalize(part.float(), dim=1) @ bank.T
        nearest, places = cosine.topk(k, dim=1)
        votes = torch.zeros(len(part), num_classes, device=part.device)
        # Subtracting the largest possible cosine scales all votes alike and keeps exp finite.
        votes.scatter_add_(1, bank_labels[places], ((nearest - 1) / tau).exp())
        right += int((votes.argmax(dim=1) == truth).sum())
    return 100 * right / len(labels)


class KnnMonitor:
    """Scores an encoder's backbone features on a labelled set while it trains.

    Args:
        train: images of the bank.
        val: images that are classified.
        size: side of the images fed in, in pixels.
        bf16: run the encoder under bfloat16 autocast.
        pixels: the statistics to normalise with.
    """

    def __init__(
        self,
        train: ImageList,
        val: ImageList,
        size: int,
        *,
        bf16: bool = False,
        pixels: Pixels = IMAGENET_PIXELS,
    ) -> None:
        self.train = train
        self.val = val
        self.size = size
        self.bf16 = bf16
        self.pixels = pixels

    def __call__(self, encoder: nn.Module, device: torch.device, batch_size: int = 64) -> float:
        """Return kNN top-1 in percent; the encoder is left as it was."""
        head, encoder.fc = encoder.fc, nn.Identity()
        training = encoder.training
        encoder.eval()
        try:
            bank, bank_labels = self._features(encoder, self.train, device, batch_size)
            queries, labels = self._features(encoder, self.val, device, batch_size)
        finally:
            encoder.fc = head
            encoder.train(training)
        classes = len(self.train.classes)
        return knn_top1(bank, bank_labels, queries, labels, num_classes=classes)

    @torch.no_grad()
    def _features(
        self, encoder: nn.Module, images: ImageList, device: torch.device, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        found = []
        for batch in self._batches(images, batch_size):
            batch = batch.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                found.append(encoder(batch).float())
        return torch.cat(found), torch.tensor(images.labels, device=device)

    def _batches(self, images: ImageList, batch_size: int) -> Iterator[Tensor]:
        for first in range(0, len(images), batch_size):
            places = range(first, min(first + batch_size, len(images)))
            yield torch.stack([self._pixels_of(images, index) for index in places])

    def _pixels_of(self, images: ImageList, index: int) -> Tensor:
        image = transforms.resize(images.read(index), [self.size])
        image = transforms.center_crop(image, [self.size, self.size])
        tensor = transforms.to_tensor(image)
        normalised: Tensor = transforms.normalize(tensor, self.pixels.mean, self.pixels.std)
        return normalised
