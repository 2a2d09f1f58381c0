"""Compare our Cityscapes metric with cityscapesScripts: `python tests/cityscapes_package.py`.

The package wants a function that NumPy 2.4 has no more, which this file gives it, and is no
dependency: install it beside, `pip install --no-deps --target FOLDER cityscapesscripts==2.3.0`, and
put FOLDER on PYTHONPATH. Every AP of the two must be equal to a rounding.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from tests.city_scenes import detections_around, random_ids
from transfer.detection import cityscapes_metric
from transfer.detection.cityscapes_sets import CLASSES, THINGS


def package_aps(folder: Path, images: int, first: int) -> np.ndarray:
    """Return the package's APs, (classes, thresholds); NaN where there is nothing to find."""
    np.in1d = np.isin  # type: ignore[attr-defined]
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as scripts

    truths, predictions = [], []
    for number in range(first, first + images):
        ids = random_ids(number)
        truths.append(str(folder / f"{number}_gtFine_instanceIds.png"))
        Image.fromarray(ids.astype(np.uint16)).save(truths[-1])
        lines = []
        for place, one in enumerate(detections_around(ids, number)):
            name = f"{number}_{place}.png"
            Image.fromarray(255 * rle.decode(one["segmentation"])).save(folder / name)
            lines.append(f"{name} {THINGS[one['category_id']]} {one['score']}\n")
        predictions.append(str(folder / f"{number}_pred.txt"))
        Path(predictions[-1]).write_text("".join(lines))
    args = scripts.args
    args.predictionPath, args.quiet, args.JSONOutput = str(folder), True, False
    args.gtInstancesFile = str(folder / "instances.json")
    scripts.setInstanceLabels(args)
    known = scripts.getGtInstances(truths, args)
    matches = scripts.matchGtWithPreds(predictions, truths, known, args)
    aps = scripts.evaluateMatches(matches, args)[0]
    return np.array([aps[args.instLabels.index(name)] for name in CLASSES])


def our_aps(images: int, first: int) -> np.ndarray:
    """Return ours."""
    rows = []
    for place, label in enumerate(THINGS):
        seen = []
        for number in range(first, first + images):
            ids = random_ids(number)
            own = [e for e in detections_around(ids, number) if e["category_id"] == place]
            masks, scores = [e["segmentation"] for e in own], [e["score"] for e in own]
            seen.append(cityscapes_metric.look(ids, label, masks, scores))
        own_curves = cityscapes_metric.curves(seen)
        rows.append([np.nan] * 10 if own_curves is None else [c.area() for c in own_curves])
    return np.array(rows)


def main() -> int:
    """Compare on several sets of scenes."""
    worst = 0.0
    for first, images in ((0, 1), (10, 3), (20, 12), (40, 30)):
        with tempfile.TemporaryDirectory() as folder:
            theirs = package_aps(Path(folder), images, first)
        ours = our_aps(images, first)
        assert np.array_equal(np.isnan(theirs), np.isnan(ours))
        difference = float(np.nanmax(np.abs(theirs - ours)))
        worst = max(worst, difference)
        print(
            f"{images} images from {first}: AP {100 * np.nanmean(theirs):.3f}, "
            f"AP50 {100 * np.nanmean(theirs[:, 0]):.3f}; largest difference {difference:.1e}"
        )
    return int(worst > 1e-9)


if __name__ == "__main__":
    sys.exit(main())
