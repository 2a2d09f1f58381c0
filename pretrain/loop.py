"""The training loop: one step after another, everything logged; stopped, it goes on exactly."""

import math
import random
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert.allocator import keep_freed_memory
from convert.backbone import load_backbone, weights_digest
from convert.errors import Stopped, StopRequest, UserError
from convert.facts import STRIDE_IN_1X1
from convert.files import environment, output_folder, write_json
from convert.names import is_backbone_name
from convert.pixels import IMAGENET_PIXELS
from convert.progress import Progress
from pretrain import checkpoint, distributed, leak
from pretrain.checks import groups_of_a_pass
from pretrain.config import PretrainConfig, as_dict
from pretrain.contrast import Batch, Contrast
from pretrain.dictionaries import find_method
from pretrain.held import batches as held_batches
from pretrain.held import hold
from pretrain.loader import DEVICE, Views, collate, on_device
from pretrain.monitor import KnnMonitor, Waiting, Watch, mean_of_last_tenth, read_log, verdict
from pretrain.norm import statistics_of
from pretrain.optimizer import build_optimizer
from pretrain.schedule import learning_rate, run_length
from pretrain.sources import ImageList
from pretrain.spread import spread
from pretrain.views import augmentation_of, epoch_order, generator
from pretrain.workers import load, watched

RUN_NAME = "run.json"


def train(
    config: PretrainConfig,
    images: ImageList,
    folder: Path,
    *,
    resume: Path | None = None,
    knn: KnnMonitor | None = None,
    quiet: bool = False,
) -> Path:
    """Train and return the last checkpoint. Every process of a group calls it.

    Args:
        config: checked by `check`.
        images: the training set.
        folder: where checkpoints, log and record go; one process writes.
        resume: a checkpoint of this run to go on from.
        knn: votes before the first step, every `knn_every` epochs and at the end.
        quiet: show no progress.

    Raises:
        UserError: the loss is not finite, the run cannot be resumed, a loading worker was killed.
        Stopped: a signal came; the checkpoint is written.
    """
    keep_freed_memory()
    try:
        silent = quiet or distributed.rank() > 0
        run = Run(config, images, output_folder(folder), knn, quiet=silent)
    except (RuntimeError, MemoryError) as error:
        _refuse_if_out_of_memory(error)
        raise
    if resume is not None:
        run.step = checkpoint.resume(resume, run.model, run.optimizer, config)
        if run.step >= run.steps:
            distributed.say(f"{folder}: this run is finished, {run.step} steps")
            if distributed.rank() == 0 and not (folder / RUN_NAME).exists():
                run.seconds = run.seconds_before()
                run.finish(resume)  # it was ended between its last checkpoint and its record
            return resume
        distributed.say(f"resumed {resume} at step {run.step} of {run.steps}")
    elif config.init_from:
        distributed.say(init_from(run.model, config.init_from))
    _check_start(run)
    images_done, total = run.step * config.batch_size, run.steps * config.batch_size
    shown = Progress(total, "pretrain", done=images_done, quiet=silent)
    try:
        with watched(config.workers), closing(run), StopRequest(distributed.STOPS) as stop, shown:
            last = run.go(stop, shown, resume)
    except BrokenPipeError:  # whoever reads our lines left
        raise
    except OSError as error:
        raise UserError(
            f"the system refused ({error.strerror or error}): see to {error.filename or folder}, "
            "then go on with --resume auto"
        ) from error
    except (RuntimeError, MemoryError) as error:
        _refuse_if_out_of_memory(error)
        raise
    if distributed.rank() == 0:
        run.finish(last)
    return last


def _check_start(run: "Run") -> None:
    """See that all processes begin at one step with the same weights.

    Raises:
        UserError: they do not; nothing later would make them equal.
    """
    if distributed.size() > 1:
        state = {name: value.cpu() for name, value in run.model.state_dict().items()}
        starts = {"weights": weights_digest(state), "step": run.step}
        differ = distributed.differing(starts)
        if differ:
            raise UserError(
                f"the processes of this run begin with different {' and '.join(differ)}: the file "
                "of --resume or --init-from must be the same on every machine"
            )


