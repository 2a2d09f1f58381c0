"""End-to-end fine-tuning: backbone and classifier trained together (MoCo, Sec. 4.2 and appendix).

Any number of processes take the same steps, up to rounding: gradients and the statistics of batch
norm are those of the whole batch, whatever each one's share of it.

Legend: B: images of a batch; b: this process's share of them; W: processes; S: side of an image,
px; C: classes.
"""

import copy
import hashlib
import math
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from convert.backbone import Backbone
from convert.errors import Stopped, StopRequest, UserError
from convert.facts import EXTRA_KEY
from convert.files import write_torch
from convert.progress import Progress
from pretrain import distributed
from pretrain.norm import synchronise_norms
from pretrain.views import epoch_order, generator
from pretrain.workers import watched
from transfer.classification.features import (
    IMAGES_AT_ONCE,
    Broken,
    Item,
    Views,
    in_batches,
    reading_processes,
)
from transfer.classification.few_labels import labelled
from transfer.classification.heads import INIT_STD, TRAIN_VIEW
from transfer.classification.probe import Probe
from transfer.classification.request import (
    ProbeConfig,
    Request,
    refuse_other_run,
    require_at_least,
    require_one_of,
)

FILE_NAME = "checkpoint.pth.tar"
SECONDS_BETWEEN = 120.0  # between two writings of the checkpoint
LR_DECAY = 0.1
STEP, COSINE = "step", "cos"


@dataclass(frozen=True)
class FinetuneConfig(ProbeConfig):
    """The keys of a fine-tuning recipe; the defaults are the paper's for ImageNet.

    Attributes:
        labels: empty: all training images; `1%`: that share of each class, drawn from the seed; or
            a file that lists images, as SimCLR's.
        bn: `tuned`: batch norm learns and keeps statistics of its own, those of whole batches over
            all processes; `frozen`: it stays as the checkpoint has it, weights and statistics.
        batch_size: of SGD, over all processes. A last batch of one image is left out: it has no
            variance.
        epochs: length.
        lr: initial learning rate. head_lr: the classifier's own; 0: the same.
        decay: `step`: to a tenth at each epoch of `schedule`; `cos`: half a cosine, step by step.
        momentum, weight_decay: of SGD.
        print_freq: steps between two progress notes.
    """

    labels: str = ""
    bn: str = "tuned"
    batch_size: int = 256
    epochs: int = 100
    lr: float = 0.03
    head_lr: float = 0.0
    decay: str = STEP
    schedule: tuple[int, ...] = (70, 90)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    print_freq: int = 10

    def __post_init__(self) -> None:
        """Refuse values that no training can have."""
        super().__post_init__()
        require_one_of("bn", self.bn, ("tuned", "frozen"))
        require_one_of("decay", self.decay, (STEP, COSINE))
        for key in ("epochs", "print_freq"):
            require_at_least(key, getattr(self, key), 1)
        require_at_least("batch_size", self.batch_size, 2)
        for key in ("lr", "head_lr", "momentum", "weight_decay"):
            require_at_least(key, getattr(self, key), 0)
        if self.stage != "res5":
            raise UserError(f"stage is {self.stage}: fine-tuning trains the whole backbone")

    def factor(self, progress: float) -> float:
        """Return what learning rates are multiplied by, `progress` epochs into the run."""
        if self.decay == COSINE:
            return 0.5 * (1 + math.cos(math.pi * progress / self.epochs))
        return float(LR_DECAY ** sum(progress >= step for step in self.schedule))


def evaluate(config: FinetuneConfig, request: Request) -> dict[str, Any]:
    """Fine-tune a checkpoint and write `results.json`.

    Each seed draws its own classifier, order, views and, where asked for, share of the labels.
    Nothing is chosen by the test set: it is judged once, after the last epoch.

    Raises:
        UserError: bad input, a diverging loss, or an output folder in use.
        Stopped: a signal came; the checkpoint is written.
    """
    if config.precision != "fp32":
        raise UserError(f"precision is '{config.precision}', fine-tuning runs in fp32")
    if config.batch_size < distributed.size():
        raise UserError(
            f"batch_size is {config.batch_size} for {distributed.size()} processes, want an image "
            "for each"
        )
    probe = Probe("finetune", config, request, _protocol)
    places = {s: labelled(probe.sets.train, config.labels, s) for s in config.all_seeds}
    done = probe.finished()
    if done is not None:
        return done
    per_seed = [_one_seed(probe, config, seed, places[seed]) for seed in config.all_seeds]
    return probe.write(per_seed, request.output_dir)


