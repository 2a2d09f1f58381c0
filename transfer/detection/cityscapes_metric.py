"""Cityscapes' average precision of instances, as cityscapesScripts 2.3.0 computes it.

A detection is right if its mask and an object's of its class overlap by more than a threshold, .50
to .95; of several on one object the surest is. Objects of fewer than 100 pixels and groups, which
nobody could part into objects (`cargroup`), are neither to be found nor wrong: a detection that
overlaps one by more than the threshold does not count, nor does one that lies mostly, by the same
threshold, on these and on pixels without a label. AP is the mean over thresholds and classes.

cityscapesScripts itself is no dependency: it compares files in folders that it finds by global
variables, fails on NumPy 2.4 and brings nine more packages. `tests/cityscapes_package.py` compares
the two. One case differs, as it fails there: where every detection of a class is ignored, AP is 0.

Legend: H, W: height and width; N: objects and groups of a class in an image; D: detections of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from transfer.detection.coco_metric import Floats

THRESHOLDS = np.arange(0.5, 1.0, 0.05)  # as the scripts have them, to the last bit
LEAST_PIXELS = 100
OF_OBJECTS = 1000  # ids from here on are a label times this and a number; below, a label alone
# Labels of 0 to 33; a detection may lie on those that are not evaluated, where they stand alone.
LABELS = range(34)
EVALUATED = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
VOID = np.array([label for label in LABELS if label not in EVALUATED])

Ids = NDArray[np.int32]  # (H, W)


@dataclass(frozen=True)
class Seen:
    """What there is of one class in one image, and what was found.

    Attributes:
        pixels: (N,) of each object or group.
        single: (N,) bool: an object, no group.
        scores, sizes: (D,) sureness, and pixels of each mask.
        void: (D,) pixels of it without a label.
        shared: (D, N) pixels in common.
    """

    pixels: Floats
    single: NDArray[np.bool_]
    scores: Floats
    sizes: Floats
    void: Floats
    shared: Floats


@dataclass(frozen=True)
class Curve:
    """Precision against recall, one point for each score, the lowest first, and (1, 0) at last."""

    precision: Floats
    recall: Floats

    def area(self) -> float:
        """Integrate by the scripts' steps: half the way to either neighbour."""
        around = np.concatenate([self.recall[:1], self.recall, [0.0]])
        return float(self.precision @ (around[:-2] - around[2:]) / 2)

    def at(self, recalls: Floats) -> Floats:
        """Return the best precision at each recall or above; 0 beyond the last."""
        best = [self.precision[self.recall >= r].max(initial=0.0) for r in recalls]
        return np.array(best)


def look(ids: Ids, label: int, masks: Sequence[dict[str, object]], scores: Sequence[float]) -> Seen:
    """Compare the detections of a class with an image's ids.

    Args:
        ids: (H, W), as `gtFine_instanceIds.png` has them.
        label: the class, 24 to 33.
        masks: run lengths of each detection; those without a pixel are left out.
        scores: of each.
    """
    counts = np.bincount(ids.ravel())
    known = np.flatnonzero(counts)
    own = (known == label) | (known // OF_OBJECTS == label)
    void = np.isin(known, VOID)
    rows = []
    for mask, score in zip(masks, scores, strict=True):
        covered = ids[rle.decode(mask).astype(bool)]
        if covered.size:
            shared = np.bincount(np.searchsorted(known, covered), minlength=len(known))
            rows.append((score, covered.size, shared[void].sum(), shared[own]))
    return Seen(
        pixels=counts[known[own]].astype(float),
        single=known[own] >= OF_OBJECTS,
        scores=np.array([row[0] for row in rows], float),
        sizes=np.array([row[1] for row in rows], float),
        void=np.array([row[2] for row in rows], float),
        shared=np.array([row[3] for row in rows], float).reshape(len(rows), int(own.sum())),
    )


def curves(images: Sequence[Seen]) -> list[Curve] | None:
    """Return a class's curve at each threshold; None if there is no object to find."""
    if not any((one.single & (one.pixels >= LEAST_PIXELS)).any() for one in images):
        return None
    return [_curve(images, float(threshold)) for threshold in THRESHOLDS]


def _curve(images: Sequence[Seen], threshold: float) -> Curve:
    right, wrong, missed = [], [], 0
    for one in images:
        hits, errors, lost = _judge(one, threshold)
        right.append(hits)
        wrong.append(errors)
        missed += lost
    hits, errors = np.sort(np.concatenate(right)), np.sort(np.concatenate(wrong))
    steps = np.unique(np.concatenate([hits, errors]))
    above = len(hits) - np.searchsorted(hits, steps)
    errors_above = len(errors) - np.searchsorted(errors, steps)
    return Curve(
        precision=np.append(above / (above + errors_above), 1.0),
        recall=np.append(above / (len(hits) + missed), 0.0),
    )


def _judge(one: Seen, threshold: float) -> tuple[Floats, Floats, int]:
    """Return the scores of an image's right and wrong detections, and how many objects it missed.

    Over a threshold of a half a detection can overlap one object only.
    """
    joined = one.pixels + one.sizes[:, None] - one.shared
    hit = one.shared / joined > threshold
    small = one.pixels < LEAST_PIXELS
    wanted = np.flatnonzero(one.single & ~small)
    right, wrong, missed = [], [], 0
    for place in wanted:
        scores = np.sort(one.scores[hit[:, place]])
        right.append(scores[-1:])
        wrong.append(scores[:-1])
        missed += not scores.size
    # A group that is small counts twice, as in the scripts.
    ignored = one.void + one.shared @ (~one.single + small.astype(float))
    alone = ~hit.any(axis=1) & (ignored / one.sizes <= threshold)
    empty = np.zeros(0)
    return np.concatenate([empty, *right]), np.concatenate([*wrong, one.scores[alone]]), missed
