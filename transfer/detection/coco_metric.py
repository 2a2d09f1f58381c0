"""COCO's average precision: pycocotools is the record, faster-coco-eval the same numbers sooner.

Both are handed the same annotations and the same detections, in memory. Which one ran stands in a
result; tests hold every number of the two equal to the last bit.

Legend: T: IoU thresholds, .50 to .95 in steps of .05; R: the 101 recalls 0, .01 .. 1; K: classes;
A: ranges of area, all, small, medium, large (keypoints: all, medium, large); M: most detections an
image, 1, 10, 100 (keypoints: 20).
"""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.errors import UserError

Floats = NDArray[np.float64]

RECORD, FAST = "pycocotools", "faster-coco-eval"
EVALUATORS = ("auto", RECORD, FAST)
# pycocotools adds the spacing of floats to the number of detections before it divides by it, which
# shows where that number is 1, and nowhere else: one right detection of one has this precision. The
# fast evaluator says 1, which it is; else no mean of the two would be equal in its last bit.
_ONE_OF_ONE = 1 / (1 + np.spacing(1.0))
# In the order in which both libraries give their numbers.
_OF_REGIONS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
STATS = {
    "bbox": _OF_REGIONS,
    "segm": _OF_REGIONS,
    "keypoints": (
        *("AP", "AP50", "AP75", "APm", "APl"),
        *("AR", "AR50", "AR75", "ARm", "ARl"),
    ),
}


@dataclass(frozen=True)
class Measured:
    """What detections are worth on COCO's measure, each number 0..1 and -1 where it is undefined.

    Attributes:
        stats: (12,), or (10,) for keypoints, named by `STATS`.
        precision: (T, R, K, A, M).
        recall: (T, K, A, M).
        classes: the K names.
    """

    stats: Floats
    precision: Floats
    recall: Floats
    classes: tuple[str, ...]

    def percent(self, kind: str) -> dict[str, float]:
        """Return the defined numbers of `STATS` in percent."""
        named = zip(STATS[kind], self.stats.tolist(), strict=True)
        return {name: 100 * value for name, value in named if value >= 0}

    def per_class(self, iou: float | None = None) -> dict[str, float]:
        """Return each class's AP in percent; classes without an object to find are left out.

        Args:
            iou: at this threshold; None: the mean over all.
        """
        precision = self.precision[:, :, :, 0, -1]
        part = precision if iou is None else precision[[_place(iou)]]
        means = {name: part[:, :, k] for k, name in enumerate(self.classes)}
        return {k: 100 * float(p[p > -1].mean()) for k, p in means.items() if (p > -1).any()}

    def curve(self, iou: float) -> Floats:
        """Return the precision, 0..1, at each of the R recalls, mean over classes."""
        precision = self.precision[_place(iou), :, :, 0, -1]
        defined = precision[:, (precision > -1).all(axis=0)]
        return defined.mean(axis=1) if defined.size else np.zeros(len(precision))


def choose(wanted: str) -> str:
    """Return the evaluator that will run.

    Args:
        wanted: one of `EVALUATORS`; auto takes the fast one where it is installed.

    Raises:
        UserError: it is unknown or not installed.
    """
    if wanted not in EVALUATORS:
        raise UserError(f"MOCO.COCO_EVALUATOR: found '{wanted}', want {' or '.join(EVALUATORS)}")
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    if wanted == FAST and not installed:
        raise UserError(f"MOCO.COCO_EVALUATOR {FAST}: is not installed: pip install {FAST}")
    return FAST if wanted != RECORD and installed else RECORD


def version(evaluator: str) -> str:
    """Name an evaluator with its version, for a record."""
    return f"{evaluator} {metadata.version(evaluator)}"


def measure(
    truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    kind: str,
    evaluator: str,
    sigmas: Sequence[float] = (),
) -> Measured:
    """Measure detections.

    Args:
        truth: a COCO file's content: images, annotations, categories.
        detections: COCO results: image_id, category_id, score, and bbox (x, y, width, height),
            segmentation (RLE) or keypoints.
        kind: bbox, segm or keypoints.
        evaluator: pycocotools or faster-coco-eval.
        sigmas: a keypoint's falloff each (TEST.KEYPOINT_OKS_SIGMAS); none: COCO's 17.

    Raises:
        UserError: an annotation lacks what this kind compares.
    """
    with redirect_stdout(io.StringIO()):
        judge, known, found = indexed(truth, detections, kind, evaluator)
        judged = judge(known, found, kind)
        if len(sigmas):
            judged.params.kpt_oks_sigmas = np.array(sigmas)
        judged.evaluate()
        judged.accumulate()
        precision = judged.eval["precision"] = exact(judged.eval["precision"])
        judged.summarize()
    names = {category["id"]: category["name"] for category in truth["categories"]}
    return Measured(
        stats=np.array(judged.stats[: len(STATS[kind])], float),
        precision=precision,
        recall=np.asarray(judged.eval["recall"], float),
        classes=tuple(str(names[i]) for i in judged.params.catIds),
    )


def indexed(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], kind: str, evaluator: str
) -> tuple[Any, Any, Any]:
    """Return a library's evaluation class, and truth and detections as it wants them.

    Raises:
        UserError: an annotation lacks what this kind compares.
    """
    library, judge = _library(evaluator)
    known = _index(library, {**truth, "annotations": _annotations(truth, kind)})
    return judge, known, _results(library, known, truth, detections, kind)


def exact(precision: Any) -> Floats:
    """Return precisions with the one of one right detection of one as what it is."""
    found = np.asarray(precision, float)
    found[found == _ONE_OF_ONE] = 1.0
    return found


def _library(evaluator: str) -> tuple[Any, Any]:
    if evaluator == FAST:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    from pycocotools import coco, cocoeval

    return coco.COCO, cocoeval.COCOeval


def _index(library: Any, content: dict[str, Any]) -> Any:
    built = library()
    built.dataset = content
    built.createIndex()
    return built


def _annotations(truth: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Copy the annotations, counted from 1 and with what both libraries read.

    An id of 0 would mean "not matched" to them, and a found object would count as missed.
    """
    wanted = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[kind]
    copies = []
    for place, entry in enumerate(truth["annotations"], start=1):
        if wanted not in entry:
            raise UserError(f"annotation {entry.get('id')}: has no '{wanted}'; {kind} wants one")
        box = entry.get("bbox", (0, 0, 0, 0))
        copies.append({"iscrowd": 0, "area": box[2] * box[3], **entry, "id": place})
    return copies


def _results(
    library: Any,
    known: Any,
    truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    kind: str,
) -> Any:
    """Index detections; a mask's area is its own and not its box's, as Detectron2 has it."""
    dropped = {"bbox": ("segmentation", "keypoints"), "segm": ("bbox", "keypoints")}.get(
        kind, ("segmentation",)
    )
    own = [{k: v for k, v in one.items() if k not in dropped} for one in detections]
    if own:
        return known.loadRes(own)
    parts = {"images": truth["images"], "categories": truth["categories"], "annotations": []}
    return _index(library, parts)


def _place(iou: float) -> int:
    return round((iou - 0.5) / 0.05)
