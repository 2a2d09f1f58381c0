"""Detectron2 fine-tuning and evaluation that can be trusted.

The extra-norm head of MoCo's C4 detectors, weights that land whole or not at all, a trainer whose
checkpoints are whole, and the evaluation. `detection_job.py` puts them together.
Importing this file registers the head, so that Detectron2's own predictor finds it too.

Legend: R: regions of interest of all images; C = 2048, the channels of res5; 7 its side.
"""

import io
import logging
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, build_detection_train_loader
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
)
from detectron2.layers import get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY, build_model
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from convert.backbone import load_backbone
from convert.errors import Stopped, UserError
from convert.facts import EXTRA_KEY, Facts
from convert.files import atomic_write, sha256
from convert.names import COUNTER, land, to_detectron2
from convert.progress import Progress, progress
from convert.settings import PIXEL_KEYS, check_keys, check_recipe
from transfer import datasets, recipes
from transfer.pictures import Shown

CHECKPOINT_FILE = "checkpoint.pth"  # the last state of a running training
FINAL_FILE = "model_final.pth"  # the trained detector, without what only training needs
METRICS_FILE = "metrics.json"
HEAD_NAME = "Res5ROIHeadsExtraNorm"
PICTURES = 6
# Made anew from the recipe; old files of Detectron2 hold them all the same.
_REBUILT = ("cell_anchors.0", "pixel_mean", "pixel_std")


# --- the head -------------------------------------------------------------------------------------


class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """C4's head with a norm after res5 (MoCo v1, appendix, object detection backbones).

    Features learnt without labels are distributed otherwise than supervised ones; norms that are
    trained along adapt them (section 4.2). It is named `res5.norm`, stands behind the last block,
    and is shared by the box and the mask branch.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """Add the recipe's own norm behind res5: (R, C, 7, 7) -> the same.

        Raises:
            UserError: the recipe has no norm.
        """
        parts: dict[str, Any] = super().from_config(cfg, input_shape)
        res5 = parts["res5"]
        norm = get_norm(cfg.MODEL.RESNETS.NORM, res5[-1].out_channels)
        if norm is None:
            raise UserError(f"MODEL.RESNETS.NORM: is empty; {HEAD_NAME} wants one, as SyncBN")
        res5.add_module("norm", norm)
        return parts

    def forward_with_given_boxes(self, features: Any, instances: Any) -> Any:
        """Predict masks for given boxes, in float32.

        They are pasted into the image through a grid of their own type, whose coordinates bf16
        would round to whole pixels and more.
        """
        instances = super().forward_with_given_boxes(features, instances)
        for found in instances:
            if found.has("pred_masks"):
                found.pred_masks = found.pred_masks.float()
        return instances


if HEAD_NAME not in ROI_HEADS_REGISTRY:  # another project of the same user may have brought its own
    ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)


# --- weights --------------------------------------------------------------------------------------


def build_detector(cfg: CfgNode) -> nn.Module:
    """Build a recipe's model; under bf16 its forward pass, and nothing else, is autocast."""
    model: nn.Module = build_model(cfg)
    if cfg.MOCO.PRECISION == "bf16":
        cast = torch.autocast(torch.device(cfg.MODEL.DEVICE).type, dtype=torch.bfloat16)
        model.forward = cast(model.forward)
    return model


def fill_backbone(model: nn.Module, cfg: CfgNode) -> dict[str, Any]:
    """Put the recipe's MODEL.WEIGHTS into a detector's backbone, whole.

    Returns:
        The facts of what was loaded, as a result's `checkpoint` has them.

    Raises:
        UserError: the file is no backbone, expects other pixels or another stride than the recipe,
            or a tensor is missing, left over, or of another shape.
    """
    if not cfg.MODEL.WEIGHTS:
        return start_facts(cfg)
    tensors, facts = _read_backbone(Path(cfg.MODEL.WEIGHTS))
    check_recipe(recipes.flatten(cfg), facts, cfg.MODEL.WEIGHTS)
    places = land(tensors, model.state_dict())
    _copy(model, {key: tensors[name] for name, key in places.items()}, cfg.MODEL.WEIGHTS)
    landed = sum(not name.endswith(COUNTER) for name in places)
    return facts.as_dict() | {"file": cfg.MODEL.WEIGHTS, "tensors_landed": landed}