def init_from(model: Contrast, source: str) -> str:
    """Start every encoder from a checkpoint's backbone; heads, queue and bank stay as they are.

    Args:
        model: a new one.
        source: a checkpoint of any layout that convert/ knows.

    Returns:
        What was taken, for people to read.

    Raises:
        UserError: the file is missing, unreadable, or holds another network, or one that expects
            other pixels.
    """
    found, config = load_backbone(source), model.config
    facts = found.facts
    theirs = (facts.arch, facts.stem, facts.stride_in_1x1, facts.pixels)
    ours = (config.arch, config.stem, STRIDE_IN_1X1, IMAGENET_PIXELS)
    if theirs != ours:
        words = " and ".join(
            f"a {arch}, {stem} stem, stride in the {'1x1' if stride else '3x3'}, {pixels}"
            for arch, stem, stride, pixels in (theirs, ours)
        )
        raise UserError(
            f"--init-from {source}: the file's network and this run's differ: {words}; name a "
            "checkpoint of the same one, or change --arch or the key stem"
        )
    for encoder in model.encoders():
        own = {name for name in encoder.state_dict() if is_backbone_name(name)}
        assert own == found.weights.keys()
        encoder.load_state_dict(found.weights, strict=False)
    epoch = "" if facts.epoch is None else f", epoch {facts.epoch}"
    return f"initialised from {facts.name}: {facts.method}{epoch}, backbone only"


