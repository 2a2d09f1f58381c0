"""The best, the median and the worst images of a test set, looked at once more.

Evaluation keeps no masks of thousands of images; the few that are shown are run again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_context
from detectron2.structures import BoxMode
from numpy.typing import NDArray
from pycocotools import mask as rle
from torch import nn

from transfer.detection import datasets
from transfer.detection.evaluation import SCORE, build_mapper
from transfer.detection.pictures import Figure, Shown

GROUPS = ("best", "median", "worst")


def take_pictures(
    cfg: CfgNode,
    model: nn.Module,
    test: datasets.Loaded,
    worth: Mapping[Any, float],
    each: int = 2,
) -> list[Shown]:
    """Run a detector on the images that came out best, in the middle, and worst.

    Args:
        cfg: the recipe.
        model: the detector.
        test: the test set.
        worth: image_id -> F1.
        each: images of a group at most.
    """
    by_id = {image["image_id"]: image for image in test.dicts}
    mapper = build_mapper(cfg)
    shown = []
    with inference_context(model), torch.no_grad():
        for image_id, group in choose(test.dicts, worth, each):
            truth = by_id[image_id]
            found = model([mapper(dict(truth))])[0]["instances"].to("cpu")
            title = f"{group}: F1 {worth[image_id]:.2f}"
            shown.append(
                Shown(
                    title,
                    Path(truth["file_name"]),
                    _truth(truth, test.classes),
                    _found(found, test.classes),
                )
            )
    return shown


def choose(
    dicts: Sequence[Mapping[str, Any]], worth: Mapping[Any, float], each: int
) -> list[tuple[Any, str]]:
    """Return ids and groups; among equals the images with most objects stand at the ends."""
    objects = {image["image_id"]: len(image.get("annotations", [])) for image in dicts}
    ids = list(worth)
    best = sorted(ids, key=lambda i: (-worth[i], -objects[i]))[:each]
    worst = sorted(ids, key=lambda i: (worth[i], -objects[i]))
    worst = [i for i in worst if i not in best][:each]
    between = [i for i in sorted(ids, key=lambda i: worth[i]) if i not in {*best, *worst}]
    start = max(0, (len(between) - each) // 2)
    middle = between[start : start + each]
    groups = zip(GROUPS, (best, middle, worst), strict=True)
    return [(image_id, group) for group, members in groups for image_id in members]


def _truth(image: Mapping[str, Any], classes: Sequence[str]) -> Figure:
    entries = image.get("annotations", [])
    boxes = [BoxMode.convert(list(e["bbox"]), e["bbox_mode"], BoxMode.XYXY_ABS) for e in entries]
    marks = {"iscrowd": " (crowd)", "difficult": " (difficult)"}
    masked = any(e.get("segmentation") for e in entries)
    most = max((len(e.get("keypoints") or ()) for e in entries), default=0)
    keyed = [np.reshape(e.get("keypoints") or np.zeros(most), (-1, 3)) for e in entries]
    return Figure(
        boxes=np.array(boxes, float).reshape(-1, 4),
        labels=[
            classes[e["category_id"]] + "".join(v for k, v in marks.items() if e.get(k))
            for e in entries
        ],
        masks=np.array([_mask(e, image) for e in entries]) if masked else None,
        keypoints=np.array(keyed) if most else None,
    )


def _mask(entry: Mapping[str, Any], image: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Return an annotation's mask, (H, W): polygons or COCO's run lengths."""
    outline = entry.get("segmentation")
    if not outline:
        return np.zeros((image["height"], image["width"]), bool)
    if isinstance(outline, list):
        outline = rle.merge(rle.frPyObjects(outline, image["height"], image["width"]))
    mask: NDArray[np.bool_] = rle.decode(outline).astype(bool)
    return mask


def _found(found: Any, classes: Sequence[str]) -> Figure:
    found = found[found.scores >= SCORE]
    found = found[found.scores.argsort(descending=True)]
    named = zip(found.pred_classes.tolist(), found.scores.tolist(), strict=True)
    return Figure(
        boxes=found.pred_boxes.tensor.double().numpy(),
        labels=[f"{classes[place]} {score:.2f}" for place, score in named],
        masks=found.pred_masks.numpy() if found.has("pred_masks") else None,
        keypoints=found.pred_keypoints.numpy() if found.has("pred_keypoints") else None,
    )