def start_facts(cfg: CfgNode) -> dict[str, Any]:
    """Say what a recipe's MODEL.WEIGHTS is, without a detector.

    Raises:
        UserError: the file is no backbone.
    """
    if cfg.MODEL.WEIGHTS:
        return _read_backbone(Path(cfg.MODEL.WEIGHTS))[1].as_dict()
    return {"name": "random", "sha256": None, "method": "random init", "seed": cfg.SEED}


def _read_backbone(path: Path) -> tuple[dict[str, Tensor], Facts]:
    """Return a backbone under Detectron2's names."""
    backbone = load_backbone(path)
    return {to_detectron2(name): t for name, t in backbone.weights.items()}, backbone.facts


def load_detector(model: nn.Module, path: Path, cfg: CfgNode) -> dict[str, Any]:
    """Put a trained detector's weights into a model, every one of them.

    Args:
        model: built from the recipe that the detector was trained with.
        path: `model_final.pth` of a run here, or of Detectron2.
        cfg: the recipe.

    Returns:
        The facts of its backbone, where the file carries them, else its name and hash.

    Raises:
        UserError: the file is no detector, was trained on other pixels, or a tensor is missing,
            left over, or of another shape.
    """
    content = read_torch(path)
    weights = content.get("model")
    if not isinstance(weights, Mapping) or not any("proposal_generator" in k for k in weights):
        raise UserError(f"{path}: holds no trained detector; want a run's {FINAL_FILE}")
    ours = content.get(EXTRA_KEY)
    if ours is not None:
        check_keys(recipes.flatten(cfg), ours["pixels"], str(path))
    fill_all(model, weights, str(path))
    facts = {"name": path.name, "method": "unknown"} if ours is None else dict(ours["facts"])
    return facts | {"detector": str(path), "detector_sha256": sha256(path)}


def read_torch(path: Path) -> dict[str, Any]:
    """Read a file of torch.save that holds tensors, numbers and strings only.

    Raises:
        UserError: it is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no closed list of what a damaged file raises
        reason = str(error).split("\n", 1)[0][:160]
        raise UserError(f"checkpoint {path}: is damaged or no checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path}: holds a {type(content).__name__}, want a dictionary")
    return content


def fill_all(model: nn.Module, weights: Mapping[str, Any], where: str) -> None:
    """Copy a whole detector's tensors.

    Raises:
        UserError: one is missing, left over, or of another shape.
    """
    state = model.state_dict()
    missing = [key for key in state if key not in weights]
    extra = [key for key in weights if key not in state and not key.endswith(_REBUILT)]
    for fault, keys in (("missing", missing), ("left over", extra)):
        if keys:
            raise UserError(
                f"{where}: {len(keys)} of {len(state)} tensors are {fault}, first '{keys[0]}'; "
                "is it of another recipe?"
            )
    _copy(model, {key: weights[key] for key in state}, where)


def _copy(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    state = model.state_dict()
    for key, tensor in tensors.items():
        if state[key].shape != tensor.shape:
            raise UserError(
                f"{where}: '{key}' has shape {tuple(tensor.shape)}, "
                f"the model wants {tuple(state[key].shape)}"
            )
    with torch.no_grad():
        for key, tensor in tensors.items():
            state[key].copy_(tensor)


# --- training -------------------------------------------------------------------------------------


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
        shown = progress(batches, count, "precise BN", "step", quiet=_hidden(self._quiet))
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
        self._shown = Progress(total, "training", "iteration", start, quiet=_hidden(self._quiet))

    def after_step(self) -> None:
        loss = self.trainer.storage.histories().get("total_loss")
        self._shown.add(1, "" if loss is None else f"loss {loss.median(20):.3f}")

    def after_train(self) -> None:
        self._shown.close()


def _hidden(quiet: bool) -> bool:
    """Progress is shown by one process, unless asked to be quiet."""
    return quiet or not comm.is_main_process()


def _parallel(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Wrap a model for several processes; on a CPU too, where Detectron2's own wrap fails."""
    if comm.get_world_size() == 1:
        return model
    devices = None if cfg.MODEL.DEVICE == "cpu" else [comm.get_local_rank()]
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


