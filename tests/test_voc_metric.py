"""VOC's measure: numbers worked out by hand, and Detectron2's evaluator where it does not round."""

import numpy as np
import pytest

from transfer.detection import voc_metric
from transfer.detection.voc_metric import AREA, ELEVEN_POINTS, Detections, Objects

# Two images. To find: one 10 x 10 object in each; beside the first a difficult one.
OBJECTS = Objects(
    image=np.array([0, 0, 1]),
    boxes=np.array([[10, 10, 19, 19], [50, 50, 59, 59], [10, 10, 19, 19]], float),
    difficult=np.array([False, True, False]),
)
FOUND = Detections(
    image=np.array([0, 0, 0, 1, 1]),
    boxes=np.array(
        [
            [10, 10, 19, 19],  # right
            [10, 10, 19, 19],  # a duplicate: wrong
            [50, 50, 59, 59],  # the difficult one: not counted
            [10, 10, 10, 10],  # no area, which is one pixel here: IoU 1/100, wrong
            [12, 10, 21, 19],  # IoU 80/120: right up to a threshold of 0.65
        ],
        float,
    ),
    scores=np.array([0.9, 0.8, 0.7, 0.6, 0.5]),
)


def test_known_numbers() -> None:
    """Precision 1 up to recall 1/2; then 2 of the 4 that count are right, if the last one is."""
    curves = voc_metric.curves(OBJECTS, FOUND)
    points = [voc_metric.average_precision(curve, ELEVEN_POINTS) for curve in curves]
    areas = [voc_metric.average_precision(curve, AREA) for curve in curves]
    # Recalls 0 .. 0.5 are six of the eleven points. 0.5 .. 0.65 are four thresholds of ten.
    assert points == pytest.approx([(6 * 1 + 5 * 0.5) / 11] * 4 + [6 / 11] * 6, abs=1e-15)
    assert areas == pytest.approx([0.5 * 1 + 0.5 * 0.5] * 4 + [0.5] * 6, abs=1e-15)
    assert np.mean(points) == pytest.approx(70 / 110, abs=1e-15)


def test_the_order_of_detections_in_memory_does_not_matter() -> None:
    order = np.array([3, 0, 4, 2, 1])
    shuffled = Detections(FOUND.image[order], FOUND.boxes[order], FOUND.scores[order])
    for one, other in zip(
        voc_metric.curves(OBJECTS, FOUND), voc_metric.curves(OBJECTS, shuffled), strict=True
    ):
        assert (one.precision == other.precision).all()
        assert (one.recall == other.recall).all()


def test_a_class_without_an_object_to_find_has_no_number() -> None:
    hard = Objects(OBJECTS.image, OBJECTS.boxes, np.ones(3, bool))
    assert voc_metric.curves(hard, FOUND) is None


def test_no_detection_is_worth_nothing() -> None:
    nothing = Detections(np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))
    for curve in voc_metric.curves(OBJECTS, nothing):
        assert voc_metric.average_precision(curve, ELEVEN_POINTS) == 0
        assert voc_metric.average_precision(curve, AREA) == 0


def test_a_nearer_object_that_is_taken_is_not_replaced_by_the_next(tmp_path) -> None:
    """The devkit's rule, unlike COCO's: only the nearest object counts for a detection."""
    objects = Objects(
        np.zeros(2, int), np.array([[1, 1, 10, 10], [1, 1, 10, 12]], float), np.zeros(2, bool)
    )
    twice = Detections(
        np.zeros(2, int), np.array([[1, 1, 10, 10]] * 2, float), np.array([0.9, 0.8])
    )
    curve = voc_metric.curves(objects, twice, [50])[0]
    assert curve.recall.tolist() == [0.5, 0.5]
    assert curve.precision.tolist() == [1.0, 0.5]


def random_class(seed: int) -> tuple[list[str], dict, Objects, Detections]:
    """A class in 60 images: scores all differ, boxes have one digit after the point."""
    rng = np.random.default_rng(seed)
    names = [f"{i:06d}" for i in range(60)]
    truth: dict[str, list] = {name: [] for name in names}
    true, found = [], []
    for i, name in enumerate(names):
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = rng.integers(1, 200, 4).tolist()
            difficult = bool(rng.random() < 0.2)
            truth[name].append(([x, y, x + w, y + h], difficult))
            true.append((i, [x, y, x + w, y + h], difficult))
            for _ in range(rng.integers(0, 4)):
                noise = rng.normal(size=4) * rng.choice([2, 10, 40])
                found.append((i, (np.array([x, y, x + w, y + h]) + noise).round(1).tolist()))
        found += [(i, [5.0, 5.0, 5.0, 5.0])] * int(rng.integers(0, 2))
    scores = (rng.permutation(len(found)) + 1) / (len(found) + 1)
    objects = Objects(*(np.array(column) for column in zip(*true, strict=True)))
    columns = [np.array(column) for column in zip(*found, strict=True)]
    return names, truth, objects, Detections(columns[0], columns[1], scores)


@pytest.mark.parametrize("seed", [0, 1])
def test_detectron2s_evaluator_says_the_same_where_its_rounding_loses_nothing(
    tmp_path, seed
) -> None:
    reference = pytest.importorskip("detectron2.evaluation.pascal_voc_evaluation")
    names, truth, objects, found = random_class(seed)
    for name, own in truth.items():
        entries = "".join(
            f"<object><name>cat</name><pose/><truncated>0</truncated><difficult>{int(hard)}"
            f"</difficult><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin><xmax>{b[2]}</xmax>"
            f"<ymax>{b[3]}</ymax></bndbox></object>"
            for b, hard in own
        )
        (tmp_path / f"{name}.xml").write_text(f"<annotation>{entries}</annotation>")
    (tmp_path / "set.txt").write_text("\n".join(names))
    lines = [
        f"{names[i]} {score!r} {' '.join(map(str, box.tolist()))}"
        for i, box, score in zip(found.image, found.boxes, found.scores.tolist(), strict=True)
    ]
    (tmp_path / "det_cat.txt").write_text("\n".join(lines))
    paths = (str(tmp_path / "det_{}.txt"), str(tmp_path / "{}.xml"), str(tmp_path / "set.txt"))
    for at, curve in zip((50, 75), voc_metric.curves(objects, found, (50, 75)), strict=True):
        for metric in (ELEVEN_POINTS, AREA):
            recall, precision, ap = reference.voc_eval(
                *paths, "cat", ovthresh=at / 100, use_07_metric=metric == ELEVEN_POINTS
            )
            assert 0.01 < ap < 0.99
            assert (recall == curve.recall).all()
            assert (precision == curve.precision).all()
            assert voc_metric.average_precision(curve, metric) == pytest.approx(ap, abs=1e-15)
