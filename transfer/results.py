"""One record per evaluation, `results.json`: what was measured, on what, with what.

Keys of the record:
    schema: version of this list
    task: the evaluation's name, `coco`, `voc07`, `linear`, `knn`
    metrics: flat, mean over seeds, percent where the papers use percent: {"knn20/top1": 71.2}
    spread: sample standard deviation over seeds of the same keys; empty with one seed
    per_seed: the metrics of each seed
    details: what lies beneath the metrics, AP of each class and the like; may be empty
    fingerprint: hash of the protocol; two numbers compare only if theirs are equal
    protocol: everything that changes the number, apart from checkpoint, data and seed
    recipe: the recipe's name, and the keys of the protocol that the command line changed, each with
        the recipe's value and the run's: {"name": "voc_R50_C4_24k_moco", "changed": {}}
    config: the resolved config; checkpoint, data: names, hashes, counts
    environment: versions, hardware, commit; seconds; command
"""

import hashlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.files import environment, write_json

SCHEMA = 2  # version 1 had no recipe
FILE_NAME = "results.json"


def fingerprint(protocol: Mapping[str, Any]) -> str:
    """Hash a protocol to twelve hexadecimal digits; the order of its keys does not matter."""
    canonical = json.dumps(protocol, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def write_results(
    output_dir: Path,
    *,
    task: str,
    per_seed: Sequence[Mapping[str, float]],
    protocol: Mapping[str, Any],
    config: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    data: Mapping[str, Any],
    started: float,
    recipe: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
    keep: bool = True,
) -> dict[str, Any]:
    """Write `results.json` into an output folder and return the record.

    Args:
        output_dir: where.
        task: the evaluation's name.
        per_seed: the metrics of each seed, all with the same keys.
        protocol: everything that changes the number, apart from checkpoint, data and seed.
        config: the resolved config.
        checkpoint: name, sha256 and facts of what was evaluated.
        data: name, listing hash and counts.
        started: `time.time()` when the evaluation began.
        recipe: what `name_recipe` says.
        details: what lies beneath the metrics.
        keep: write the file; of several processes one does.
    """
    keys = list(per_seed[0])
    columns = {key: [float(seed[key]) for seed in per_seed] for key in keys}
    several = len(per_seed) > 1
    record = {
        "schema": SCHEMA,
        "task": task,
        "metrics": {key: statistics.fmean(column) for key, column in columns.items()},
        "spread": {k: statistics.stdev(column) for k, column in columns.items()} if several else {},
        "per_seed": [dict(seed) for seed in per_seed],
        "details": dict(details or {}),
        "fingerprint": fingerprint(protocol),
        "protocol": dict(protocol),
        "recipe": dict(recipe or {}),
        "config": dict(config),
        "checkpoint": dict(checkpoint),
        "data": dict(data),
        "environment": environment(),
        "seconds": round(time.time() - started, 1),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
    }
    if keep:
        write_json(Path(output_dir) / FILE_NAME, record)
    return record


def name_recipe(name: str, own: Mapping[str, Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Name the recipe of a run, and what the run changed of its protocol.

    Args:
        name: the recipe file's stem.
        own: the protocol that the recipe alone would follow.
        protocol: the one that this run follows.
    """
    keys = dict.fromkeys([*own, *protocol])
    changed = {k: [own.get(k), protocol.get(k)] for k in keys if own.get(k) != protocol.get(k)}
    return {"name": name, "changed": changed}


def format_metrics(record: Mapping[str, Any]) -> str:
    """Say a record's numbers in one line: `knn20/top1 71.20 +- 0.31`."""
    spread = record["spread"]
    return ", ".join(
        f"{key} {value:.2f}" + (f" +- {spread[key]:.2f}" if key in spread else "")
        for key, value in record["metrics"].items()
    )