def _one_seed(
    probe: Probe, config: FinetuneConfig, seed: int, places: tuple[int, ...]
) -> dict[str, float]:
    folder = probe.request.output_dir / ("" if config.seeds == 1 else f"seed_{seed}")
    backbone = probe.network(seed).backbone
    tuning = Tuning(config, backbone, probe.num_classes, seed, len(places), probe.device)
    identity = probe.identity(seed) | {"places": _digest(places)}
    file = folder / FILE_NAME
    if file.exists():
        if probe.request.resume is None:
            raise UserError(
                f"{file}: a run that was not finished; go on with --resume, or choose another "
                "--output-dir"
            )
        tuning.restore(file, identity)
        probe.request.say(f"resumed {file} at step {tuning.step} of {tuning.steps}")
    if distributed.agree(tuning.step) != tuning.step:
        raise UserError(
            f"{file}: another process found one that is further; want an --output-dir that all "
            "processes share"
        )
    pixels = backbone.facts.pixels
    views = Views(probe.sets.train, config, pixels, TRAIN_VIEW, seed)
    workers = reading_processes(probe.request.workers, probe.device)
    total = config.epochs * len(places)
    done = min(tuning.step * config.batch_size, total)
    shown = Progress(total, "finetune", done=done, quiet=probe.request.quiet)
    with watched(workers), shown, StopRequest() as stop:
        tuning.train(views, places, workers, file, identity, stop, shown)
    return tuning.judge(Views(probe.sets.val, config, pixels), workers)


