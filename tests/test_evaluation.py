"""Evaluation through Detectron2's loop, on the embedded scenes and on hand-made detections."""

from typing import Any

import pytest

pytest.importorskip("detectron2")

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from torch import nn

from convert.errors import UserError
from tests.detectors import COCO, VOC, load
from tests.own_sets import coco_content, write_coco, write_voc
from transfer.detection import album, datasets, evaluation


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
        if known and "keypoints" in known[0]:
            points = np.array([a["keypoints"] for a in known]).reshape(len(known), -1, 3)
            found.pred_keypoints = torch.tensor(points) + torch.tensor([self.shift, 0, 0])
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
    found = evaluation.evaluate(cfg, Oracle(test, 0.0), test, quiet=True)
    perfect = found.metrics
    assert list(perfect) == wanted
    assert all(value > 99 for key, value in perfect.items() if "mask" not in key)
    assert perfect.get("coco/mask_AP50", 100) > 99
    assert set(found.worth.values()) == {1.0}
    for measure, classes in found.details["per_class"].items():
        assert classes == {"digit": pytest.approx(perfect[measure])}
    blind = evaluation.evaluate(cfg, Oracle(test, 60.0), test, quiet=True)
    assert all(value < 2 for key, value in blind.metrics.items() if "mask" not in key)
    assert np.mean(list(blind.worth.values())) < 0.1


class Told(nn.Module):
    """Finds what it is told: image_id -> boxes (x0, y0, x1, y1), scores, classes."""

    def __init__(self, told: dict[Any, list[tuple[list[float], float, int]]]) -> None:
        super().__init__()
        self.told = told

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"instances": self.find(image)} for image in inputs]

    def find(self, image: dict[str, Any]) -> Instances:
        known = self.told.get(image["image_id"], [])
        found = Instances((image["height"], image["width"]))
        found.pred_boxes = Boxes(torch.tensor([box for box, _, _ in known]).reshape(-1, 4))
        found.scores = torch.tensor([score for _, score, _ in known])
        found.pred_classes = torch.tensor([place for _, _, place in known], dtype=torch.int64)
        return found