class Run:
    """One training run: the parts, and where it is.

    Attributes:
        model, optimizer: what is trained, and how.
        step, steps: steps done, and of the whole run.
    """

    def __init__(
        self,
        config: PretrainConfig,
        images: ImageList,
        folder: Path,
        knn: KnnMonitor | None,
        *,
        quiet: bool = True,
    ) -> None:
        self.config = config
        self.quiet = quiet
        self.images = images
        self.folder = folder
        self.knn = knn
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)  # the encoders' initial weights
        method = find_method(config.dictionary)
        self.model = method(config, images=len(images), groups=groups_of_a_pass(config))
        bf16 = config.precision == "bf16"
        self.model.settle(self.device, bf16=bf16, compiled=config.compile)
        self.optimizer = build_optimizer(self.model, config)
        self.averages: distributed.Averages | None = None
        if distributed.size() > 1:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.averages = distributed.Averages(trained, statistics_of(self.model.encoders()))
        self.steps_per_epoch = len(images) // config.batch_size  # the short last batch is dropped
        self.steps = run_length(config, self.steps_per_epoch)
        if config.max_steps:
            self.steps = min(self.steps, config.max_steps)
        self.step = config.start_epoch * self.steps_per_epoch
        self.order = Order(len(images), config.seed, config.batch_size)
        self.seconds = 0.0
        self.watch: Watch | None = None
        self.embedded: list[tuple[Tensor, Tensor]] = []  # of the last step, part by part

    def close(self) -> None:
        """Write what the log still holds."""
        if self.watch:
            self.watch.log.close()

    def go(self, stop: StopRequest, shown: Progress, resumed: Path | None) -> Path:
        """Take the steps that are left; return the last checkpoint."""
        log = self.watch = Watch(self.folder, self.step) if distributed.rank() == 0 else None
        self.seconds = self.seconds_before()
        if log and resumed is None:
            self._look(log)
        batches = Waiting(self.batches())
        saved, last_saved, since_line = resumed, time.monotonic(), time.monotonic()
        seen: list[Tensor] = []
        for batch in batches:
            views = on_device(batch, self.device, self.config.image_size)
            seen.append(self.take_step(views))
            self.step += 1
            ends_epoch = self.step % self.steps_per_epoch == 0
            signum, minutes_due = self._told(stop, last_saved)
            due = self._checkpoint_due(ends_epoch) or minutes_due or signum is not None
            if self.step % self.config.print_freq == 0 or due or ends_epoch:
                now = time.monotonic()
                self.seconds += now - since_line
                values = self._read(seen, now - since_line)  # refuses a bad loss before a save
                if log:
                    values["data_wait"] = 100 * batches.since_asked() / (now - since_line)
                    log.add(**values, **self._spread())
                shown.add(len(seen) * self.config.batch_size, f"loss {values['loss']:.3f}")
                since_line, seen = now, []
            if log and ends_epoch:
                self._look(log)
                since_line = time.monotonic()
            if due:
                saved, last_saved = self._save(ends_epoch), time.monotonic()
            if signum is not None and self.step < self.steps:
                raise Stopped(signum)
        assert saved is not None
        return saved

    def seconds_before(self) -> float:
        """Return how long the run had taken by its log's last line."""
        return max((line.get("seconds", 0.0) for line in read_log(self.folder)), default=0.0)

    def take_step(self, views: list[Tensor]) -> Tensor:
        """Take one step on this process's views, each (n, 3, H, W).

        Returns:
            (4,) mean loss over this process's images, share of queries that score their key above
            the negatives, and above the keys of the other images in the batch, norm of the
            gradient.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, self.steps_per_epoch)
        seed_generators(config.seed, self.step)
        batch = Batch(
            views=views,
            images=self.order.batch(self.step),
            seed=config.seed,
            step=self.step,
            parts=config.accumulate,
        )
        if self.averages:
            self.averages.clear()
        else:
            self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(3, device=self.device)
        self.embedded.clear()
        for scored in self.model.contrast(batch):
            scored.loss.backward()
            if scored.embeddings:
                self.embedded.append(scored.embeddings)
            total += torch.cat([scored.loss.detach().view(1), scored.values])
        if self.averages:
            self.averages.average()
        self.optimizer.step()
        return torch.cat([total, self._gradient_norm()])

    def finish(self, last: Path) -> None:
        """Write the run's record and say what came out."""
        config, lines, negatives = self.config, read_log(self.folder), self.model.negatives
        loss = mean_of_last_tenth(lines, "loss")
        batch_top1 = mean_of_last_tenth(lines, "batch_top1")
        write_json(
            self.folder / RUN_NAME,
            {
                "method": config.method,
                "arch": config.arch,
                "set": "embedded digits" if config.data == "embedded" else config.data,
                "images": len(self.images),
                "skipped": len(self.images.skipped),
                **({"K": config.K} if self.model.holds_keys else {}),
                "negatives": negatives,
                "m": config.m,
                "tau": config.tau,
                "steps": self.step,
                "chance_loss": math.log(negatives + 1),
                "loss_last_tenth": loss,
                "batch_top1_last_tenth": batch_top1,
                "batch_size": config.batch_size,
                "processes": distributed.size(),
                "seconds": round(self.seconds, 1),
                "environment": environment(),
                "checkpoint": last.name,
                "config": as_dict(config),
            },
        )
        print(verdict(loss, negatives, batch_top1, config.batch_size))
        if self.watch:
            for words in self.watch.judge.still(self.step, self._epoch()):
                print(words)

    def _views(self) -> Views:
        config = self.config
        augmentation, count = augmentation_of(config), self.model.views
        backend = config.views
        return Views(self.images, augmentation, config.image_size, config.seed, count, backend)

    def batches(self) -> Iterator[Any]:
        """Load this process's images from the run's step on: what `on_device` makes views of."""
        config, places, views = self.config, _Batches(self), self._views()
        workers = -(-config.workers // distributed.local_size())
        on_cuda = self.device.type == "cuda"
        held = None
        if config.views == DEVICE:
            held = hold(views, self.device, workers, quiet=self.quiet)
        if held is None:
            return load(views, places, workers, collate, pin_memory=on_cuda)
        # On a CPU a process that draws would only take a core from the encoders.
        return held_batches(views, held, places, workers if on_cuda else 0)

    def _epoch(self) -> float:
        return round(self.step / self.steps_per_epoch, 4)

    def _read(self, seen: list[Tensor], seconds: float) -> dict[str, float]:
        """Fetch what the steps since the last line left on the device, and refuse a bad loss."""
        values = distributed.average(torch.stack(seen)).cpu()
        bad = (~values[:, 0].isfinite()).nonzero()
        if len(bad):
            step = self.step - len(seen) + int(bad[0]) + 1
            rate = learning_rate(self.config, step - 1, self.steps_per_epoch)
            if self.watch:
                self.watch.add(step=step, epoch=self._epoch(), loss=math.nan)
            raise UserError(
                f"loss is not finite at step {step} (learning rate {rate:.3g}); the "
                f"last good checkpoint in {self.folder} stays; lower --lr"
            )
        loss, top1, batch_top1, norm = values.mean(dim=0).tolist()
        done = self.step - self.config.start_epoch * self.steps_per_epoch
        age = self.model.oldest_key(done)
        stored = {} if age is None else {"queue_age_steps": age}
        return {
            "step": self.step,
            "steps": self.steps,
            "epoch": self._epoch(),
            "loss": loss,
            "chance_loss": math.log(self.model.negatives + 1),
            "top1": 100 * top1,
            "batch_top1": 100 * batch_top1,
            "lr": learning_rate(self.config, self.step - 1, self.steps_per_epoch),
            "gradient_norm": norm,
            **stored,
            "queue_random": 100 * self.model.random_keys(done),
            "images_per_s": len(seen) * self.config.batch_size / seconds,
            "seconds": self.seconds,
        }

    def _gradient_norm(self) -> Tensor:
        """Return the (1,) norm of the last step's gradient; it stays on the device."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms: Tensor = torch.stack(torch._foreach_norm(gradients))
        norm: Tensor = norms.norm()
        return norm.view(1)

    def _spread(self) -> dict[str, float]:
        """Measure how the last step's embeddings lie: those of this process."""
        if not self.embedded:
            return {}
        q, k = (torch.cat(parts) for parts in zip(*self.embedded, strict=True))
        return spread(q, k)

    def _told(self, stop: StopRequest, last_saved: float) -> tuple[int | None, bool]:
        """Say which signal came to any process, and whether minutes between checkpoints are over.

        All processes must do the same: a signal may reach one only, and their clocks differ.
        """
        every = self.config.checkpoint_every
        minutes = float(every[:-1]) if every.endswith("m") else math.inf
        over = time.monotonic() - last_saved >= 60 * minutes
        told = distributed.agree(2 * (stop.signum or 0) + over)
        return told // 2 or None, bool(told % 2)

    def _checkpoint_due(self, ends_epoch: bool) -> bool:
        every = self.config.checkpoint_every
        if self.step == self.steps:
            return True
        if not every:
            return ends_epoch
        return not every.endswith("m") and self.step % int(every) == 0

    def _save(self, ends_epoch: bool) -> Path:
        done = self.step // self.steps_per_epoch
        epoch = done - 1 if ends_epoch else done
        if distributed.rank() == 0:
            if self.watch and not checkpoint.is_finite(self.model):  # the save will refuse it
                self.watch.add(step=self.step, epoch=self._epoch(), weights=math.nan)
            checkpoint.save(
                self.folder,
                self.model,
                self.optimizer,
                self.config,
                step=self.step,
                epochs_done=done,
                epoch=epoch,
            )
        distributed.agree(0)  # nobody leaves, or reads it, before it is written
        return checkpoint.path_of(self.folder, epoch)

    def _look(self, watch: Watch) -> None:
        """Vote and measure the leak, where they are asked for and due: between two epochs."""
        found = {}
        if self._knn_due():
            assert self.knn is not None
            found["knn_top1"] = self.knn(self.model.encoder_q, self.device)
        if self.config.leak_meter:
            config = self.config
            count = config.batch_size // distributed.size() // config.accumulate
            found |= leak.measure(self.model, self._views(), count, config.batch_size, config.seed)
        if found:
            watch.add(step=self.step, epoch=self._epoch(), **found)

    def _knn_due(self) -> bool:
        if self.knn is None or not self.config.knn_every:
            return False
        epoch = self.step // self.steps_per_epoch
        return epoch % self.config.knn_every == 0 or self.step == self.steps


class Order:
    """Which images each step takes: by position, whatever the processes.

    Args:
        images: in the set.
        seed: of the run.
        batch_size: images a step, on all processes.
    """

    def __init__(self, images: int, seed: int, batch_size: int) -> None:
        self.images = images
        self.seed = seed
        self.batch_size = batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def batch(self, step: int) -> Tensor:
        """Return the (N,) images of a step; process r takes those from r n to (r + 1) n."""
        epoch, place = divmod(step, self.images // self.batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.images, self.seed, epoch)
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]


class _Batches:
    """Yields this process's (epoch, image) pairs of each step that is left."""

    def __init__(self, run: Run) -> None:
        self.steps = range(run.step, run.steps)
        self.steps_per_epoch = run.steps_per_epoch
        self.order = Order(len(run.images), run.config.seed, run.config.batch_size)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            images = self.order.batch(step).view(distributed.size(), -1)[distributed.rank()]
            epoch = step // self.steps_per_epoch
            yield [(epoch, index) for index in images.tolist()]


def seed_generators(seed: int, step: int) -> None:
    """Seed Python's, NumPy's and torch's generators from the place in the run.

    Nothing here draws from them; a method or a network of one's own may (dropout does).
    """
    draw = generator(seed, "step", step, distributed.rank())
    number = int(torch.randint(2**32, (1,), generator=draw))
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _refuse_if_out_of_memory(error: Exception) -> None:
    """Turn an allocation that failed into one line."""
    signs = ("can't allocate memory", "out of memory", "not enough memory", "torage size")
    words = str(error).partition("\n")[0]
    if isinstance(error, MemoryError) or any(sign in words for sign in signs):
        raise UserError(
            f"memory ran out ({words[-160:]}); lower --batch-size, or take it in parts with "
            "--accumulate; lower --moco-k, the key dim or image_size"
        ) from error
