"""A linear classifier on frozen features: its training, its score (MoCo, Sec. 4.1).

Legend: N: training images; B: of a batch; D: width of a feature; C: classes.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from convert.errors import UserError
from convert.progress import Progress
from pretrain.views import Augmentation, epoch_order, generator
from transfer.classification.features import (
    Features,
    FrozenNetwork,
    Views,
    in_batches,
    look_together,
)
from transfer.classification.request import (
    ProbeConfig,
    require_at_least,
    require_one_of,
    require_source,
)

LR_DECAY = 0.1  # at each step of the schedule
INIT_STD = 0.01  # of the classifier's weights; its bias starts at 0
SCORED_AT_ONCE = 4096
# torchvision's RandomResizedCrop of 8 to 100% of the area, and a flip.
TRAIN_VIEW = Augmentation(crop_scale=(0.08, 1.0), jitter_p=0.0, gray_p=0.0, flip_p=0.5)


class Batch(NamedTuple):
    """Training images of a step.

    Attributes:
        values: (B, D) features of the classifier in training. labels: (B,) classes.
        places: (B,) which images of the training set these are, on the CPU.
        beside: source -> features of the grid's classifiers, from the same pass.
    """

    values: Tensor
    labels: Tensor
    places: Tensor
    beside: Mapping[str, Tensor] = {}


Batches = Callable[[int], Iterator[Batch]]  # epoch -> its batches
Beside = Callable[[Batch, float], None]  # batch, lr / initial lr -> others learn from it too


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
        max_steps: stop after so many steps, whatever the epochs; 0: after the last epoch.
        grid: train a grid of classifiers on the same forward pass, choose one on a held-out share
            of the training images, and report it beside the fixed protocol.
        grid_lr, grid_weight_decay: the grid's. grid_features: where its features are taken, words
            as of `stage`.
        grid_held_out: share of the training images that the choice is made on, where the set's
            makers name no validation part.
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
    max_steps: int = 0
    grid: bool = False
    grid_lr: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    grid_weight_decay: tuple[float, ...] = (0.0, 1e-5)
    grid_features: tuple[str, ...] = ("res3", "res4", "res5")
    grid_held_out: float = 0.1

    def __post_init__(self) -> None:
        """Refuse values that no training can have."""
        super().__post_init__()
        require_one_of("features", self.features, ("augmented", "cached"))
        for key in ("batch_size", "epochs", "print_freq"):
            require_at_least(key, getattr(self, key), 1)
        for key in ("start_epoch", "lr", "momentum", "weight_decay"):
            require_at_least(key, getattr(self, key), 0)
        require_at_least("max_steps", self.max_steps, 0)
        for key in ("grid_lr", "grid_weight_decay", "grid_features"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{key} is {list(values)}, want one value or more, each once")
        require_at_least("grid_weight_decay", min(self.grid_weight_decay), 0)
        unfit = [lr for lr in self.grid_lr if not 0 < lr < math.inf]
        if unfit:
            raise UserError(f"grid_lr holds {unfit[0]}, want numbers above 0")
        if self.start_epoch >= self.epochs:
            raise UserError(
                f"start_epoch is {self.start_epoch} of {self.epochs} epochs: nothing is left to "
                "train"
            )
        for source in self.grid_features:
            require_source("grid_features", source)
        if not 0 < self.grid_held_out < 1:
            raise UserError(f"grid_held_out is {self.grid_held_out}, want a share between 0 and 1")

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        return self.lr * self.lr_factor(epoch)

    def lr_factor(self, epoch: int) -> float:
        """Return what an epoch multiplies the initial rate by."""
        return LR_DECAY ** sum(epoch >= step for step in self.schedule)


@dataclass
class Head:
    """A linear classifier in training.

    Attributes:
        fc: (B, D) -> (B, C). optimizer: SGD on its weight and bias, nothing else.
        epoch: how many are done. steps: the same in steps. best_acc1: top-1 of the best epoch,
            which the reference's file layout has a place for; nothing is chosen by it.
        history: one entry an epoch.
    """

    fc: nn.Linear
    optimizer: torch.optim.SGD
    epoch: int = 0
    best_acc1: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0

    @classmethod
    def untrained(
        cls, config: LinearConfig, width: int, num_classes: int, seed: int, device: torch.device
    ) -> "Head":
        """Make a classifier with weights from N(0, .01), drawn from the seed, and bias 0."""
        fc = nn.Linear(width, num_classes)
        fc.weight.data.copy_(initial_weight(width, num_classes, seed))
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
            "steps": self.steps,
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
        self.history, self.steps = list(saved["history"]), saved.get("steps", 0)


def initial_weight(width: int, num_classes: int, seed: int) -> Tensor:
    """Draw a classifier's initial weights (C, D) from N(0, .01) and the seed alone."""
    draw = generator(seed, "fc")
    return nn.init.normal_(torch.empty(num_classes, width), 0.0, INIT_STD, generator=draw)


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

    def features(self, features: Features) -> Features:
        """Return features of a set, shifted and scaled."""
        return Features(self(features.values), features.labels)

    def fold(self, fc: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the classifier that does the same on features as the backbone gives them."""
        weight = fc["weight"] / self.std
        return {"weight": weight, "bias": fc["bias"] - weight @ self.mean}


def cached_batches(
    features: Features, batch_size: int, seed: int, beside: Mapping[str, Features] | None = None
) -> Batches:
    """Serve features that were computed once, each epoch in an order of its own."""

    def batches(epoch: int) -> Iterator[Batch]:
        for places in epoch_order(len(features.labels), seed, epoch).split(batch_size):
            part = features.take(places)
            others = {source: found.values[places] for source, found in (beside or {}).items()}
            yield Batch(part.values, part.labels, places, others)

    return batches


def augmented_batches(
    network: FrozenNetwork, views: Views, batch_size: int, workers: int
) -> Batches:
    """Serve features of newly drawn views; order and draws depend on seed and epoch alone."""

    def batches(epoch: int) -> Iterator[Batch]:
        order = epoch_order(len(views.images), views.seed, epoch)
        items = in_batches([(epoch, index) for index in order.tolist()], batch_size)
        seen = look_together(network, views, items, workers)
        for places, (found, labels) in zip(order.split(batch_size), seen, strict=True):
            yield Batch(found[network.stage], labels, places, found)

    return batches


def standardized(
    batches: Batches,
    standardizer: Standardizer,
    beside: Mapping[str, Standardizer] | None = None,
) -> Batches:
    """Serve the same batches, their features shifted and scaled."""

    def scaled(batch: Batch) -> Batch:
        others = {source: scale(batch.beside[source]) for source, scale in (beside or {}).items()}
        return batch._replace(values=standardizer(batch.values), beside=others)

    return lambda epoch: map(scaled, batches(epoch))


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
    beside: Beside | None = None,
) -> None:
    """Train a classifier to the config's last epoch or step, scoring it after each epoch.

    Args:
        head: goes on from the epochs that it has.
        batches: training features.
        val: test features.
        config: length and learning rate.
        progress: counts images.
        after_epoch: called when an epoch is whole.
        beside: called with every batch, for others that learn from it.

    Raises:
        UserError: the loss is no longer a number.
    """
    for epoch in range(head.epoch, config.epochs):
        if config.max_steps and head.steps >= config.max_steps:
            return
        loss = train_epoch(head, batches(epoch), epoch, config, progress, beside)
        top1, top5 = score(head.fc, val)
        head.epoch, head.best_acc1 = epoch + 1, max(head.best_acc1, top1)
        entry = {"loss": loss, "lr": config.lr_at(epoch), "val_top1": top1, "val_top5": top5}
        head.history.append({"epoch": epoch + 1} | entry)
        after_epoch()


def train_epoch(
    head: Head,
    batches: Iterator[Batch],
    epoch: int,
    config: LinearConfig,
    progress: Progress,
    beside: Beside | None,
) -> float:
    """Return the mean loss over the epoch's images."""
    device = head.fc.weight.device
    for group in head.optimizer.param_groups:
        group["lr"] = config.lr_at(epoch)
    total, count, note = 0.0, 0, ""
    for step, batch in enumerate(batches):
        values, labels = batch.values, batch.labels
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
        if beside is not None:
            beside(batch, config.lr_factor(epoch))
        head.steps += 1
        total, count = total + loss.item() * len(labels), count + len(labels)
        if step % config.print_freq == 0:
            note = f"epoch {epoch + 1}, loss {loss.item():.4g}"
        progress.add(len(labels), note)
        if head.steps == config.max_steps:
            break
    return total / count


@torch.no_grad()
def score(fc: nn.Linear, features: Features) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy in percent; with fewer than five classes, top-all.

    Raises:
        UserError: it answers with what is no number.
    """
    device = fc.weight.device
    right1 = right5 = 0
    parts = zip(
        features.values.split(SCORED_AT_ONCE), features.labels.split(SCORED_AT_ONCE), strict=True
    )
    for values, labels in parts:
        logits = fc(values.to(device))
        if not logits.isfinite().all():
            raise UserError("linear: the classifier answers with no numbers; lower lr")
        ranked = logits.topk(min(5, fc.out_features), dim=1).indices.cpu()
        hits = ranked == labels[:, None]
        right1 += int(hits[:, 0].sum())
        right5 += int(hits.any(dim=1).sum())
    return 100 * right1 / len(features.labels), 100 * right5 / len(features.labels)
