"""What a run shows of its images: which, and what is drawn on them."""

import itertools

import pytest

pytest.importorskip("detectron2")

import numpy as np
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as rle

from tests.detectors import COCO, load
from tests.test_evaluation import Oracle
from transfer.detection import album, datasets, evaluation, pictures


def test_the_best_the_median_and_the_worst_are_shown_and_each_image_once() -> None:
    dicts = [{"image_id": i, "annotations": [{}] * (i % 3)} for i in range(9)]
    worth = dict(enumerate([0.1, 0.2, 0.0, 0.4, 1.0, 1.0, 0.5, 0.0, 0.6]))
    assert album.choose(dicts, worth, 2) == [
        (5, "best"),  # of two that are right, the one with more objects
        (4, "best"),
        (1, "median"),
        (3, "median"),
        (2, "worst"),
        (7, "worst"),
    ]
    few = album.choose(dicts[:2], {0: 0.1, 1: 0.2}, 2)
    assert [image for image, _ in few] == [1, 0]
    assert album.choose(dicts, {}, 2) == []


def test_masks_and_keypoints_are_looked_up_in_the_truth_and_in_what_is_found() -> None:
    cfg = load(COCO)
    test = datasets.load(cfg.DATASETS.TEST, training=False)
    oracle = Oracle(test, 0.0)
    worth = evaluation.evaluate(cfg, oracle, test, quiet=True).worth
    shown = album.take_pictures(cfg, oracle, test, worth, each=1)
    assert [one.title.split(":")[0] for one in shown] == ["best", "median", "worst"]
    for one in shown:
        assert one.truth.boxes == pytest.approx(one.found.boxes)
        assert one.truth.masks.shape == one.found.masks.shape
        assert (one.truth.masks != one.found.masks).mean() < 0.02
        assert one.found.labels == ["digit 0.90"] * len(one.found.boxes)


def test_a_crowd_is_marked_and_its_run_lengths_are_read() -> None:
    region = np.zeros((8, 6), np.uint8, order="F")
    region[2:5, 1:4] = 1
    crowd = {
        "bbox": [1, 2, 3, 3],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 1,
        "segmentation": rle.encode(region),
        "keypoints": [2.0, 3.0, 2.0] + [0.0] * 48,
    }
    figure = album._truth({"height": 8, "width": 6, "annotations": [crowd]}, ["digit"])
    assert figure.labels == ["digit (crowd)"]
    assert figure.boxes.tolist() == [[1, 2, 4, 5]]
    assert (figure.masks[0] == region.astype(bool)).all()
    assert figure.keypoints.shape == (1, 17, 3)


def test_boxes_masks_and_keypoints_are_drawn_on_truth_and_detections(tmp_path) -> None:
    Image.new("RGB", (80, 60), (0, 0, 0)).save(tmp_path / "a.png")
    box = np.array([[15.0, 15.0, 40.0, 40.0]])
    mask = np.zeros((1, 60, 80), bool)
    mask[0, 20:30, 20:30] = True
    points = np.array([[[60.0, 40.0, 2.0], [5.0, 5.0, 0.0]]])
    bare = pictures.Figure(np.zeros((0, 4)), [], None, None)
    figures = [
        bare,
        pictures.Figure(box, ["cat 0.9"], None, None),
        pictures.Figure(box, ["cat 0.9"], mask, None),
        pictures.Figure(box, ["cat 0.9"], mask, points),
    ]

    def drawn(truth: pictures.Figure, found: pictures.Figure) -> np.ndarray:
        shown = [pictures.Shown("best: F1 1.00", tmp_path / "a.png", truth, found)]
        pictures.draw_detections(tmp_path / "out.png", shown, 0.5)
        with Image.open(tmp_path / "out.png") as image:
            return np.asarray(image.convert("RGB")).astype(int)

    above = [drawn(figure, bare) for figure in figures]
    below = [drawn(bare, figure) for figure in figures]
    half = above[0].shape[0] // 2
    for images, own, other in (
        (above, slice(half), slice(half, None)),
        (below, slice(half, None), slice(half)),
    ):
        for one, more in itertools.pairwise(images):
            assert (one[own] != more[own]).any(axis=2).sum() > 10
            assert (one[other] == more[other]).all()
    pictures.draw_detections(tmp_path / "none.png", [], 0.5)  # no image to show is no mistake


def test_curves_are_drawn_with_and_without_a_training(tmp_path) -> None:
    per_class = {"voc07/AP": {f"class {i}": float(i) for i in range(60)}}
    curves = {"voc07/AP50": np.linspace(1, 0, 101)}
    losses = tmp_path / "metrics.json"
    pictures.draw_curves(tmp_path / "two.png", losses, curves, per_class)
    losses.write_text(
        '{"iteration": 0, "total_loss": 3.0, "loss_cls": 1.0}\n'
        '{"iteration": 9, "total_loss": 1.0, "loss_cls": 0.5, "lr": 0.1}\n{"eval": 1}\n'
    )
    pictures.draw_curves(tmp_path / "three.png", losses, curves, per_class)
    widths = []
    for name in ("two", "three"):
        with Image.open(tmp_path / f"{name}.png") as image:
            widths.append(image.width)
    assert widths[1] == pytest.approx(1.5 * widths[0], rel=0.05)
