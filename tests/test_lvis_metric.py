"""LVIS's measure: numbers worked out by hand, and two evaluators that agree."""

import copy
import importlib.util
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pycocotools")
pytest.importorskip("detectron2")  # lvis_metric is in its room, and reads what it finds

from convert.errors import UserError
from tests.lvis_scenes import detections_around, random_truth
from transfer.detection import lvis_metric
from transfer.detection.coco_metric import FAST, RECORD

HAS_FAST = importlib.util.find_spec("faster_coco_eval") is not None
needs_fast = pytest.mark.skipif(not HAS_FAST, reason="needs faster-coco-eval")
BOTH = [RECORD, pytest.param(FAST, marks=needs_fast)]
BOX = [10.0, 10.0, 20.0, 20.0]
ELSEWHERE = [100.0, 100.0, 20.0, 20.0]


def truth() -> dict[str, Any]:
    """Rare acorns in images 1 and 2, of which 2 may have more; a common bear in 2, and a cat in 3.

    In image 1 there is surely no bear; whether there is a cat, nobody looked.
    """

    def image(number: int, absent: list[int], partly: list[int]) -> dict[str, Any]:
        lists = {"neg_category_ids": absent, "not_exhaustive_category_ids": partly}
        return {"id": number, "width": 200, "height": 200, **lists}

    objects = [(1, 1), (2, 1), (2, 2), (3, 3)]
    return {
        "images": [image(1, [2], []), image(2, [], [1]), image(3, [1], [])],
        "annotations": [
            {"id": i, "image_id": n, "category_id": k, "bbox": BOX, "area": 400.0}
            for i, (n, k) in enumerate(objects)
        ],
        "categories": [
            {"id": 1, "name": "acorn", "frequency": "r"},
            {"id": 2, "name": "bear", "frequency": "c"},
            {"id": 3, "name": "cat", "frequency": "f"},
        ],
    }


