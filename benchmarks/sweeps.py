"""Sweeps that records carry beside their numbers: learning rates, images a class, labels.

A curve's name is its checkpoint's, as the tables have it, with what else tells it apart.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.records import Record

GRID = "grid.json"  # as transfer/classification/grid.py calls it, whose torch a page does not need
Curve = list[tuple[float, float]]
_LOW_SHOT = re.compile(r"(?P<task>\w+)_k(?P<k>\d+)/(?P<name>mAP|top1)")


def sensitivity(records: Mapping[str, Iterable[Record]]) -> dict[str, Curve]:
    """Return the held-out top-1 of a linear grid against the learning rate, at the best decay.

    Args:
        records: those of each checkpoint.

    Returns:
        A curve for each checkpoint and feature; of several seeds the first.
    """
    found: dict[str, Curve] = {}
    for label, own in records.items():
        for record in own:
            for source, points in _grid(record.file.parent).items():
                found.setdefault(f"{label}, {source}", points)
    return found


def low_shot(records: Mapping[str, Iterable[Record]]) -> dict[str, Curve]:
    """Return each checkpoint's number against images a class, `voc07_svm_k4/mAP`."""
    found: dict[str, dict[float, float]] = {}
    for label, own in records.items():
        for record in own:
            for metric, value in record.metrics.items():
                if part := _LOW_SHOT.fullmatch(metric):
                    points = found.setdefault(f"{label}, {part['task']} {part['name']}", {})
                    points[float(part["k"])] = value
    return _several(found)


def label_fractions(records: Mapping[str, Iterable[Record]]) -> dict[str, Curve]:
    """Return each checkpoint's number against the share of labels or training images, percent."""
    found: dict[str, dict[float, float]] = {}
    for label, own in records.items():
        for record in own:
            share = _share(record.protocol)
            if share is not None:
                metric, value = next(iter(record.metrics.items()))
                found.setdefault(f"{label}, {metric}", {})[share] = value
    return _several(found)


def _several(found: Mapping[str, Mapping[float, float]]) -> dict[str, Curve]:
    return {name: sorted(points.items()) for name, points in found.items() if len(points) > 1}


def _share(protocol: Mapping[str, Any]) -> float | None:
    """Read which share a protocol learns from; None where it is not known."""
    labels, fraction = protocol.get("labels"), protocol.get("MOCO.TRAIN_FRACTION")
    if labels == "all":
        return 100.0
    if isinstance(labels, str) and re.fullmatch(r"\d+(\.\d+)?%", labels):
        return float(labels[:-1])
    return 100.0 * fraction if isinstance(fraction, int | float) else None


def _grid(folder: Path) -> dict[str, Curve]:
    """Read a grid beside its record; a damaged one is none."""
    for file in (folder / GRID, folder / "seed_0" / GRID):
        try:
            outcomes = json.loads(file.read_text(encoding="utf-8"))["outcomes"]
            points = [
                (str(o["source"]), float(o["lr"]), float(o["held_out_top1"])) for o in outcomes
            ]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        best: dict[str, dict[float, float]] = {}
        for source, lr, top1 in points:
            own = best.setdefault(source, {})
            own[lr] = max(top1, own.get(lr, top1))
        return {source: sorted(own.items()) for source, own in sorted(best.items())}
    return {}
