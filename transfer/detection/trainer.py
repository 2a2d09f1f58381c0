"""Detectron2's training loop with whole checkpoints, a quiet terminal and a prompt stop."""

import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from convert.errors import Stopped, UserError
from convert.facts import EXTRA_KEY
from convert.files import atomic_write
from convert.progress import Progress, progress
from convert.settings import PIXEL_KEYS
from transfer.detection import datasets, recipes
from transfer.detection.evaluation import evaluate, hidden
from transfer.detection.weights import CHECKPOINT_FILE, fill_all

METRICS_FILE = "metrics.json"


class Trainer(SimpleTrainer):
    """Detectron2's training loop with whole checkpoints, a quiet terminal and a prompt stop.

    Attributes:
        cfg: the recipe.
        facts: what its weights are; they travel in every checkpoint.
        stop: the signal that asked to end after this iteration.
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
        super().__init__(_parallel(model, cfg), (), optimizer)
        self.scheduler = build_lr_scheduler(cfg, optimizer)
        folder, period = Path(cfg.OUTPUT_DIR), max(1, min(20, cfg.SOLVER.MAX_ITER // 50))
        own = [hooks.IterationTimer(), hooks.LRScheduler()]
        if cfg.TEST.EVAL_PERIOD:
            own.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._measure, eval_after_train=False))
        if comm.is_main_process():
            metrics = JSONWriter(str(folder / METRICS_FILE), window_size=period)
            log = CommonMetricPrinter(cfg.SOLVER.MAX_ITER)
            own.append(hooks.PeriodicWriter([metrics, log], period=period))
        self.register_hooks([*own, _Progress(quiet), _Keep(folder, cfg.SOLVER.CHECKPOINT_PERIOD)])

    def train_from(self, state: Mapping[str, Any] | None) -> None:
        """Train from a saved state, or from the beginning, to the end of the schedule.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            UserError: the loss is no number any more.
        """
        start = 0
        if state is not None:
            fill_all(self.detector, state["model"], CHECKPOINT_FILE)
            self.load_state_dict(state["trainer"])
            start = int(state["next_iteration"])
        if start >= self.cfg.SOLVER.MAX_ITER:
            return
        self.data_loader = self._loader(self.cfg.SEED + start, self.cfg.DATALOADER.NUM_WORKERS)
        try:
            with self._stopping_between_iterations():
                self.train(start, self.cfg.SOLVER.MAX_ITER)
        except FloatingPointError as error:
            raise UserError(
                f"iteration {self.iter}: the loss is NaN or infinite; lower SOLVER.BASE_LR "
                f"({self.cfg.SOLVER.BASE_LR}) or lengthen SOLVER.WARMUP_ITERS"
            ) from error

    def recompute_statistics(self) -> None:
        """Replace the norms' running statistics by means over some batches (precise BN)."""
        precise = self.cfg.TEST.PRECISE_BN
        if not precise.ENABLED or not get_bn_modules(self.model):
            return
        count = precise.NUM_ITER
        batches = islice(self._loader(self.cfg.SEED, workers=0), count)
        shown = progress(batches, count, "precise BN", "step", quiet=hidden(self._quiet))
        with EventStorage():  # a forward pass in training mode notes its metrics somewhere
            update_bn_stats(self.model, shown, count)

    def save(self, path: Path, *, whole: bool) -> None:
        """Write the detector; with all that a resume needs if `whole`."""
        flat = recipes.flatten(self.cfg)
        content: dict[str, Any] = {
            "model": self.detector.state_dict(),
            EXTRA_KEY: {"facts": self.facts, "pixels": {key: flat[key] for key in PIXEL_KEYS}},
        }
        if whole:
            content |= {"trainer": self.state_dict(), "next_iteration": self.iter + 1}
        with atomic_write(path) as temporary:
            torch.save(content, temporary)

    def _loader(self, seed: int, workers: int) -> Iterable[list[dict[str, Any]]]:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = workers
        sampler = None  # other samplers are made by Detectron2, from the recipe
        if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
            sampler = TrainingSampler(len(self._data.dicts), seed=seed)
        loader: Iterable[list[dict[str, Any]]] = build_detection_train_loader(
            cfg, dataset=self._data.dicts, sampler=sampler
        )
        return loader

    def _measure(self) -> dict[str, float]:
        """Evaluate in the middle of training (TEST.EVAL_PERIOD)."""
        self.recompute_statistics()
        test = datasets.load(self.cfg.DATASETS.TEST, training=False)
        return evaluate(self.cfg, self.model, test, self._quiet)[0]

    @contextmanager
    def _stopping_between_iterations(self) -> Iterator[None]:
        """Let the first signal end the training after its iteration, a second one at once.

        Several processes would end at different iterations and wait for each other: there the
        signal ends them as it comes, and a resume takes the last periodic checkpoint.
        """

        def ask(signum: int, frame: FrameType | None) -> None:
            if self.stop:
                raise Stopped(signum)
            self.stop = signum
            print("stopping after this iteration (once more: at once)", flush=True)

        if comm.get_world_size() > 1:
            yield
            return
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Keep(HookBase):
    """Saves the whole state from time to time, at the end, and when a signal asked to stop."""

    def __init__(self, folder: Path, period: int) -> None:
        self._file, self._period = folder / CHECKPOINT_FILE, period

    def after_step(self) -> None:
        trainer = self.trainer
        done = trainer.iter + 1
        due = done == trainer.max_iter or (self._period > 0 and done % self._period == 0)
        if (due or trainer.stop) and comm.is_main_process():
            trainer.save(self._file, whole=True)
        if trainer.stop:
            raise Stopped(trainer.stop)


class _Progress(HookBase):
    """Shows how far the training is."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def before_train(self) -> None:
        total, start = self.trainer.max_iter, self.trainer.start_iter
        self._shown = Progress(total, "training", "iteration", start, quiet=hidden(self._quiet))

    def after_step(self) -> None:
        loss = self.trainer.storage.histories().get("total_loss")
        self._shown.add(1, "" if loss is None else f"loss {loss.median(20):.3f}")

    def after_train(self) -> None:
        self._shown.close()


def _parallel(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Wrap a model for several processes; on a CPU too, where Detectron2's own wrap fails."""
    if comm.get_world_size() == 1:
        return model
    devices = None if cfg.MODEL.DEVICE == "cpu" else [comm.get_local_rank()]
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
