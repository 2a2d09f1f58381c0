"""Measure COCO evaluation: faster-coco-eval beside pycocotools, on results of COCO val's size.

examples:
  python benchmarks/speed/evaluation.py
  python benchmarks/speed/evaluation.py --kind segm --images 1000 --json

Objects and detections are drawn: 7.4 objects an image, as in val2017, and 100 detections an image,
some near the objects and the rest anywhere. Each evaluator is handed the same lists in memory and
does all of its work, from indexing to the last number, in a process that has imported it. Their
numbers are compared to the last bit.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from convert.errors import Parser, UserError, run_script
from convert.files import environment
from convert.progress import progress

GOAL = 5.0  # times as fast as pycocotools
KINDS = ("bbox", "segm")
WIDTH, HEIGHT, CLASSES = 640, 480, 80
OBJECTS_AN_IMAGE = 36781 / 5000  # of COCO val2017
CROWDS = 0.012  # share of the objects


def main(argv: list[str] | None = None) -> int:
    """Measure and print; a goal that is missed is a number and no failure."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--kind", choices=KINDS, default="bbox", help="boxes (default) or masks")
    add("--images", type=int, default=5000, metavar="N", help="default: 5000, as val2017")
    add("--detections", type=int, default=100, metavar="N", help="an image; default: 100")
    add("--runs", type=int, default=3, metavar="N", help="default: 3; the median")
    add("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(argv)
    if min(args.runs, args.images, args.detections) < 1:
        raise UserError("--runs, --images, --detections: want 1 or more")
    truth, found = draw_sets(args.kind, args.images, args.detections)
    runs = progress(range(args.runs), args.runs, "evaluating", "run", quiet=args.quiet)
    measured = [measure(truth, found, args.kind) for _ in runs]
    record = {
        "kind": args.kind,
        "images": args.images,
        "detections": len(found),
        "runs": args.runs,
        "environment": environment(),
    } | summary(measured)
    print(json.dumps(record) if args.json else table(record))
    return 0


def draw_sets(kind: str, images: int, detections: int) -> tuple[dict[str, Any], list[Any]]:
    """Return a COCO file's content and as many results as a detector would give for it."""
    import numpy as np

    rng = np.random.default_rng(0)
    listing = [{"id": i + 1, "width": WIDTH, "height": HEIGHT} for i in range(images)]
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image in listing:
        count = int(rng.poisson(OBJECTS_AN_IMAGE))
        boxes, classes = _boxes(rng, count), rng.integers(1, CLASSES + 1, count)
        annotations += [
            {
                "id": len(annotations) + place + 1,
                "image_id": image["id"],
                "category_id": int(classes[place]),
                "bbox": boxes[place].tolist(),
                "area": float(boxes[place][2] * boxes[place][3]),
                "iscrowd": int(rng.random() < CROWDS),
            }
            | _mask(kind, boxes[place])
            for place in range(count)
        ]
        near = rng.integers(0, count, detections // 2) if count else np.zeros(0, int)
        moved = boxes[near] * rng.normal(1, 0.08, (len(near), 4))
        anywhere = _boxes(rng, detections - len(near))
        guesses = rng.integers(1, CLASSES + 1, len(anywhere))
        scores = [*rng.beta(2, 2, len(near)), *rng.beta(1, 12, len(anywhere))]
        found += [
            {
                "image_id": image["id"],
                "category_id": int(category),
                "score": float(np.float32(score)),
                "bbox": np.float32(box).astype(float).tolist(),
            }
            | _mask(kind, box)
            for box, category, score in zip(
                np.concatenate([moved, anywhere]),
                [*classes[near], *guesses],
                scores,
                strict=True,
            )
        ]
    names = [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)]
    return {"images": listing, "annotations": annotations, "categories": names}, found


def _boxes(rng: Any, count: int) -> Any:
    """Draw (count, 4) boxes x, y, width, height of all sizes."""
    import numpy as np

    sides = np.exp(rng.uniform(np.log(12), np.log(300), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - sides)
    return np.concatenate([corners, sides], axis=1)


def _mask(kind: str, box: Any) -> dict[str, Any]:
    """Return an ellipse in a box as run lengths, where masks are measured."""
    if kind != "segm":
        return {}
    import numpy as np
    from pycocotools import mask as rle

    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    x, y, w, h = box
    outline = np.column_stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))])
    encoded = rle.frPyObjects([outline.clip(0).ravel().tolist()], HEIGHT, WIDTH)[0]
    return {"segmentation": {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}}


def measure(truth: dict[str, Any], found: list[Any], kind: str) -> dict[str, Any]:
    """Evaluate with each and return seconds, and whether every number is equal."""
    import numpy as np

    from transfer.detection import coco_metric

    coco_metric.choose(coco_metric.FAST)  # says how to install it
    seconds, results = {}, []
    for evaluator in (coco_metric.RECORD, coco_metric.FAST):
        started, cpu = time.perf_counter(), time.process_time()
        results.append(coco_metric.measure(truth, found, kind, evaluator))
        seconds[f"{evaluator}_s"] = time.perf_counter() - started
        seconds[f"{evaluator}_cpu_s"] = time.process_time() - cpu
    one, other = results
    parts = ("stats", "precision", "recall")
    equal = all(np.array_equal(getattr(one, part), getattr(other, part)) for part in parts)
    return seconds | {"equal": equal, "AP": one.percent(kind)["AP"]}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians, and how many times as fast the fast one is."""
    medians = {k: statistics.median(run[k] for run in runs) for k in runs[0] if k != "equal"}
    ratios = {
        f"times{part}": medians[f"pycocotools{part}_s"] / medians[f"faster-coco-eval{part}_s"]
        for part in ("", "_cpu")
    }
    return medians | ratios | {"equal": all(run["equal"] for run in runs), "all": runs}


def table(record: dict[str, Any]) -> str:
    """Say the numbers in lines for a terminal."""
    equal = "equal to the last bit" if record["equal"] else "NOT EQUAL"
    rows = [
        (name, record[f"{name}_s"], record[f"{name}_cpu_s"])
        for name in ("pycocotools", "faster-coco-eval")
    ]
    return "\n".join(
        [
            f"{record['kind']}, {record['images']} images, {record['detections']} detections, "
            f"median of {record['runs']} runs, AP {record['AP']:.2f}: {equal}",
            f"{'':20}{'s':>9}{'CPU s':>9}",
            *(f"{name:20}{wall:9.2f}{cpu:9.2f}" for name, wall, cpu in rows),
            f"{'times as fast':20}{record['times']:9.2f}{record['times_cpu']:9.2f}  (goal {GOAL})",
        ]
    )


if __name__ == "__main__":
    run_script(main)
