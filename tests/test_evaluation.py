"""Evaluators on the embedded scenes."""

from typing import Any

import pytest

pytest.importorskip("detectron2")

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from torch import nn

from tests.detectors import COCO, VOC, load
from transfer.detection import datasets, evaluation


class Oracle(nn.Module):
    """A detector that knows the truth, and may be told to miss it by some pixels."""

    def __init__(self, loaded: datasets.Loaded, shift: float) -> None:
        super().__init__()
        self.truth = {image["image_id"]: image["annotations"] for image in loaded.dicts}
        self.shift = shift

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"instances": self.find(image)} for image in inputs]

    def find(self, image: dict[str, Any]) -> Instances:
        known = self.truth[image["image_id"]]
        size = (image["height"], image["width"])
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in known]
        found = Instances(size)
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32) + self.shift)
        found.scores = torch.full((len(known),), 0.9)
        found.pred_classes = torch.zeros(len(known), dtype=torch.int64)
        if known and "segmentation" in known[0]:
            outlines = [[np.array(p) for p in a["segmentation"]] for a in known]
            found.pred_masks = BitMasks.from_polygon_masks(PolygonMasks(outlines), *size).tensor
        return found


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        (COCO, [f"coco/{kind}_AP{at}" for kind in ("box", "mask") for at in ("", "50", "75")]),
        (VOC, ["voc07/AP", "voc07/AP50", "voc07/AP75"]),
    ],
    ids=["coco", "voc"],
)
def test_a_perfect_detector_scores_a_hundred_and_a_blind_one_nothing(file, wanted) -> None:
    cfg = load(file)
    test = datasets.load(cfg.DATASETS.TEST, training=False)
    perfect, shown = evaluation.evaluate(cfg, Oracle(test, 0.0), test, quiet=True)
    assert list(perfect) == wanted
    assert all(value > 99 for key, value in perfect.items() if "mask" not in key)
    assert perfect.get("coco/mask_AP50", 100) > 99
    assert len(shown) == evaluation.PICTURES
    assert all(len(one.boxes) == len(one.true_boxes) for one in shown)
    blind, _ = evaluation.evaluate(cfg, Oracle(test, 60.0), test, quiet=True)
    assert all(value < 2 for key, value in blind.items() if "mask" not in key)
