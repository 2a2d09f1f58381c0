"""Detectron2's training loop with whole checkpoints, a quiet terminal and a prompt stop.

A resumed run ends in the bits of one that never stopped: batches are drawn by their place
(`batches.py`), and the generators are seeded anew before every forward pass.
"""

import json
import resource
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    JSONWriter,
    TensorboardXWriter,
)
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from convert.errors import Stopped, UserError
from convert.facts import EXTRA_KEY
from convert.files import write_text, write_torch
from convert.progress import Progress, progress
from convert.settings import PIXEL_KEYS
from pretrain.workers import watched
from transfer.detection import batches, checkpoint, datasets, recipes
from transfer.detection.evaluation import evaluate, hidden
from transfer.detection.weights import fill_all

METRICS_FILE = "metrics.json"
TENSORBOARD_FOLDER = "tensorboard"
ONE_SIGNAL_S = 1.0  # a terminal and a parent process both pass the same signal on
SPEED_AFTER = 5  # iterations, of which the first is not counted
GIB = 2**30


class Trainer(SimpleTrainer):
    """Detectron2's training loop with whole checkpoints, a quiet terminal and a prompt stop.

    Attributes:
        cfg: the recipe.
        facts: what its weights are; they travel in every checkpoint.
        stop: the signal that asked to end after this iteration; 0: none.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        data: datasets.Loaded,
        facts: dict[str, Any],
        quiet: bool,
    ) -> None:
        self.cfg, self.facts, self.stop = cfg, facts, 0
        self._data, self._quiet = data, quiet
        self.detector = model
        optimizer = build_optimizer(cfg, model)
        super().__init__(parallel(model, cfg.MODEL.DEVICE), (), optimizer)
        self.scheduler = build_lr_scheduler(cfg, optimizer)

    def train_from(self, state: Mapping[str, Any] | None) -> None:
        """Train from a saved state, or from the beginning, to the end of the schedule.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            UserError: the loss is no number any more, or a checkpoint cannot be written.
        """
        start = 0 if state is None else int(state["next_iteration"])
        if state is not None:
            fill_all(self.detector, state["model"], "checkpoint")
        if start >= self.cfg.SOLVER.MAX_ITER:
            return
        self._hook(start)
        if state is not None:
            self.load_state_dict(state["trainer"])
        self.data_loader = batches.training_batches(self.cfg, self._data.dicts, start)
        try:
            with watched(self.cfg.DATALOADER.NUM_WORKERS), self._stopping_between_iterations():
                self.train(start, self.cfg.SOLVER.MAX_ITER)
        except FloatingPointError as error:
            raise UserError(
                f"iteration {self.iter}: the loss is NaN or infinite; lower SOLVER.BASE_LR "
                f"({self.cfg.SOLVER.BASE_LR}) or lengthen SOLVER.WARMUP_ITERS"
            ) from error
        finally:
            del self.data_loader, self._data_loader_iter_obj  # and their workers

    def run_step(self) -> None:
        """Take an iteration: A parts forward and backward, their gradients averaged, one step.

        Each part is a batch of its own to Detectron2, which samples and normalises in it: A parts
        in one process give the gradients that A processes would.
        """
        losses: list[dict[str, Tensor]] = []
        waited_s = 0.0
        self.optimizer.zero_grad()
        mine = batches.streams(self.cfg)
        for stream in mine:
            started = time.perf_counter()
            batch = next(self._data_loader_iter)
            waited_s += time.perf_counter() - started
            batches.reseed(self.cfg.SEED, batches.FORWARD, self.iter, stream)
            with nullcontext() if stream == mine[-1] else self._unsynchronised():
                found = self.model(batch)
                (sum(found.values()) / len(mine)).backward()
            losses.append({name: loss.detach() for name, loss in found.items()})
        self._note(losses, waited_s)
        self.optimizer.step()

    def _unsynchronised(self) -> Any:
        """Keep gradients to this process until the last part."""
        parallel = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if parallel else nullcontext()

    def _note(self, losses: list[dict[str, Tensor]], waited_s: float) -> None:
        """Write down the losses' means over parts and processes.

        Raises:
            FloatingPointError: their sum is no number, in every process.
        """
        means = {name: float(torch.stack([x[name] for x in losses]).mean()) for name in losses[0]}
        everyone = comm.all_gather((means, waited_s))
        means = {name: float(np.mean([found[name] for found, _ in everyone])) for name in means}
        total = sum(means.values())
        if not np.isfinite(total):
            raise FloatingPointError(f"iteration {self.iter}: {means}")
        if comm.is_main_process():
            self.storage.put_scalar("data_time", max(waited for _, waited in everyone))
            self.storage.put_scalar("total_loss", total)
            if len(means) > 1:
                self.storage.put_scalars(**means)

    def recompute_statistics(self) -> None:
        """Replace the norms' running statistics by means over some batches (precise BN)."""
        precise = self.cfg.TEST.PRECISE_BN
        if not precise.ENABLED or not get_bn_modules(self.model):
            return
        count = precise.NUM_ITER * self.cfg.MOCO.ACCUMULATE  # as many images as one part would see
        shown = progress(
            self._seeded(count), count, "precise BN", "step", quiet=hidden(self._quiet)
        )
        with EventStorage():  # a forward pass in training mode notes its metrics somewhere
            update_bn_stats(self.model, shown, count)

    def _seeded(self, count: int) -> Iterator[list[dict[str, Any]]]:
        loader = islice(batches.training_batches(self.cfg, self._data.dicts), count)
        for place, batch in enumerate(loader):
            batches.reseed(self.cfg.SEED, batches.PRECISE_BN, place, comm.get_rank())
            yield batch

    def save(self, path: Path) -> None:
        """Write the trained detector, without what only training needs."""
        write_torch(path, self._detector())

    def save_state(self) -> None:
        """Write all that a resume needs."""
        content = self._detector() | {
            "trainer": self.state_dict(),
            "next_iteration": self.iter + 1,
            "streams": comm.get_world_size() * self.cfg.MOCO.ACCUMULATE,
        }
        checkpoint.save_state(Path(self.cfg.OUTPUT_DIR), content, self.cfg.MOCO.KEEP)

    def _detector(self) -> dict[str, Any]:
        flat = recipes.flatten(self.cfg)
        ours = {"facts": self.facts, "pixels": {key: flat[key] for key in PIXEL_KEYS}}
        return {"model": self.detector.state_dict(), EXTRA_KEY: ours}

    def _hook(self, start: int) -> None:
        """Add what happens beside the steps; the order matters: a state holds what came before."""
        cfg, folder = self.cfg, Path(self.cfg.OUTPUT_DIR)
        own = [hooks.IterationTimer(), hooks.LRScheduler()]
        if cfg.TEST.EVAL_PERIOD:
            own.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._measure, eval_after_train=False))
        if comm.is_main_process():
            period = max(1, min(20, cfg.SOLVER.MAX_ITER // 50))
            forget_lines(folder / METRICS_FILE, start)
            writers = [
                JSONWriter(str(folder / METRICS_FILE), window_size=period),
                TensorboardXWriter(str(folder / TENSORBOARD_FOLDER), period, purge_step=start),
                CommonMetricPrinter(cfg.SOLVER.MAX_ITER),
            ]
            own.append(hooks.PeriodicWriter(writers, period=period))
        self.register_hooks([*own, _Speed(self._quiet), _Progress(self._quiet), _Keep(cfg)])

    def _measure(self) -> dict[str, float]:
        """Evaluate in the middle of training (TEST.EVAL_PERIOD)."""
        self.recompute_statistics()
        test = datasets.load(self.cfg.DATASETS.TEST, training=False)
        return evaluate(self.cfg, self.model, test, self._quiet)[0]

    @contextmanager
    def _stopping_between_iterations(self) -> Iterator[None]:
        """Let the first signal end the training after its iteration, a later one at once."""
        asked_at = 0.0

        def ask(signum: int, frame: FrameType | None) -> None:
            nonlocal asked_at
            now = time.monotonic()
            if self.stop and now - asked_at > ONE_SIGNAL_S:
                raise Stopped(signum)
            if not self.stop and comm.is_main_process():
                print("stopping after this iteration (once more: at once)", flush=True)
            self.stop, asked_at = signum, now

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Keep(HookBase):
    """Saves the state from time to time, at the end, and when a signal asked to stop."""

    def __init__(self, cfg: CfgNode) -> None:
        self._every = recipes.checkpoint_every(cfg)
        self._saved_at = time.monotonic()

    def after_step(self) -> None:
        trainer = self.trainer
        # A signal may have reached one process only: all end after the same iteration.
        stop = max(comm.all_gather(trainer.stop))
        if (stop or self._due()) and comm.is_main_process():
            trainer.save_state()
            self._saved_at = time.monotonic()
        if stop:
            comm.synchronize()  # nobody leaves before it is written
            raise Stopped(stop)

    def _due(self) -> bool:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter:
            return True
        iterations, seconds = self._every
        return (iterations > 0 and done % iterations == 0) or (
            time.monotonic() - self._saved_at >= seconds
        )


class _Speed(HookBase):
    """Says after a few iterations how long the rest will take, and the memory at its most."""

    def __init__(self, quiet: bool) -> None:
        self._hidden = hidden(quiet)

    def after_step(self) -> None:
        done = self.trainer.iter + 1 - self.trainer.start_iter
        if done == 1:
            self._started = time.monotonic()
        if done != SPEED_AFTER or self._hidden or self.trainer.iter + 1 == self.trainer.max_iter:
            return
        each_s = (time.monotonic() - self._started) / (SPEED_AFTER - 1)
        left_h = each_s * (self.trainer.max_iter - self.trainer.iter - 1) / 3600
        left = f"{left_h:.1f} hours" if left_h >= 1 else f"{60 * left_h:.1f} minutes"
        print(
            f"speed: {each_s:.2f} s an iteration, about {left} left; "
            f"memory {peak_bytes() / GIB:.1f} GiB a process at its most",
            flush=True,
        )


class _Progress(HookBase):
    """Shows how far the training is."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def before_train(self) -> None:
        total, start = self.trainer.max_iter, self.trainer.start_iter
        self._shown = Progress(total, "training", "iteration", start, quiet=hidden(self._quiet))

    def after_step(self) -> None:
        loss = self.trainer.storage.histories().get("total_loss")
        note = "" if loss is None else f"loss {loss.median(20):.3f}, "
        self._shown.add(1, f"{note}{peak_bytes() / GIB:.1f} GiB")

    def after_train(self) -> None:
        self._shown.close()


def peak_bytes() -> float:
    """Return this process's memory at its most: of its GPU where it uses one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB


def forget_lines(file: Path, start: int) -> None:
    """Take the lines off a log that a killed run wrote after its last checkpoint."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] < start:
                kept.append(f"{line}\n")
        except (KeyError, TypeError, ValueError):
            continue  # cut off by the kill
    write_text(file, "".join(kept))


def parallel(model: nn.Module, device: str) -> nn.Module:
    """Wrap a model for several processes; on a CPU too, where Detectron2's own wrap fails."""
    if comm.get_world_size() == 1:
        return model
    devices = None if device == "cpu" else [comm.get_local_rank()]
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
