"""A linear classifier on frozen features: its training, its score (MoCo, Sec. 4.1).

Legend: N: training images; B: of a batch; D: width of a feature; C: classes.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from convert.errors import UserError
from convert.progress import Progress
from pretrain.views import Augmentation, epoch_order, generator
from transfer.classification.features import Features, FrozenNetwork, Views
from transfer.classification.request import ProbeConfig, require_at_least, require_one_of

LR_DECAY = 0.1  # at each step of the schedule
INIT_STD = 0.01  # of the classifier's weights; its bias starts at 0
SCORED_AT_ONCE = 4096
# torchvision's RandomResizedCrop of 8 to 100% of the area, and a flip.
TRAIN_VIEW = Augmentation(crop_scale=(0.08, 1.0), jitter_p=0.0, gray_p=0.0, flip_p=0.5)

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # epoch -> features (B, D), labels (B,)


@dataclass(frozen=True)
class LinearConfig(ProbeConfig):
    """The keys of a linear recipe; the defaults are the reference's protocol.

    Attributes:
        features: `augmented`: of a new random crop and flip of each image in each epoch;
            `cached`: of each image's test view, computed once, so that an epoch takes milliseconds.
        standardize: shift and scale each feature by its mean and standard deviation over the
            training images' test views, so that one learning rate suits backbones of any scale.
        batch_size: of SGD.
        epochs, start_epoch: length, and the first epoch (from 0) of a run without `--resume`.
        lr: initial learning rate. schedule: epochs at which it falls to a tenth.
        momentum, weight_decay: of SGD.
        print_freq: steps between two progress notes.
    """

    features: str = "augmented"
    standardize: bool = False
    batch_size: int = 256
    epochs: int = 100
    start_epoch: int = 0
    lr: float = 30.0
    schedule: tuple[int, ...] = (60, 80)
    momentum: float = 0.9
    weight_decay: float = 0.0
    print_freq: int = 10

    def __post_init__(self) -> None:
        """Refuse values that no training can have."""
        super().__post_init__()
        require_one_of("features", self.features, ("augmented", "cached"))
        for key in ("batch_size", "epochs", "print_freq"):
            require_at_least(key, getattr(self, key), 1)
        for key in ("start_epoch", "lr", "momentum", "weight_decay"):
            require_at_least(key, getattr(self, key), 0)

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        return self.lr * LR_DECAY ** sum(epoch >= step for step in self.schedule)


@dataclass
class Head:
    """A linear classifier in training.

    Attributes:
        fc: (B, D) -> (B, C). optimizer: SGD on its weight and bias, nothing else.
        epoch: how many are done. best_acc1: top-1 of the best epoch, which the reference's file
            layout has a place for; nothing is chosen by it. history: one entry an epoch.
    """

    fc: nn.Linear
    optimizer: torch.optim.SGD
    epoch: int = 0
    best_acc1: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def untrained(
        cls, config: LinearConfig, width: int, num_classes: int, seed: int, device: torch.device
    ) -> "Head":
        """Make a classifier with weights from N(0, .01), drawn from the seed, and bias 0."""
        fc = nn.Linear(width, num_classes)
        nn.init.normal_(fc.weight, 0.0, INIT_STD, generator=generator(seed, "fc"))
        nn.init.zeros_(fc.bias)
        fc.to(device)
        optimizer = torch.optim.SGD(
            fc.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
        return cls(fc, optimizer, epoch=config.start_epoch)

    def snapshot(self) -> dict[str, Any]:
        """Copy everything that going on needs."""
        return {
            "epoch": self.epoch,
            "best_acc1": self.best_acc1,
            "fc": {k: v.detach().cpu().clone() for k, v in self.fc.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "history": list(self.history),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a snapshot; learning rate, momentum and decay stay those of the config.

        Raises:
            UserError: it is of a classifier of another shape.
        """
        found, wanted = (
            [tuple(state[k].shape) for k in ("weight", "bias")]
            for state in (saved["fc"], self.fc.state_dict())
        )
        if found != wanted:
            raise UserError(f"--resume: found a classifier of shape {found}, want {wanted}")
        self.fc.load_state_dict(saved["fc"])
        groups = self.optimizer.state_dict()["param_groups"]
        state = saved["optimizer"]["state"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.epoch, self.best_acc1 = saved["epoch"], saved["best_acc1"]
        self.history = list(saved["history"])


@dataclass(frozen=True)
class Standardizer:
    """Shifts and scales features (B, D).

    Attributes:
        mean, std: (D,), of the training features.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Standardizer":
        """Learn mean and standard deviation from (N, D) training features."""
        std = values.std(dim=0, correction=0)
        # A feature that never changes tells nothing here; dividing by its 0 would break the others.
        return cls(values.mean(dim=0), torch.where(std > 1e-6 * std.max(), std, std.max()))

    def __call__(self, values: Tensor) -> Tensor:
        """Return (B, D) values, shifted and scaled."""
        return (values - self.mean.to(values.device)) / self.std.to(values.device)

    def fold(self, fc: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the classifier that does the same on features as the backbone gives them."""
        weight = fc["weight"] / self.std
        return {"weight": weight, "bias": fc["bias"] - weight @ self.mean}


def cached_batches(features: Features, batch_size: int, seed: int) -> Batches:
    """Serve features that were computed once, each epoch in an order of its own."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for places in epoch_order(len(features.labels), seed, epoch).split(batch_size):
            part = features.take(places)
            yield part.values, part.labels

    return batches


def augmented_batches(
    network: FrozenNetwork, views: Views, batch_size: int, workers: int
) -> Batches:
    """Serve features of newly drawn views; order and draws depend on seed and epoch alone."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(len(views.images), views.seed, epoch).tolist()
        items = [(epoch, index) for index in order]
        for images, labels in views.batches(items, batch_size, network.device, workers):
            yield network(images), labels

    return batches


def standardized(batches: Batches, standardizer: Standardizer) -> Batches:
    """Serve the same batches, their features shifted and scaled."""
    return lambda epoch: ((standardizer(values), labels) for values, labels in batches(epoch))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one CPU thread, for steps too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_head(
    head: Head,
    batches: Batches,
    val: Features,
    config: LinearConfig,
    progress: Progress,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train a classifier to the config's last epoch, scoring it after each one.

    Args:
        head: goes on from the epochs that it has.
        batches: training features.
        val: test features.
        config: length and learning rate.
        progress: counts images.
        after_epoch: called when an epoch is whole.

    Raises:
        UserError: the loss is no longer a number.
    """
    for epoch in range(head.epoch, config.epochs):
        loss = _train_epoch(head, batches(epoch), epoch, config, progress)
        top1, top5 = score(head.fc, val)
        head.epoch, head.best_acc1 = epoch + 1, max(head.best_acc1, top1)
        entry = {"loss": loss, "lr": config.lr_at(epoch), "val_top1": top1, "val_top5": top5}
        head.history.append({"epoch": epoch + 1} | entry)
        after_epoch()


def _train_epoch(
    head: Head,
    batches: Iterator[tuple[Tensor, Tensor]],
    epoch: int,
    config: LinearConfig,
    progress: Progress,
) -> float:
    """Return the mean loss over the epoch's images."""
    device = head.fc.weight.device
    for group in head.optimizer.param_groups:
        group["lr"] = config.lr_at(epoch)
    total, count, note = 0.0, 0, ""
    for step, (values, labels) in enumerate(batches):
        loss = cross_entropy(head.fc(values.to(device)), labels.to(device))
        if not math.isfinite(loss.item()):
            raise UserError(
                f"linear: the loss is {loss.item()} in epoch {epoch + 1}, step {step + 1}; lr "
                f"{config.lr:g} is too high for features of mean length "
                f"{values.norm(dim=1).mean():.3g}: try a tenth of it, or standardize true"
            )
        head.optimizer.zero_grad()
        loss.backward()
        head.optimizer.step()
        total, count = total + loss.item() * len(labels), count + len(labels)
        if step % config.print_freq == 0:
            note = f"epoch {epoch + 1}, loss {loss.item():.4g}"
        progress.add(len(labels), note)
    return total / count


@torch.no_grad()
def score(fc: nn.Linear, features: Features) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy in percent; with fewer than five classes, top-all."""
    device = fc.weight.device
    right1 = right5 = 0
    parts = zip(
        features.values.split(SCORED_AT_ONCE), features.labels.split(SCORED_AT_ONCE), strict=True
    )
    for values, labels in parts:
        ranked = fc(values.to(device)).topk(min(5, fc.out_features), dim=1).indices.cpu()
        hits = ranked == labels[:, None]
        right1 += int(hits[:, 0].sum())
        right5 += int(hits.any(dim=1).sum())
    return 100 * right1 / len(features.labels), 100 * right5 / len(features.labels)