def test_voc_detections_made_by_hand_have_the_number_worked_out_by_hand(tmp_path) -> None:
    """Cats: a miss comes first, then two of four that count are right, or one at higher IoUs.

    Dogs: a miss comes first too, by a hair: in VOC's pixels its IoU is 42.6/85.4 = 0.499, in
    corners that are counted from 0 it would be over a half.
    """
    objects = {
        "one": [("cat", 10, 10, 19, 19, 0), ("cat", 50, 50, 59, 59, 1)],
        "two": [("cat", 10, 10, 19, 19, 0), ("dog", 1, 1, 64, 64, 0)],
        "three": [],
    }
    name = f"{write_voc(tmp_path / 'VOC2007', objects)}:all"
    cfg = load(VOC, "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    test = datasets.load([name], training=False)
    # Detectron2's boxes begin at 0: the pixel that VOC calls 10 begins at 9. Scores differ by less
    # than the three digits that Detectron2's own evaluator keeps.
    told = {
        "one": [
            ([9.0, 9.0, 19.0, 19.0], 0.90004, 0),
            ([9.0, 9.0, 19.0, 19.0], 0.90003, 0),
            ([49.0, 49.0, 59.0, 59.0], 0.90002, 0),
        ],
        "two": [
            ([11.0, 9.0, 21.0, 19.0], 0.90000, 0),
            ([9.0, 9.0, 10.0, 10.0], 0.90005, 0),
            ([0.0, 0.0, 64.0, 64.0], 0.3, 1),
            ([21.4, 0.0, 85.4, 64.0], 0.4, 1),
        ],
    }
    found = evaluation.evaluate(cfg, Told(told), test, quiet=True)
    # Precision 1/2 at all of the eleven recalls; at higher IoUs at the six of them up to 1/2.
    low, high = 0.5, 6 * 0.5 / 11
    cat = {"AP": 10 * (4 * low + 6 * high), "AP50": 100 * low, "AP75": 100 * high}
    assert found.metrics == {
        f"voc/{key}": pytest.approx((value + 50) / 2, abs=1e-12) for key, value in cat.items()
    }
    assert found.details["per_class"]["voc/AP50"] == {
        "cat": pytest.approx(cat["AP50"]),
        "dog": pytest.approx(50),
    }
    assert found.details["evaluator"] == "VOC, 11-point"
    # one: 2 detections count, 1 object, 1 right. two: 2 count (dog's is under 0.5), 2 objects,
    # 1 right. three: nothing to find and nothing found.
    assert found.worth == {"one": pytest.approx(2 / 3), "two": pytest.approx(2 / 4)}
    shown = album.take_pictures(cfg, Told(told), test, found.worth, each=1)
    assert [(one.title, one.found.labels) for one in shown] == [
        ("best: F1 0.67", ["cat 0.90"] * 3),
        ("worst: F1 0.50", ["cat 0.90"] * 2),
    ]
    assert shown[0].truth.labels == ["cat", "cat (difficult)"]
    cfg.MOCO.VOC_METRIC = "area"
    area = evaluation.evaluate(cfg, Told(told), test, quiet=True)
    assert area.metrics["voc/AP75"] == pytest.approx((0.5 * 50 + 50) / 2)
    assert area.details["evaluator"] == "VOC, area"


def test_coco_detections_made_by_hand_have_the_number_worked_out_by_hand(tmp_path) -> None:
    """Classes with ids that leave gaps: a cat found twice and a dog found after a miss."""
    name = write_coco(tmp_path)
    pairs = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
    cfg = load(COCO, *pairs, "MODEL.MASK_ON", "False")
    test = datasets.load([name], training=False)
    told = {
        1: [([10.0, 10.0, 30.0, 30.0], 0.9, 0), ([10.0, 10.0, 30.0, 30.0], 0.8, 0)],
        2: [([10.0, 10.0, 30.0, 30.0], 0.5, 1)],
        3: [([10.0, 10.0, 10.0, 10.0], 0.7, 1)],
    }
    found = evaluation.evaluate(cfg, Told(told), test, quiet=True)
    assert found.metrics == {f"coco/box_{k}": pytest.approx(75) for k in ("AP", "AP50", "AP75")}
    assert found.details["per_class"]["coco/box_AP"] == {
        "cat": pytest.approx(100),
        "dog": pytest.approx(50),
    }
    assert found.details["evaluator"].split()[0] in ("pycocotools", "faster-coco-eval")
    assert found.curves["coco/box_AP50"].tolist() == pytest.approx([0.75] * 101)
    assert "coco/box_APl" not in found.details["per_size_and_recall"]


def test_a_test_set_with_nothing_to_measure_is_refused_before_training(tmp_path) -> None:
    content = coco_content()
    for entry in content["annotations"]:
        entry.pop("segmentation")
    name = write_coco(tmp_path, content)
    pairs = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
    test = datasets.load([name], training=False)
    with pytest.raises(UserError, match=r"no object has a 'segmentation'.*set MODEL.MASK_ON False"):
        evaluation.check_measurable(load(COCO, *pairs), test)
    evaluation.check_measurable(load(COCO, *pairs, "MODEL.MASK_ON", "False"), test)


@pytest.mark.parametrize(
    ("wanted", "name", "rule"),
    [
        ("year", "voc_2007_test", "11-point"),
        ("year", "voc_2012_val", "area"),
        ("area", "voc_2007_test", "area"),
        ("11-point", "voc_2012_val", "11-point"),
    ],
)
def test_the_year_decides_vocs_metric_unless_it_is_named(wanted, name, rule) -> None:
    cfg = load(VOC, "MOCO.VOC_METRIC", wanted, "DATASETS.TEST", f"('{name}',)")
    assert evaluation.voc_rule(cfg) == rule


def test_it_does_not_matter_which_process_found_what_first() -> None:
    """Equal scores all over: the order of images is the set's, not that of the processes."""
    dicts = [{"image_id": name, "annotations": []} for name in "abc"]
    found = [
        evaluation.Found(name, np.full((2, 4), float(i)), np.ones(2), np.zeros(2, int), [])
        for i, name in enumerate("abc")
    ]
    for order in ([0, 1, 2], [2, 0, 1]):
        _, detections = evaluation.voc_arrays(dicts, [found[i] for i in order], 0)
        assert detections.image.tolist() == [0, 0, 1, 1, 2, 2]
        assert detections.boxes[:, 2].tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
