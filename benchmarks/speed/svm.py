"""Measure the SVMs of all classes on all cores beside a plain scikit-learn loop.

examples:
  python benchmarks/speed/svm.py
  python benchmarks/speed/svm.py --images 5011 --classes 20 --runs 1

Features are drawn: a centre a class and noise, of unit length, as many as VOC07's trainval has by
default. Both sides train the same machines with the same costs; each run times one after the other.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from convert.errors import Parser, UserError, run_script
from convert.files import environment

GOAL = 0.8  # of the cores' number: how many times faster than the loop


def main(argv: list[str] | None = None) -> int:
    """Measure and print; a goal that is missed is a number and no failure."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--images", type=int, default=2000, metavar="N", help="default: 2000")
    add("--width", type=int, default=2048, metavar="D", help="default: 2048")
    add("--classes", type=int, default=20, metavar="C", help="default: 20")
    add("--runs", type=int, default=3, metavar="N", help="default: 3; the median ratio")
    add("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(argv)
    if min(args.images // 6, args.width, args.classes - 1, args.runs) < 1:
        raise UserError("--images wants 6 or more, --classes 2, --width and --runs 1")
    runs = [measure(args.images, args.width, args.classes) for _ in range(args.runs)]
    record = {
        "images": args.images,
        "width": args.width,
        "classes": args.classes,
        "faster": statistics.median(run["loop_s"] / run["ours_s"] for run in runs),
        "goal": GOAL * cores(),
        "cores": cores(),
        "load": os.getloadavg()[0],
        "runs": runs,
        "environment": environment(),
    }
    print(json.dumps(record) if args.json else table(record))
    return 0


def measure(images: int, width: int, classes: int) -> dict[str, float]:
    """Time both sides once, in seconds; their choices and scores must be the same."""
    import joblib
    import numpy as np

    from transfer.classification.support_vectors import (
        Machine,
        in_processes,
        train_all,
        unit_length,
    )

    x, tags, test = drawn(images, width, classes)
    costs, machine = (0.001, 0.01, 0.1, 1.0), Machine()
    # The processes' start, imports included, is paid once a session and not measured.
    list(in_processes([joblib.delayed(unit_length)(x[:1]) for _ in range(4 * cores())], -1))
    started = time.perf_counter()
    ours = train_all(x, tags, test, costs, 3, machine)
    between = time.perf_counter()
    scores = plain_loop(x, tags, test, costs)
    ended = time.perf_counter()
    if not np.array_equal(ours.scores, scores):
        raise RuntimeError("the two sides trained different machines")
    return {"ours_s": between - started, "loop_s": ended - between}


def plain_loop(x: Any, tags: Any, test: Any, costs: tuple[float, ...]) -> Any:
    """Train the same machines as one does with scikit-learn alone, one after another."""
    import numpy as np
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import LinearSVC

    columns = []
    for y in tags.T:
        tried = [
            LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0)
            for cost in costs
        ]
        found = [
            cross_val_score(one, x, y, cv=3, scoring="average_precision").mean() for one in tried
        ]
        columns.append(tried[int(np.argmax(found))].fit(x, y).decision_function(test))
    return np.stack(columns, axis=1)


def drawn(images: int, width: int, classes: int) -> tuple[Any, Any, Any]:
    """Draw features (N, D), tags (N, C) and test features (N / 5, D)."""
    import numpy as np

    from transfer.classification.support_vectors import unit_length
    from transfer.classification.tags import ABSENT, PRESENT

    draw = np.random.default_rng(0)
    centres = draw.normal(size=(classes, width))
    labels = np.arange(images + max(images // 5, 1)) % classes
    # Pooled features are not negative.
    values = np.maximum(centres[labels] + 6 * draw.normal(size=(len(labels), width)), 0)
    tags = np.where(labels[:, None] == np.arange(classes), PRESENT, ABSENT)
    x = unit_length(values)
    return x[:images], tags[:images], x[images:]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def table(record: dict[str, Any]) -> str:
    """Say the numbers in lines for a terminal."""
    shape = f"{record['images']} x {record['width']}, {record['classes']} classes"
    times = ", ".join(f"{r['ours_s']:.1f} / {r['loop_s']:.1f}" for r in record["runs"])
    hardware, versions = record["environment"]["hardware"], record["environment"]["versions"]
    return "\n".join(
        [
            f"SVMs of {shape}: {record['faster']:.2f} times the plain loop's speed, goal "
            f"{record['goal']:.2f} ({GOAL} x {record['cores']} cores)",
            f"seconds, ours / the loop's, each run: {times}",
            f"on {hardware['cpu']}, load {record['load']:.1f}, scikit-learn "
            f"{versions['scikit-learn']}, commit {record['environment']['commit']}",
        ]
    )


if __name__ == "__main__":
    run_script(main)