class Tuning:
    """A network in training, and where it is.

    Args:
        config: the recipe.
        backbone: where it starts.
        num_classes: C.
        seed: of the classifier's first weights, N(0, .01), and of the order.
        images: how many are learnt from.
        device: where it runs.

    Attributes:
        network: (b, 3, S, S) -> (b, C). step, steps: done, and of the whole run.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        backbone: Backbone,
        num_classes: int,
        seed: int,
        images: int,
        device: torch.device,
    ) -> None:
        self.config, self.seed, self.device = config, seed, device
        self.arch, self.images = backbone.facts.arch, images
        network: Any = backbone.build()
        network.fc = nn.Linear(_width(backbone), num_classes)
        nn.init.normal_(network.fc.weight, 0.0, INIT_STD, generator=generator(seed, "fc"))
        nn.init.zeros_(network.fc.bias)
        network.requires_grad_(True)
        self.norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        if config.bn == "frozen":
            for norm in self.norms:
                norm.requires_grad_(False)
        elif distributed.size() > 1:
            network = synchronise_norms(network, device)
        self.network: nn.Module = network.to(device, memory_format=torch.channels_last)
        head = list(network.fc.parameters())
        own = {id(p) for p in head}
        body = [p for p in network.parameters() if p.requires_grad and id(p) not in own]
        self.rates = (config.lr, config.head_lr or config.lr)
        self.optimizer = torch.optim.SGD(
            [{"params": body}, {"params": head}],
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.averages = distributed.Averages([*body, *head], [])
        spare = images % config.batch_size == 1
        self.steps_per_epoch = math.ceil(images / config.batch_size) - spare
        if not self.steps_per_epoch:
            raise UserError("finetune: one training image alone has no variance; want two or more")
        self.step, self.steps = 0, config.epochs * self.steps_per_epoch
        self.history: list[dict[str, float]] = []

    def train(
        self,
        views: Views,
        places: tuple[int, ...],
        workers: int,
        file: Path,
        identity: dict[str, Any],
        stop: StopRequest,
        shown: Progress,
    ) -> None:
        """Take the steps that are left.

        Args:
            views: the training images, new views of them in each epoch.
            places: which of them are learnt from.
            workers: processes that read images.
            file: the checkpoint, written now and then, at the end, and when a signal came.
            identity: what makes a run the same run.
            stop: says whether a signal came.
            shown: counts images.

        Raises:
            Stopped: a signal came. UserError: the loss is no longer a number.
        """
        self._train_mode()
        written, total, count = time.monotonic(), 0.0, 0
        for images, labels in self._batches(views, places, workers):
            size = self._batch_size()
            loss = self._take_step(images, labels, size)
            self.step += 1
            total, count = total + loss * size, count + size
            noted = self.step % self.config.print_freq == 0
            shown.add(size, f"loss {loss:.4g}" if noted else "")
            if self.step % self.steps_per_epoch == 0:
                self.history.append(
                    {"epoch": self.step // self.steps_per_epoch, "loss": total / count}
                )
                total, count = 0.0, 0
            over = time.monotonic() - written > SECONDS_BETWEEN
            stopping = distributed.agree(stop.signum or 0)
            if over or stopping or self.step == self.steps:
                self.save(file, identity)
                written = time.monotonic()
            if stopping and self.step < self.steps:
                raise Stopped(stopping)

    def _batches(
        self, views: Views, places: tuple[int, ...], workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of each batch: images (b, 3, S, S) and classes (b,)."""
        size, per_epoch = self.config.batch_size, self.steps_per_epoch
        nothing = torch.zeros(0, 3, views.image_size, views.image_size), torch.zeros(0).long()
        for epoch in range(self.step // per_epoch, self.config.epochs):
            order = epoch_order(len(places), self.seed, epoch)[: per_epoch * size].tolist()
            first = self.step - epoch * per_epoch  # of a run that is gone on with
            items = [(epoch, places[index]) for index in order[first * size :]]
            shares = [_share(batch) for batch in in_batches(items, size)]
            read = views.read([own for own in shares if own], self.device, workers)
            for own in shares:
                batch = next(read) if own else nothing
                if isinstance(batch, Broken):
                    raise batch.error()
                yield batch

    def _batch_size(self) -> int:
        """Return B of the step that comes: the last batch of an epoch may be smaller."""
        size = self.config.batch_size
        return min(size, self.images - self.step % self.steps_per_epoch * size)

    def _take_step(self, images: Tensor, labels: Tensor, batch_size: int) -> float:
        """Take a step on this process's share of a batch; return the loss of all of it."""
        factor = self.config.factor(self.step / self.steps_per_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        moved = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        total = cross_entropy(self.network(moved), labels.to(self.device), reduction="sum")
        value = distributed.add_up(total.detach()).item() / batch_size
        if not math.isfinite(value):
            raise UserError(
                f"finetune: the loss is {value} at step {self.step + 1} (learning rate "
                f"{self.config.lr * factor:.3g}); lower --lr"
            )
        self.averages.clear()
        # The processes' gradients are averaged: W times each one's share makes their sum.
        (total * distributed.size() / batch_size).backward()
        self.averages.average()
        self.optimizer.step()
        return value

    def _train_mode(self) -> None:
        self.network.train()
        if self.config.bn == "frozen":
            for norm in self.norms:
                norm.eval()

    @torch.no_grad()
    def judge(self, views: Views, workers: int) -> dict[str, float]:
        """Return top-1 and top-5 (with fewer than five classes, top-all) of test views, percent.

        Each image is seen once, by one process of all.
        """
        self.network.eval()
        right1 = right5 = 0
        count = len(views.images)
        items = [(0, index) for index in range(distributed.rank(), count, distributed.size())]
        at_once = IMAGES_AT_ONCE[self.device.type]
        for images, labels in views.batches(items, at_once, self.device, workers):
            moved = images.to(self.device, memory_format=torch.channels_last)
            logits = self.network(moved)
            if not logits.isfinite().all():
                raise UserError(
                    f"finetune: after step {self.step} the network answers with no numbers "
                    f"(learning rate {self.config.lr:.3g}); lower --lr"
                )
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu() == labels[:, None]
            right1 += int(hits[:, 0].sum())
            right5 += int(hits.any(dim=1).sum())
        right1, right5 = distributed.add_up(torch.tensor([right1, right5])).tolist()
        return {"finetune/top1": 100 * right1 / count, "finetune/top5": 100 * right5 / count}

    def save(self, file: Path, identity: dict[str, Any]) -> None:
        """Write the checkpoint: the reference's keys, and ours under one extra key."""
        if distributed.rank() > 0:
            return
        ours = {"step": self.step, "history": self.history, "identity": identity}
        state = {k: v.detach().cpu() for k, v in self.network.state_dict().items()}
        content = {
            "epoch": self.step // self.steps_per_epoch,
            "arch": self.arch,
            "state_dict": state,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            EXTRA_KEY: ours,
        }
        write_torch(file, content)

    def restore(self, file: Path, identity: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same run.

        Raises:
            UserError: it cannot be read, or belongs to another run.
        """
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            ours = content[EXTRA_KEY]
            refuse_other_run(file, ours["identity"], identity)
            self.network.load_state_dict(content["state_dict"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.step, self.history = int(ours["step"]), list(ours["history"])
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: is no checkpoint of this run; remove it") from error
        except pickle.UnpicklingError as error:
            raise UserError(f"{file}: cannot be read; it is cut short; remove it") from error


def _share(batch: Sequence[Item]) -> Sequence[Item]:
    """Return this process's part of a batch; of a small one it may be empty."""
    rank, size = distributed.rank(), distributed.size()
    return batch[rank * len(batch) // size : (rank + 1) * len(batch) // size]


def _width(backbone: Backbone) -> int:
    """Return the length of the backbone's pooled feature."""
    return int(backbone.weights["layer4.0.downsample.0.weight"].shape[0])


def _digest(places: tuple[int, ...]) -> str:
    return hashlib.sha256(repr(places).encode()).hexdigest()[:16]


def _protocol(config: FinetuneConfig) -> dict[str, Any]:
    share = config.labels if config.labels.endswith("%") or not config.labels else "listed"
    return {
        "task": "finetune",
        "labels": share or "all",
        "bn": config.bn,
        "train_view": f"random crop of 8 to 100% to {config.image_size}, flip",
        "val_view": f"resize {config.resize}, centre crop {config.image_size}",
        "precision": "fp32",
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "head_lr": config.head_lr or config.lr,
        "decay": config.decay,
        "schedule": list(config.schedule) if config.decay == STEP else [],
        "lr_decay": LR_DECAY,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "init": f"classifier N(0, {INIT_STD}), bias 0",
        "selection": "last epoch",
    }