# --- evaluation -----------------------------------------------------------------------------------


def evaluate(
    cfg: CfgNode, model: nn.Module, test: datasets.Loaded, quiet: bool
) -> tuple[dict[str, float], list[Shown]]:
    """Measure a detector on the recipe's test set.

    Returns:
        The metrics in percent (empty in all processes but the main one), and some images with what
        was found in them.
    """
    name = cfg.DATASETS.TEST[0]
    task, prefixes = find_task(cfg)
    loader = build_detection_test_loader(
        test.dicts,
        mapper=DatasetMapper(cfg, False),
        sampler=InferenceSampler(len(test.dicts)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    if task == "coco":
        kinds = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        judge = COCOEvaluator(name, tasks=kinds, use_fast_impl=False)
    else:
        judge = PascalVOCDetectionEvaluator(name)
    album = _Album(test.dicts)
    found = inference_on_dataset(model, _Counted(loader, quiet), _Judges([judge, album]))
    if not comm.is_main_process():
        return {}, []
    metrics = {}
    for kind, prefix in prefixes.items():
        for part in ("AP", "AP50", "AP75"):
            value = float(found[kind][part])
            metrics[f"{task}/{prefix}{part}"] = value if np.isfinite(value) else 0.0  # none found
    return metrics, album.shown


def find_task(cfg: CfgNode) -> tuple[str, dict[str, str]]:
    """Return the task's name, and what each of Detectron2's results is called in the metrics."""
    name = cfg.DATASETS.TEST[0]
    kind, year = datasets.evaluator_type(name)
    if kind == "coco":
        return "coco", {"bbox": "box_"} | ({"segm": "mask_"} if cfg.MODEL.MASK_ON else {})
    if kind == "pascal_voc":
        return f"voc{year % 100:02d}", {"bbox": ""}
    raise UserError(f"DATASETS.TEST {name}: is measured as '{kind}', want a COCO or a VOC set")


class _Judges(DatasetEvaluators):
    """Evaluators whose printing goes to log.txt."""

    def evaluate(self) -> dict[str, Any]:
        text = io.StringIO()
        with redirect_stdout(text):
            found: dict[str, Any] = super().evaluate()
        logging.getLogger("detectron2.evaluation").info(text.getvalue())
        return found


class _Album(DatasetEvaluator):
    """Keeps what was found in a few images, spread evenly over the set."""

    def __init__(self, dicts: list[dict[str, Any]]) -> None:
        places = np.unique(np.linspace(0, len(dicts) - 1, PICTURES).round().astype(int))
        self._wanted = {dicts[place]["image_id"]: dicts[place] for place in places}
        self.shown: list[Shown] = []

    def process(self, inputs: Any, outputs: Any) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            truth = self._wanted.get(image["image_id"])
            if truth is not None:
                self.shown.append(_shown(truth, output["instances"].to("cpu")))


def _shown(truth: Mapping[str, Any], found: Any) -> Shown:
    boxes = [
        BoxMode.convert(entry["bbox"], entry["bbox_mode"], BoxMode.XYXY_ABS)
        for entry in truth.get("annotations", [])
    ]
    outlines = [entry.get("segmentation") for entry in truth.get("annotations", [])]
    return Shown(
        file=Path(truth["file_name"]),
        true_boxes=np.array(boxes, float).reshape(-1, 4),
        true_outlines=[outline for outline in outlines if isinstance(outline, list)],
        boxes=found.pred_boxes.tensor.double().numpy(),
        scores=found.scores.double().numpy(),
        masks=found.pred_masks.numpy() if found.has("pred_masks") else None,
    )


class _Counted:
    """A loader that shows how far it is."""

    def __init__(self, loader: Any, quiet: bool) -> None:
        self._loader, self._quiet = loader, quiet

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        hidden = _hidden(self._quiet)
        return progress(self._loader, len(self), "evaluation", "image", quiet=hidden)
