"""Compare our LVIS metric with the lvis package: `python tests/lvis_package.py [LVIS.json]`.

The package wants NumPy's old name of float, which this file gives it, and is no dependency: install
it beside, `pip install --no-deps --target FOLDER lvis==0.5.3`, and put FOLDER on PYTHONPATH.
Detections are drawn around the objects of the file, or of random scenes; every number of the two
must be equal to a rounding.
"""

import copy
import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from tests.lvis_scenes import detections_around, random_truth
from transfer.detection import lvis_metric
from transfer.detection.coco_metric import FAST, RECORD


def package_numbers(truth: dict[str, Any], found: list[dict[str, Any]], kind: str) -> list[float]:
    """Return the lvis package's numbers in the order of `lvis_metric.STATS`, 0..1 or -1."""
    np.float = float  # type: ignore[attr-defined]
    logging.disable(logging.WARNING)
    from lvis import LVIS, LVISEval, LVISResults

    known = LVIS.__new__(LVIS)
    known.logger = logging.getLogger("lvis")
    known.dataset = copy.deepcopy(truth)
    known._create_index()
    dropped = "bbox" if kind == "segm" else "segmentation"  # as Detectron2 hands them over
    own = [{k: v for k, v in one.items() if k != dropped} for one in found]
    judged = LVISEval(known, LVISResults(known, own, max_dets=lvis_metric.MOST), kind)
    judged.run()
    return [float(judged.results[name]) for name in lvis_metric.STATS]


def compare(truth: dict[str, Any], found: list[dict[str, Any]], title: str) -> float:
    """Print the numbers of all; return the largest difference."""
    worst = 0.0
    for kind in ("bbox", "segm"):
        theirs = package_numbers(truth, found, kind)
        for evaluator in (RECORD, FAST):
            if evaluator == FAST and importlib.util.find_spec("faster_coco_eval") is None:
                continue
            ours = lvis_metric.measure(truth, found, kind, evaluator).stats
            difference = float(np.abs(ours - theirs).max())
            worst = max(worst, difference)
            numbers = ", ".join(
                f"{name} {100 * value:.2f}"
                for name, value in zip(lvis_metric.STATS, theirs, strict=True)
            )
            print(f"{title}, {kind}, {evaluator}: {numbers}; largest difference {difference:.1e}")
    return worst


def main(files: list[str]) -> int:
    """Compare on random scenes and on the files named."""
    worst = 0.0
    for seed in range(5):
        truth = random_truth(seed)
        worst = max(worst, compare(truth, detections_around(truth, seed), f"scenes {seed}"))
    for file in files:
        truth = json.loads(Path(file).read_text(encoding="utf-8"))
        worst = max(worst, compare(truth, detections_around(truth, 0), Path(file).name))
    print(f"largest difference of all: {worst:.1e}")
    return int(worst > 1e-9)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
