"""LVIS's average precision: COCO's, where only what was looked for in an image counts there.

Of each image LVIS knows the categories that are in it, some that are surely not
(`neg_category_ids`), and those of the former of which objects may be missing
(`not_exhaustive_category_ids`) (Gupta et al., arXiv:1908.03195, section 3). So

- a detection of a category that is neither in the image nor surely not in it does not count,
- one that matches no object is no error where objects of its category may be missing,
- an image's 300 best detections count, of all categories together,
- and the mean over categories is taken once more over those that are rare, common and frequent
  in training: in fewer than 10 images, fewer than 100, and more.

The lvis package, which defines this, has not run on NumPy since 1.24. pycocotools compares, or
faster-coco-eval in its LVIS mode; tests hold both equal to numbers worked out by hand and to each
other, and `tests/lvis_package.py` compares them with the package itself.
"""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.errors import UserError
from transfer.detection import coco_metric
from transfer.detection.coco_metric import FAST, Floats

MOST = 300  # detections of an image that count
FREQUENCIES = ("r", "c", "f")  # rare, common, frequent
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", *(f"AP{word}" for word in FREQUENCIES))
HEADLINE = ("AP", "AP50", "AP75", "APr", "APc", "APf")  # what stands among a result's metrics

Detections = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Measured(coco_metric.Measured):
    """What detections are worth on LVIS's measure.

    Attributes:
        stats: (9,), named by `STATS`, 0..1 and -1 where no category has an object to find.
    """

    def percent(self, kind: str) -> dict[str, float]:
        """Return the defined numbers of `STATS` in percent; they are the same for each kind."""
        named = zip(STATS, self.stats.tolist(), strict=True)
        return {name: 100 * value for name, value in named if value >= 0}


def measure(
    truth: Mapping[str, Any], detections: Detections, kind: str, evaluator: str
) -> Measured:
    """Measure detections.

    Args:
        truth: an LVIS file's content: images with their two lists, annotations, and categories
            with their `frequency`.
        detections: as `coco_metric.measure` has them.
        kind: bbox or segm.
        evaluator: pycocotools or faster-coco-eval.

    Raises:
        UserError: an annotation lacks what this kind compares, or a category its frequency.
    """
    groups = _groups(truth)
    counted = _checked(truth, _best(detections))
    with redirect_stdout(io.StringIO()):
        judge, known, found = coco_metric.indexed(truth, counted, kind, evaluator)
        if evaluator == FAST:
            judged = judge(known, found, kind, lvis_style=True)
            judged.params.maxDets = [MOST]
            judged.evaluate()
        else:
            judged = judge(known, found, kind)
            judged.params.maxDets = [MOST]
            judged.evaluate()
            _forgive(judged.evalImgs, truth)
        judged.accumulate()
    precision = coco_metric.exact(judged.eval["precision"])
    names = {category["id"]: str(category["name"]) for category in truth["categories"]}
    places = [[groups[i] == word for i in judged.params.catIds] for word in FREQUENCIES]
    whole = precision[:, :, :, 0, -1]
    parts = (
        *(whole, whole[0], whole[5]),
        *(precision[:, :, :, area, -1] for area in (1, 2, 3)),
        *(whole[:, :, chosen] for chosen in places),
    )
    return Measured(
        stats=np.array([_mean(part) for part in parts]),
        precision=precision,
        recall=np.asarray(judged.eval["recall"], float),
        classes=tuple(names[i] for i in judged.params.catIds),
    )


def _mean(precision: Floats) -> float:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else -1.0


def _groups(truth: Mapping[str, Any]) -> dict[int, str]:
    """Return each category's frequency by its id."""
    groups = {category["id"]: category.get("frequency") for category in truth["categories"]}
    wrong = [i for i, word in groups.items() if word not in FREQUENCIES]
    if wrong:
        raise UserError(
            f"LVIS category {wrong[0]}: its frequency is {groups[wrong[0]]!r}, want "
            f"{' or '.join(FREQUENCIES)}"
        )
    return groups


def _best(detections: Detections) -> Detections:
    """Keep an image's best detections, in the order in which they are given."""
    places: dict[Any, list[int]] = defaultdict(list)
    for place, one in enumerate(detections):
        places[one["image_id"]].append(place)
    kept: list[int] = []
    for own in places.values():
        kept += sorted(own, key=lambda place: -detections[place]["score"])[:MOST]
    return [detections[place] for place in sorted(kept)]


def _checked(truth: Mapping[str, Any], detections: Detections) -> Detections:
    """Keep the detections of categories that were looked for in their image."""
    checked = {image["id"]: set(image["neg_category_ids"]) for image in truth["images"]}
    for entry in truth["annotations"]:
        checked[entry["image_id"]].add(entry["category_id"])
    return [one for one in detections if one["category_id"] in checked[one["image_id"]]]


def _forgive(compared: Sequence[dict[str, Any] | None], truth: Mapping[str, Any]) -> None:
    """Ignore, in place, unmatched detections of categories that may have more objects there."""
    more = {image["id"]: set(image["not_exhaustive_category_ids"]) for image in truth["images"]}
    for one in compared:
        if one is not None and one["category_id"] in more[one["image_id"]]:
            one["dtIgnore"] = one["dtIgnore"].astype(bool) | (one["dtMatches"] == 0)
