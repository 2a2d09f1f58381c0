"""The training loop: learning rate from progress, one step after another, everything logged."""

import math
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from convert.errors import Stopped, StopRequest, UserError
from convert.files import environment, output_folder, write_json
from convert.progress import Progress
from pretrain import checkpoint
from pretrain.config import PretrainConfig, as_dict
from pretrain.moco import MoCo, contrastive_loss
from pretrain.monitor import KnnMonitor, Log, mean_of_last_tenth, read_log, verdict
from pretrain.norm import choose_groups
from pretrain.sources import ImageList
from pretrain.views import AUGMENTATIONS, TwoViews, epoch_order, generator

RUN_NAME = "run.json"


def learning_rate(config: PretrainConfig, epoch: float) -> float:
    """Return the learning rate at a place in the run.

    Args:
        config: lr, schedule, milestones, epochs, warm-up.
        epoch: progress, in epochs; 2.5 is the middle of the third one. The papers' schedules hold
            a rate for a whole epoch.
    """
    whole = math.floor(epoch)
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    if config.schedule == "cos":  # arXiv:2003.04297, Table 1, column "cos"
        return config.lr * 0.5 * (1 + math.cos(math.pi * whole / config.epochs))
    return float(config.lr * 0.1 ** sum(whole >= milestone for milestone in config.milestones))


def check(config: PretrainConfig, images: int) -> PretrainConfig:
    """Return the config with every default that depends on the machine filled in.

    Raises:
        UserError: a value outside its range, or a queue too long for the set.
    """
    _check_ranges(config)
    _check_sizes(config, images)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: no CUDA device is at hand; want --device cpu")
    workers = config.workers
    if workers < 0:
        workers = min(32, max(1, (os.cpu_count() or 1) - 1))
    return replace(
        config,
        device=device,
        precision=config.precision or ("bf16" if _has_bf16(device) else "fp32"),
        workers=workers,
        bn_groups=choose_groups(config.batch_size, config.bn_groups, leak=config.leak),
    )


def _check_ranges(config: PretrainConfig) -> None:
    allowed = {
        "augmentation": tuple(AUGMENTATIONS),
        "schedule": ("step", "cos"),
        "device": ("", "cpu", "cuda"),
        "precision": ("", "fp32", "bf16"),
    }
    for key, choices in allowed.items():
        if getattr(config, key) not in choices:
            wanted = ", ".join(choice for choice in choices if choice)
            raise UserError(f"{key} is '{getattr(config, key)}', want one of {wanted}")
    ranges = {
        "m": 0 <= config.m <= 1,
        "tau": config.tau > 0,
        "K": config.K > 0,
        "dim": config.dim > 0,
        "batch_size": 0 < config.batch_size,
        "epochs": config.epochs > 0,
        "image_size": config.image_size >= 32,
        "lr": config.lr >= 0,
        "print_freq": config.print_freq > 0,
        "max_steps": config.max_steps >= 0,
        "residual_gamma": config.residual_gamma >= 0,
        "keep": config.keep >= 0,
        "crop_scale": len(config.crop_scale) == 2
        and 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1,
    }
    wrong = [f"{key} {getattr(config, key)}" for key, good in ranges.items() if not good]
    if wrong:
        raise UserError(f"out of range: {', '.join(wrong)}; m is in [0, 1], the others above 0")
    if not re.fullmatch(r"(\d*[1-9]\d*m?)?", config.checkpoint_every):
        raise UserError(
            f"checkpoint_every '{config.checkpoint_every}': want steps, as 500, or minutes, as 5m"
        )


def _check_sizes(config: PretrainConfig, images: int) -> None:
    if config.batch_size > images:
        raise UserError(
            f"batch of {config.batch_size}: the set has {images} images; lower --batch-size"
        )
    if config.K < config.batch_size:
        raise UserError(f"K {config.K}: is below the batch of {config.batch_size}; raise --moco-k")
    if config.K >= images and not config.allow_small_set:
        raise UserError(
            f"K {config.K}: the set has {images} images, so the queue would hold older keys of "
            "the positives as negatives; lower --moco-k, or --allow-small-set to do it anyway"
        )


