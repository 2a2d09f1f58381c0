"""Cityscapes' measure: numbers worked out by hand, and the package's own."""

import numpy as np
import pytest

pytest.importorskip("detectron2")

from pycocotools import mask as rle

from tests.city_scenes import detections_around, random_ids
from transfer.detection import cityscapes_metric
from transfer.detection.cityscapes_sets import THINGS

CAR = 26


def scene() -> np.ndarray:
    """Two cars, a third of 25 pixels, a group of cars, a border without a label, and a road."""
    ids = np.full((60, 100), 7, np.int32)
    ids[:10] = 3
    ids[20:30, 0:20] = 1000 * CAR + 1
    ids[20:30, 40:60] = 1000 * CAR + 2
    ids[20:25, 80:85] = 1000 * CAR + 3
    ids[40:50, 0:20] = CAR
    return ids


def region(top: int, bottom: int, left: int, right: int):
    mask = np.zeros((60, 100), np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    return rle.encode(mask)


FOUND = [
    (region(20, 30, 0, 20), 0.9),  # the first car
    (region(20, 30, 0, 14), 0.8),  # the first once more, IoU 0.7: wrong
    (region(40, 50, 0, 20), 0.99),  # the group: not counted
    (region(20, 25, 80, 85), 0.98),  # the small one: not counted
    (region(3, 12, 70, 90), 0.95),  # 140 of 180 pixels on the border: wrong above 0.78 only
    (region(0, 0, 0, 0), 0.97),  # nothing: not counted
]


def look(found=FOUND, ids=None):
    masks, scores = [mask for mask, _ in found], [score for _, score in found]
    return cityscapes_metric.look(scene() if ids is None else ids, CAR, masks, scores)


def areas(*images) -> list[float]:
    own = cityscapes_metric.curves(images)
    assert own is not None
    return [curve.area() for curve in own]


def test_known_numbers() -> None:
    """Of two cars one is found, before a duplicate; at .80 to .95 after an error too.

    Up to .75: (recall, precision) is (.5, .5), (.5, 1), (0, 1), so .25 x 1 + .25 x 1. Above: (.5,
    1/3), (.5, 1/2), (0, 0), (0, 1), so .25 x 1/2.
    """
    assert areas(look()) == pytest.approx([0.5] * 6 + [0.125] * 4, abs=1e-12)


def test_a_car_of_a_hundred_pixels_is_to_be_found_and_one_of_fewer_is_not() -> None:
    ids = scene()
    ids[20:30, 40:60] = 7
    assert areas(look(FOUND[:1], ids)) == [1.0] * 10
    ids[20:30, 80:90] = 1000 * CAR + 3
    assert areas(look(FOUND[:1], ids)) == pytest.approx([0.5] * 10, abs=1e-12)


def test_a_detection_beside_its_group_is_wrong_when_it_leaves_the_group_too_far() -> None:
    """140 of its 200 pixels lie on the group, IoU 140/260: ignored below .7, wrong from there."""
    ids = scene()
    ids[20:30, 40:60] = 7
    beside = (region(40, 50, 6, 26), 0.95)
    assert areas(look([*FOUND[:1], beside], ids)) == pytest.approx([1.0] * 4 + [0.25] * 6)


def test_images_are_judged_alone_and_ranked_together() -> None:
    """One image's car is found after the other's error: (1, 1/2) and (0, 0)."""
    ids = scene()
    ids[20:30, 40:60] = 7
    none = np.full_like(ids, 7)
    wrong = look([(region(20, 30, 0, 20), 0.95)], none)
    assert areas(look(FOUND[:1], ids), wrong) == pytest.approx([0.25] * 10, abs=1e-12)


def test_a_class_without_objects_has_no_number_and_one_without_detections_has_zero() -> None:
    assert cityscapes_metric.curves([look(FOUND, np.full((60, 100), 7, np.int32))]) is None
    assert areas(look([])) == [0.0] * 10
    assert areas(look(FOUND[2:4])) == [0.0] * 10  # all of them ignored


def test_a_curve_is_drawn_by_its_best_precision_at_each_recall() -> None:
    own = cityscapes_metric.curves([look()])
    assert own is not None
    assert own[0].at(np.array([0, 0.5, 0.51, 1])).tolist() == [1, 1, 0, 0]
    assert own[9].at(np.array([0.01, 0.5])).tolist() == [0.5, 0.5]


def test_the_packages_own_numbers_are_these() -> None:
    """Of cityscapesScripts 2.3.0 on these scenes, as tests/cityscapes_package.py prints them."""
    table = []
    for place, label in enumerate(THINGS):
        seen = []
        for number in range(20, 32):
            ids = random_ids(number)
            own = [e for e in detections_around(ids, number) if e["category_id"] == place]
            masks, scores = [e["segmentation"] for e in own], [e["score"] for e in own]
            seen.append(cityscapes_metric.look(ids, label, masks, scores))
        table.append(areas(*seen))
    assert 100 * np.mean(table) == pytest.approx(6.317, abs=0.0005)
    assert 100 * np.mean(table, axis=0)[0] == pytest.approx(15.949, abs=0.0005)