def found(image: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


FOUND = [
    found(2, 1, ELSEWHERE, 0.95),  # no acorn that is listed, where not all are: not counted
    found(1, 3, ELSEWHERE, 0.92),  # a cat where nobody looked for cats: not counted
    found(1, 1, BOX, 0.9),  # right
    found(1, 2, ELSEWHERE, 0.8),  # a bear where surely is none: wrong
    found(2, 2, BOX, 0.7),  # right
    found(3, 3, BOX, 0.6),  # right
    found(2, 1, BOX, 0.5),  # right
]


def numbers(content: dict[str, Any], detections: list[dict[str, Any]], evaluator: str):
    return lvis_metric.measure(content, detections, "bbox", evaluator)


@pytest.mark.parametrize("evaluator", BOTH)
def test_only_what_was_looked_for_counts_and_frequencies_have_their_own_means(evaluator) -> None:
    measured = numbers(truth(), FOUND, evaluator)
    assert measured.per_class() == {
        "acorn": pytest.approx(100, abs=1e-12),
        "bear": pytest.approx(50, abs=1e-12),
        "cat": pytest.approx(100, abs=1e-12),
    }
    mean = (100 + 50 + 100) / 3
    assert measured.percent("bbox") == {
        **{key: pytest.approx(mean, abs=1e-12) for key in ("AP", "AP50", "AP75", "APs")},
        "APr": pytest.approx(100, abs=1e-12),
        "APc": pytest.approx(50, abs=1e-12),
        "APf": pytest.approx(100, abs=1e-12),
    }  # no medium and no large object: undefined, and no zeros


@pytest.mark.parametrize("evaluator", BOTH)
def test_a_category_that_was_checked_and_not_found_makes_its_detections_wrong(evaluator) -> None:
    content = truth()
    content["images"][0]["neg_category_ids"] = [2, 3]
    assert numbers(content, FOUND, evaluator).per_class()["cat"] == pytest.approx(50, abs=1e-12)


@pytest.mark.parametrize("evaluator", BOTH)
def test_where_all_objects_are_listed_one_more_detection_is_wrong(evaluator) -> None:
    """Wrong, right, right: precision 1/2 and 2/3, so 2/3 at every recall."""
    content = truth()
    content["images"][1]["not_exhaustive_category_ids"] = []
    acorn = numbers(content, FOUND, evaluator).per_class()["acorn"]
    assert acorn == pytest.approx(100 * 2 / 3, abs=1e-12)


@pytest.mark.parametrize("evaluator", BOTH)
@pytest.mark.parametrize(("before", "wanted"), [(299, 1.0), (300, 0.0)])
def test_an_images_three_hundred_best_count_of_all_categories_together(
    before, wanted, evaluator
) -> None:
    """Half of those before it are cats where nobody looked: they take a place all the same."""
    more = [found(1, 2 + i % 2, ELSEWHERE, 0.9) for i in range(before)]
    measured = numbers(truth(), [*more, found(1, 1, BOX, 0.5), found(2, 1, BOX, 0.4)], evaluator)
    recalls = 101 if wanted else 51  # without the first acorn half of them are found
    assert measured.percent("bbox")["APr"] == pytest.approx(100 * recalls / 101, abs=1e-12)


@pytest.mark.parametrize("evaluator", BOTH)
def test_more_than_cocos_hundred_of_a_category_count(evaluator) -> None:
    more = [found(3, 3, ELSEWHERE, 0.9) for _ in range(149)]
    measured = numbers(truth(), [*more, found(3, 3, BOX, 0.5)], evaluator)
    assert measured.percent("bbox")["APf"] == pytest.approx(100 / 150, abs=1e-12)


@pytest.mark.parametrize("evaluator", BOTH)
def test_perfect_detections_are_worth_a_hundred_and_none_nothing(evaluator) -> None:
    content = random_truth(7)
    perfect = [{**entry, "score": 0.5} for entry in copy.deepcopy(content["annotations"])]
    for one in perfect:
        del one["id"], one["area"]
    for kind in ("bbox", "segm"):
        own = copy.deepcopy(perfect)
        for one in own if kind == "segm" else ():
            one["segmentation"] = _encoded(one["segmentation"], content)
        measured = lvis_metric.measure(content, own, kind, evaluator).percent(kind)
        assert set(measured.values()) == {100.0}
        nothing = lvis_metric.measure(content, [], kind, evaluator).percent(kind)
        assert set(nothing.values()) == {0.0}
        assert nothing.keys() == measured.keys()


def _encoded(outline: Any, content: dict[str, Any]) -> Any:
    from pycocotools import mask as rle

    size = content["images"][0]
    return rle.merge(rle.frPyObjects(outline, size["height"], size["width"]))


@needs_fast
@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_both_evaluators_say_the_same_to_the_last_bit(kind, seed) -> None:
    content = random_truth(seed)
    some = detections_around(content, seed)
    one, other = (lvis_metric.measure(content, some, kind, e) for e in (RECORD, FAST))
    assert np.array_equal(one.precision, other.precision)
    assert np.array_equal(one.stats, other.stats)
    assert 0.05 < one.stats[0] < 0.5  # neither trivially right nor wrong


# The lvis package 0.5.3's own numbers on these scenes, as tests/lvis_package.py prints them.
PACKAGE = {
    "bbox": [23.86, 47.63, 24.55, 14.48, 32.78, -100, 19.79, 30.52, 22.14],
    "segm": [21.86, 47.63, 13.83, 12.26, 30.71, -100, 15.53, 26.75, 22.82],
}


@pytest.mark.parametrize("evaluator", BOTH)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_lvis_packages_own_numbers_are_these(kind, evaluator) -> None:
    content = random_truth(0)
    ours = lvis_metric.measure(content, detections_around(content, 0), kind, evaluator)
    assert (100 * ours.stats).tolist() == pytest.approx(PACKAGE[kind], abs=0.005)


def test_a_category_without_a_frequency_is_refused() -> None:
    content = truth()
    del content["categories"][1]["frequency"]
    with pytest.raises(UserError, match="LVIS category 2: its frequency is None, want r or c or f"):
        numbers(content, FOUND, RECORD)
