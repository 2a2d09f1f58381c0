"""Is it learning? The log, what is said of it, the kNN vote, the mean loss against chance."""

import csv
import io
import json
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import functional as transforms
from tqdm import tqdm

from convert.errors import UserError
from convert.files import write_text
from convert.pixels import IMAGENET_PIXELS, Pixels
from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.sources import ImageList, open_set
from pretrain.verdicts import Judge

LOG_NAME = "log.jsonl"
CSV_NAME = "log.csv"
TENSORBOARD_NAME = "tensorboard"
# What a line may hold, in the order of the CSV's columns. A line of steps has means over the steps
# since the line before it, and the spread of its last step's embeddings; a vote has its own line.
COLUMNS = (
    "step",  # done
    "steps",  # of the whole run
    "epoch",  # done, with the share of the one under way
    "loss",
    "chance_loss",  # of a guess: log(K + 1)
    "top1",  # percent of queries that score their key above all negatives
    "batch_top1",  # percent that score it above the batch's other keys
    "lr",
    "gradient_norm",
    "alignment",  # see pretrain/spread.py
    "uniformity",
    "effective_rank",
    "queue_age_steps",  # since the oldest stored key was made
    "queue_random",  # percent of the stored keys that are still the random ones of the start
    "images_per_s",
    "data_wait",  # percent of the time in which the loop waited for images
    "seconds",  # of training so far
    "knn_top1",  # percent
    "leak_same",  # see pretrain/leak.py
    "leak_shuffled",
    "leak_apart",
    "verdicts",  # what began or ended: sentences
)
Item = TypeVar("Item")
QUERIES_AT_ONCE = 256
KNN_K, KNN_TAU = 200, 0.1  # of the reference's CIFAR-10 notebook
SHOWN = 3  # names in an error line


class Log:
    """A run's log, a line per logged steps or vote, in three formats.

    `log.jsonl` is the log; `log.csv` and the event files of TensorBoard, where that is installed,
    say the same. When a run is resumed, all are cut back to where it goes on.

    Args:
        folder: the run's.
        step: steps done: lines beyond are forgotten.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step
        self.kept = [line for line in read_log(folder) if line["step"] <= step]
        write_text(folder / LOG_NAME, "".join(json.dumps(line) + "\n" for line in self.kept))
        rows = "".join(_csv_row(line) for line in self.kept)
        write_text(folder / CSV_NAME, ",".join(COLUMNS) + "\n" + rows)
        self._writer: Any = None

    def add(self, **values: Any) -> None:
        """Append one line; numbers that are not finite are left out."""
        line = {key: v for key, v in rounded(values).items() if _is_written(v)}
        for name, text in ((LOG_NAME, json.dumps(line) + "\n"), (CSV_NAME, _csv_row(line))):
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(text)
        self._show(line)

    def close(self) -> None:
        """Write what TensorBoard's writer still holds."""
        if self._writer:
            self._writer.close()

    def _show(self, line: dict[str, Any]) -> None:
        if self._writer is None:  # now and not earlier: its thread must not be forked
            self._writer = _tensorboard(self.folder, self.step)
        if self._writer:
            step = line["step"]
            for key, value in line.items():
                if key == "verdicts":
                    self._writer.add_text(key, "  \n".join(value), step)
                elif key not in {"step", "steps"}:
                    self._writer.add_scalar(key, value, step)
            self._writer.flush()


