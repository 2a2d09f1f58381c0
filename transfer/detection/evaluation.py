"""What a trained detector is worth: Detectron2's evaluators, and what it found in some images."""

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data.samplers import InferenceSampler
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
)
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch import nn

from convert.errors import UserError
from convert.progress import progress
from transfer.detection import datasets
from transfer.detection.pictures import Shown

PICTURES = 6


def hidden(quiet: bool) -> bool:
    """Progress is shown by one process, unless asked to be quiet."""
    return quiet or not comm.is_main_process()


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
        return progress(self._loader, len(self), "evaluation", "image", quiet=hidden(self._quiet))
