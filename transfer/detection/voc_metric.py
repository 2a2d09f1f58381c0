"""PASCAL VOC's average precision (Everingham et al., IJCV 2010, section 4.2), in arrays.

The rules: detections of a class are taken by falling score over all images; one is right if its
IoU with the object that it overlaps most is over the threshold and nothing before it took that
object; what overlaps a difficult object most counts neither way. Boxes are in VOC's own pixels,
counted from 1, and the last one belongs to the box, so a side measures x1 - x0 + 1.

Detectron2's evaluator follows the same rules on text of three digits of score and one of pixels,
and gives the same numbers where that loses nothing; nothing is rounded here. On 33,000 drawn
detections of 3,000 objects of one class its rounding moved AP50 by 0.0005 and AP at 0.9, by one of
the eleven points, by 0.55. Detections with equal scores keep their order: images as the set lists
them, and in an image as the detector gives them; Detectron2 leaves that order to the sort.

Legend: T: objects of a class in all images; D: its detections.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

IOUS = tuple(range(50, 100, 5))  # percent, as COCO's
ELEVEN_POINTS, AREA = "11-point", "area"  # of 2007, and of 2010 and later


@dataclass(frozen=True)
class Objects:
    """A class's objects.

    Attributes:
        image: (T,) which image each is in.
        boxes: (T, 4) x0, y0, x1, y1.
        difficult: (T,) not to be counted, found or not.
    """

    image: Ints
    boxes: Floats
    difficult: NDArray[np.bool_]


@dataclass(frozen=True)
class Detections:
    """What a detector found of a class: image (D,), boxes (D, 4) as `Objects`, scores (D,)."""

    image: Ints
    boxes: Floats
    scores: Floats


@dataclass(frozen=True)
class Curve:
    """Recall and precision, each (D,), 0..1, after each detection by falling score."""

    recall: Floats
    precision: Floats


def curves(objects: Objects, found: Detections, ious: Sequence[int] = IOUS) -> list[Curve] | None:
    """Return a class's curve at each IoU threshold (percent), or None if nothing is to be found."""
    to_find = int((~objects.difficult).sum())
    if not to_find:
        return None
    order = np.argsort(-found.scores, kind="stable")
    image, boxes = found.image[order], found.boxes[order]
    iou, nearest = best_overlaps(objects, image, boxes)
    return [_curve(iou > at / 100, nearest, objects.difficult, to_find) for at in ious]


def average_precision(curve: Curve, metric: str) -> float:
    """Return the AP, 0..1, of a curve.

    Args:
        curve: of a class.
        metric: 11-point, the mean of the best precision at recalls 0, 0.1 .. 1; or area, under the
            curve whose precision never rises with recall.
    """
    best = np.maximum.accumulate(curve.precision[::-1])[::-1]
    if metric == ELEVEN_POINTS:
        # The same sums as the devkit's, hence its tenths: 3 * 0.1 is no 0.3.
        places = np.searchsorted(curve.recall, np.arange(0.0, 1.1, 0.1), side="left")
        return float(np.append(best, 0.0)[places].sum() / 11)
    steps = np.diff(curve.recall, prepend=0.0)
    return float((steps * best).sum())


def precision_at(curve: Curve, recalls: Floats) -> Floats:
    """Return the best precision at or beyond each recall; 0 where it is not reached."""
    best = np.append(np.maximum.accumulate(curve.precision[::-1])[::-1], 0.0)
    reached: Floats = best[np.searchsorted(curve.recall, recalls, side="left")]
    return reached


def best_overlaps(objects: Objects, image: Ints, boxes: Floats) -> tuple[Floats, Ints]:
    """Return for each detection its largest IoU with an object of its image, and that object.

    Where two are equally near, the first counts; in an image without objects: -1 and 0.
    """
    by_image = np.argsort(objects.image, kind="stable")
    ids = objects.image[by_image]
    first = np.searchsorted(ids, image, side="left")
    count = np.searchsorted(ids, image, side="right") - first
    iou, nearest = np.full(len(image), -1.0), np.zeros(len(image), np.int64)
    for step in range(int(count.max(initial=0))):  # as many rounds as objects in one image
        rows = np.flatnonzero(count > step)
        place = by_image[first[rows] + step]
        overlap = overlaps(objects.boxes[place], boxes[rows])
        better = overlap > iou[rows]
        iou[rows[better]], nearest[rows[better]] = overlap[better], place[better]
    return iou, nearest


def overlaps(one: Floats, other: Floats) -> Floats:
    """Return the IoU of pairs of boxes, (N, 4) each, in whole pixels, the last one included."""
    sides = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2]) + 1
    shared = np.maximum(sides, 0).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1) for boxes in (one, other)]
    ratio: Floats = shared / (areas[0] + areas[1] - shared)
    return ratio


def _curve(hit: NDArray[np.bool_], nearest: Ints, difficult: NDArray[np.bool_], n: int) -> Curve:
    """Count along the detections, which come by falling score."""
    counted = ~(hit & difficult[nearest]) if len(difficult) else np.ones(len(hit), bool)
    right = np.zeros(len(hit), bool)
    hits = np.flatnonzero(hit & counted)
    right[hits[np.unique(nearest[hits], return_index=True)[1]]] = True
    tp = np.cumsum(right).astype(float)
    seen = np.cumsum(counted).astype(float)
    return Curve(recall=tp / n, precision=tp / np.maximum(seen, np.finfo(float).eps))