def train(
    config: PretrainConfig,
    images: ImageList,
    folder: Path,
    *,
    resume: str = "",
    knn: KnnMonitor | None = None,
    quiet: bool = False,
) -> Path:
    """Train MoCo and return its last checkpoint.

    Args:
        config: checked by `check`.
        images: the training set.
        folder: where checkpoints, log and record go.
        resume: `auto`, a checkpoint, or nothing.
        knn: votes every `knn_every` epochs and at the end, where the set has labels.
        quiet: show no progress.

    Raises:
        UserError: the loss is not finite, or the run cannot be resumed.
        Stopped: a signal came; the checkpoint is written.
    """
    run = _Run(config, images, output_folder(folder), knn)
    path = checkpoint.find_resume(resume, folder) if resume else None
    if path is not None:
        run.step = checkpoint.resume(path, run.model, run.optimizer, config)
        if run.step >= run.steps:
            print(f"{folder}: this run is finished, {run.step} steps")
            return path
        print(f"resumed {path} at step {run.step} of {run.steps}", flush=True)
    with (
        StopRequest((signal.SIGINT, signal.SIGTERM)) as stop,
        Progress(
            run.steps * config.batch_size,
            "pretrain",
            done=run.step * config.batch_size,
            quiet=quiet,
        ) as shown,
    ):
        last = run.go(stop, shown, path)
    return run.finish(last)