class Watch:
    """Logs a run and says the verdicts on it, each once.

    Args:
        folder: the run's.
        step: steps done; the log before it is read again, so that what held still holds.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.log, self.judge = Log(folder, step), Judge()
        for line in self.log.kept:
            self.judge.hear(line)

    def add(self, **values: Any) -> None:
        """Log a line, with what is to be said of it."""
        said = self.judge.hear(rounded(values))
        self.log.add(**values, **({"verdicts": said} if said else {}))
        for words in said:
            tqdm.write(words)  # above the progress bar, if there is one


class Waiting(Generic[Item]):
    """Goes through items and counts the seconds that they were waited for.

    On a GPU, which works while its host waits, a short wait costs nothing; the lines of the log let
    host and device meet, so that a share of the time between them is a share of the device's too.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._seconds = 0.0

    def __iter__(self) -> "Waiting[Item]":
        return self

    def __next__(self) -> Item:
        started = time.monotonic()
        try:
            return next(self._items)
        finally:
            self._seconds += time.monotonic() - started

    def since_asked(self) -> float:
        """Return the seconds since this was last asked for."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Return a line's values as the log has them: six digits, which a resumed run reads again."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}


def _is_written(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _csv_row(line: dict[str, Any]) -> str:
    row = io.StringIO()
    values = [line.get(key, "") for key in COLUMNS]
    csv.writer(row, lineterminator="\n").writerow(
        [" | ".join(v) if isinstance(v, list) else v for v in values]
    )
    return row.getvalue()


def _tensorboard(folder: Path, step: int) -> Any:
    """Open a writer of event files that hides what an earlier one wrote beyond a step; or False."""
    if find_spec("tensorboard") is None:
        return False
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / TENSORBOARD_NAME), purge_step=step + 1)


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
    k: int = KNN_K,
    tau: float = KNN_TAU,
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

    k and tau are those of the reference's CIFAR-10 notebook, where there are as many images of a
    class; more neighbours than those would always be foreigners.

    Args:
        train: images of the bank.
        val: images that are classified, of the same classes.
        size: side of the images fed in, in pixels.
        bf16: run the encoder under bfloat16 autocast.
        pixels: the statistics to normalise with.
        workers: threads that read images.
    """

    def __init__(
        self,
        train: ImageList,
        val: ImageList,
        size: int,
        *,
        bf16: bool = False,
        pixels: Pixels = IMAGENET_PIXELS,
        workers: int = 1,
    ) -> None:
        self.train = train
        self.val = val
        self.size = size
        self.bf16 = bf16
        self.pixels = pixels
        self.workers = max(1, workers)
        self.k = min(KNN_K, max(1, len(train) // len(train.classes)))

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
        return knn_top1(
            bank, bank_labels, queries, labels, k=self.k, num_classes=len(self.train.classes)
        )

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
        """Read batches in order, some ahead of the one that is encoded."""
        waiting: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            for first in range(0, len(images), batch_size):
                places = range(first, min(first + batch_size, len(images)))
                waiting.append(pool.submit(self._batch, images, places))
                if len(waiting) > self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _batch(self, images: ImageList, places: Iterable[int]) -> Tensor:
        return torch.stack([self._pixels_of(images, index) for index in places])

    def _pixels_of(self, images: ImageList, index: int) -> Tensor:
        image = transforms.resize(images.read(index), [self.size])
        image = transforms.center_crop(image, [self.size, self.size])
        tensor = transforms.to_tensor(image)
        normalised: Tensor = transforms.normalize(tensor, self.pixels.mean, self.pixels.std)
        return normalised


def open_knn(config: PretrainConfig, images: ImageList, val: ImageList | None) -> KnnMonitor | None:
    """Set up the votes that a config asks for; None where it asks for none.

    Args:
        config: its `knn_dir` or, without one, the training set itself has the labels.
        images: the training set.
        val: its labelled part to vote on, if it has one.

    Raises:
        UserError: the folder is missing, has no val/, or val/ has other classes than train/.
    """
    if not config.knn_every:
        return None
    where = config.knn_dir or config.data
    if config.knn_dir:
        images, val = open_set(config.knn_dir)
        if val is None:
            raise UserError(
                f"kNN folder {where}: has no val/; want {where}/val/CLASS/IMAGE.jpg with the "
                "classes of train/"
            )
    if val is None:
        distributed.say(f"no kNN votes: {where} has no val/; name a labelled folder: --knn-dir DIR")
        return None
    if images.classes != val.classes:
        raise UserError(f"kNN folder {where}: {_difference(images.classes, val.classes)}")
    bf16 = config.precision == "bf16"
    knn = KnnMonitor(images, val, config.image_size, bf16=bf16, workers=config.workers)
    distributed.say(
        f"kNN every {config.knn_every} epochs: {len(images)} images of {where} vote on "
        f"{len(val)}, k {knn.k}, tau {KNN_TAU}, chance {100 / len(images.classes):.3g}%"
    )
    return knn


def _difference(train: Sequence[str], val: Sequence[str]) -> str:
    """Say in what two lists of classes differ."""
    parts = [f"train/ has {len(train)} classes, val/ {len(val)}"]
    for one, other, name in ((train, val, "train/"), (val, train, "val/")):
        only = sorted(set(one) - set(other))
        if only:
            more = ", ..." if len(only) > SHOWN else ""
            parts.append(f"only {name} has {', '.join(only[:SHOWN])}{more}")
    return "; ".join([*parts, "want the same class folders in both"])
