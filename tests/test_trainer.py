"""A step of the real detectors on the embedded scenes, on the CPU."""

from typing import Any

import pytest

pytest.importorskip("detectron2")

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from tests.detectors import COCO, load
from transfer.detection import recipes, weights


def batch(cfg: CfgNode) -> list[dict[str, Any]]:
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 50.0]]))
    instances.gt_classes = torch.tensor([0])
    instances.gt_masks = PolygonMasks([[np.array([8.0, 8, 40, 8, 40, 50, 8, 50])]])
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    return [{"image": image, "instances": instances, "height": 64, "width": 64}]


@pytest.mark.parametrize("precision", recipes.PRECISIONS)
def test_a_step_trains_the_whole_detector_in_float32_parameters(precision: str) -> None:
    cfg = load(COCO, "MOCO.PRECISION", precision)
    built = weights.build_detector(cfg).train()
    kinds: list[torch.dtype] = []
    watch = built.backbone.stem.conv1.register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    with EventStorage():
        losses = built(batch(cfg))
    watch.remove()
    sum(losses.values()).backward()
    without = [name for name, p in built.named_parameters() if p.grad is None]
    assert without == []
    assert {p.dtype for p in built.parameters()} == {torch.float32}
    assert kinds == [torch.bfloat16 if precision == "bf16" else torch.float32]