class _Run:
    """One training run: the parts, and where it is."""

    def __init__(
        self, config: PretrainConfig, images: ImageList, folder: Path, knn: KnnMonitor | None
    ) -> None:
        self.config = config
        self.images = images
        self.folder = folder
        self.knn = knn
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)  # the encoders' initial weights; nothing else draws from it
        model = MoCo(
            config.arch,
            dim=config.dim,
            K=config.K,
            m=config.m,
            tau=config.tau,
            mlp=config.mlp,
            bn_groups=config.bn_groups,
            residual_gamma=config.residual_gamma,
            generator=generator(config.seed, "queue"),
        )
        self.model = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # The reference hands f_k's parameters over too: they have no gradient and stay untouched,
        # and other people's tools find the indices that they expect in the optimizer's state.
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.steps_per_epoch = len(images) // config.batch_size  # the short last batch is dropped
        self.steps = config.epochs * self.steps_per_epoch
        if config.max_steps:
            self.steps = min(self.steps, config.max_steps)
        self.step = 0
        self.seconds = 0.0

    def go(self, stop: StopRequest, shown: Progress, resumed: Path | None) -> Path:
        """Take the steps that are left; return the last checkpoint."""
        log = Log(self.folder, self.step)
        self.seconds = max(
            (line.get("seconds", 0.0) for line in read_log(self.folder)), default=0.0
        )
        saved, last_saved, since_line = resumed, time.monotonic(), time.monotonic()
        seen: list[Tensor] = []
        for views in self._batches():
            seen.append(self.take_step(*views))
            self.step += 1
            ends_epoch = self.step % self.steps_per_epoch == 0
            due = self._checkpoint_due(ends_epoch, last_saved) or stop.signum is not None
            if self.step % self.config.print_freq == 0 or due or ends_epoch:
                now = time.monotonic()
                self.seconds += now - since_line
                values = self._read(seen, now - since_line)
                log.add(**values)
                shown.add(len(seen) * self.config.batch_size, f"loss {values['loss']:.3f}")
                since_line, seen = now, []
            if ends_epoch and self._knn_due():
                log.add(step=self.step, epoch=self._epoch(), knn_top1=self._vote())
                since_line = time.monotonic()
            if due:
                saved, last_saved = self._save(ends_epoch), time.monotonic()
            if stop.signum is not None and self.step < self.steps:
                raise Stopped(stop.signum)
        assert saved is not None
        return saved

    def take_step(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        """Take one step.

        Returns:
            (3,) loss, share of queries that score their key above the queue, and above the keys of
            the other images in the batch.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step / self.steps_per_epoch)
        im_q, im_k = (x.to(self.device, memory_format=torch.channels_last) for x in (im_q, im_k))
        draw = generator(config.seed, "shuffle", self.step)
        shuffle = torch.randperm(len(im_q), generator=draw).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits, own = self.model(im_q, im_k, shuffle)
        loss = contrastive_loss(logits.float())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        top1 = (logits.argmax(dim=1) == 0).float().mean()
        return torch.stack([loss.detach(), top1, own.float().mean()])

    def finish(self, last: Path) -> Path:
        """Write the run's record and say what came out."""
        config, lines = self.config, read_log(self.folder)
        loss = mean_of_last_tenth(lines, "loss")
        batch_top1 = mean_of_last_tenth(lines, "batch_top1")
        write_json(
            self.folder / RUN_NAME,
            {
                "method": config.method,
                "arch": config.arch,
                "set": "embedded digits" if config.data == "embedded" else config.data,
                "images": len(self.images),
                "K": config.K,
                "m": config.m,
                "tau": config.tau,
                "steps": self.step,
                "chance_loss": math.log(config.K + 1),
                "loss_last_tenth": loss,
                "batch_top1_last_tenth": batch_top1,
                "batch_size": config.batch_size,
                "seconds": round(self.seconds, 1),
                "environment": environment(),
                "checkpoint": last.name,
                "config": as_dict(config),
            },
        )
        print(verdict(loss, config.K, batch_top1, config.batch_size))
        return last

    def _batches(self) -> Iterator[list[Tensor]]:
        views = TwoViews(
            self.images,
            replace(
                AUGMENTATIONS[self.config.augmentation],
                crop_scale=(self.config.crop_scale[0], self.config.crop_scale[1]),
            ),
            self.config.image_size,
            self.config.seed,
        )
        yield from DataLoader(
            views,
            batch_sampler=_Batches(self),
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_signals,
        )

    def _epoch(self) -> float:
        return round(self.step / self.steps_per_epoch, 4)

    def _read(self, seen: list[Tensor], seconds: float) -> dict[str, float]:
        """Fetch what the steps since the last line left on the device, and refuse a bad loss."""
        values = torch.stack(seen).cpu()
        bad = (~values[:, 0].isfinite()).nonzero()
        if len(bad):
            step = self.step - len(seen) + int(bad[0]) + 1
            raise UserError(
                f"loss is not finite at step {step} (learning rate "
                f"{learning_rate(self.config, (step - 1) / self.steps_per_epoch):.3g}); the "
                f"last good checkpoint in {self.folder} stays; lower --lr"
            )
        loss, top1, batch_top1 = values.mean(dim=0).tolist()
        return {
            "step": self.step,
            "steps": self.steps,
            "epoch": self._epoch(),
            "loss": loss,
            "top1": 100 * top1,
            "batch_top1": 100 * batch_top1,
            "lr": learning_rate(self.config, (self.step - 1) / self.steps_per_epoch),
            "images_per_s": len(seen) * self.config.batch_size / seconds,
            "seconds": self.seconds,
        }

    def _checkpoint_due(self, ends_epoch: bool, last_saved: float) -> bool:
        every = self.config.checkpoint_every
        if self.step == self.steps:
            return True
        if not every:
            return ends_epoch
        if every.endswith("m"):
            return time.monotonic() - last_saved >= 60 * float(every[:-1])
        return self.step % int(every) == 0

    def _save(self, ends_epoch: bool) -> Path:
        done = self.step // self.steps_per_epoch
        return checkpoint.save(
            self.folder,
            self.model,
            self.optimizer,
            self.config,
            step=self.step,
            epochs_done=done,
            epoch=done - 1 if ends_epoch else done,
        )

    def _knn_due(self) -> bool:
        if self.knn is None or not self.config.knn_every:
            return False
        epoch = self.step // self.steps_per_epoch
        return epoch % self.config.knn_every == 0 or self.step == self.steps

    def _vote(self) -> float:
        assert self.knn is not None
        return self.knn(self.model.encoder_q, self.device)


class _Batches:
    """Yields the (epoch, image) pairs of each step that is left, epoch after epoch."""

    def __init__(self, run: _Run) -> None:
        self.run = run

    def __len__(self) -> int:
        return self.run.steps - self.run.step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        run, size = self.run, self.run.config.batch_size
        for step in range(run.step, run.steps):
            epoch, place = divmod(step, run.steps_per_epoch)
            if place == 0 or step == run.step:
                order = epoch_order(len(run.images), run.config.seed, epoch).tolist()
            yield [(epoch, index) for index in order[place * size : (place + 1) * size]]


def _ignore_signals(worker: int) -> None:
    # A terminal's Ctrl-C reaches the workers too; the loop decides when they end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _has_bf16(device: str) -> bool:
    """Tell whether this hardware multiplies bfloat16 natively; elsewhere it would be slower."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
