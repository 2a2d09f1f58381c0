"""The registry of results: every `results.json` below some folders, whoever made it and when.

A record that is damaged, or of a newer version than this code, is named and left out; it never
stops the page. Older versions stay readable: version 1 had no `recipe`.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.settings import PIXEL_KEYS
from transfer.results import FILE_NAME, SCHEMA

RANDOM = "random init"
INITS = ("moco", "supervised", "random")  # what a recipe's name may end with
ALIASES = {  # the reference's own names of recipes
    "pascal_voc_R_50_C4_24k": "voc_R50_C4_24k",
    "coco_R_50_C4_2x": "coco_R50_C4_2x",
}
LEFT_OUT = ("replaced",)  # where a suite puts what it has run again


@dataclass(frozen=True)
class Record:
    """One evaluation.

    Attributes:
        file: where it was read.
        task: `coco`, `linear`. metrics: name -> mean over its seeds, percent.
        per_seed: seed -> metrics.
        recipe: the recipe without what it starts from, `voc_R50_C4_24k`; of version 1: the task.
        changed: keys of the protocol that the command line changed -> (recipe's value, this run's).
        protocol: everything that decides the number, flat; the data's listings among it.
        start: what was evaluated: a checkpoint's facts.
        content: the record itself.
        overridden: settings that a suite's command line overrode, here or in what this was made of.
    """

    file: Path
    task: str
    metrics: Mapping[str, float]
    per_seed: Mapping[int, Mapping[str, float]]
    recipe: str
    changed: Mapping[str, Any]
    protocol: Mapping[str, Any]
    start: Mapping[str, Any]
    content: Mapping[str, Any]
    overridden: Mapping[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """A hash of the protocol without what belongs to the checkpoint, its pixels and stride.

        Two numbers stand in one column only if these are equal.
        """
        kept = {key: value for key, value in self.protocol.items() if key not in PIXEL_KEYS}
        canonical = json.dumps(kept, sort_keys=True, default=str)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def row(self) -> str:
        """What its table row is known by: the checkpoint's hash, or random initialisation."""
        if self.method == RANDOM:
            return RANDOM
        return str(self.start.get("sha256") or self.start.get("name") or "unknown")

    @property
    def method(self) -> str:
        """What made the checkpoint, `MoCo v2`; what follows a comma there is told elsewhere."""
        return str(self.start.get("method") or "unknown").split(",")[0]

    @property
    def test_images(self) -> int | None:
        """How many images the number is over."""
        data = self.content.get("data") or {}
        part = data.get("test") or data.get("val") or {}
        count = part.get("images") if isinstance(part, dict) else None
        return count if isinstance(count, int) else None


@dataclass
class Registry:
    """What was found: records, and a line for each file that was left out."""

    records: list[Record] = field(default_factory=list)
    holes: list[str] = field(default_factory=list)


def read_registry(folders: Iterable[Path]) -> Registry:
    """Read every record below some folders, in the order of their paths."""
    registry = Registry()
    for folder in folders:
        for file in sorted(_record_files(folder)):
            try:
                registry.records.append(read_record(file))
            except ValueError as error:
                registry.holes.append(f"left out: {file.relative_to(folder)}: {error}")
    return registry


def read_record(file: Path) -> Record:
    """Read one record.

    Raises:
        ValueError: it cannot be read, is of a newer version, or its numbers are none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        raise ValueError("is no record of an evaluation")
    version = content.get("schema")
    if not isinstance(version, int) or version > SCHEMA:
        raise ValueError(f"has version {version}, this code reads up to {SCHEMA}; update it")
    metrics = _numbers(content["metrics"])
    if not metrics:
        raise ValueError("holds no number")
    per_seed = [_numbers(seed) for seed in content.get("per_seed") or [metrics]]
    first = _first_seed(content)
    recipe = content.get("recipe") or {}
    task = str(content.get("task") or file.parent.name)
    return Record(
        file=file,
        task=task,
        metrics=metrics,
        per_seed={first + place: seed for place, seed in enumerate(per_seed)},
        recipe=recipe_stem(str(recipe.get("name") or task)),
        changed=recipe.get("changed") or {},
        protocol=dict(_protocol(content)),
        start=content.get("checkpoint") or {},
        content=content,
    )


def pooled(records: Iterable[Record]) -> dict[int, dict[str, float]]:
    """Put the seeds of records together that are one row under one protocol.

    Returns:
        Seed -> metrics; of a seed that was run twice the later record's.
    """
    seeds: dict[int, dict[str, float]] = {}
    for record in records:
        for seed, metrics in record.per_seed.items():
            seeds[seed] = seeds.get(seed, {}) | dict(metrics)
    return dict(sorted(seeds.items()))


def recipe_stem(name: str) -> str:
    """Return a recipe's name without what it starts from: `voc_R50_C4_24k_moco` without `_moco`."""
    head, _, last = name.rpartition("_")
    stem = head if head and last in INITS else name
    return ALIASES.get(stem, stem)


def differing_keys(records: Iterable[Record]) -> dict[str, list[Any]]:
    """Return the keys of the protocols that some records differ in, with every value."""
    protocols = [record.protocol for record in records]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    found = {}
    for key in keys:
        values = [protocol.get(key) for protocol in protocols]
        distinct = list({json.dumps(value, default=str): value for value in values}.values())
        if len(distinct) > 1 and key not in PIXEL_KEYS:
            found[key] = distinct
    return found


def _record_files(folder: Path) -> Iterator[Path]:
    for file in folder.rglob(FILE_NAME):
        if not set(LEFT_OUT) & set(file.relative_to(folder).parts):
            yield file


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        raise ValueError(f"has {values!r} where numbers belong")
    for key, value in values.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key} is {value!r}, which is no number")
    return {str(key): float(value) for key, value in values.items()}


def _first_seed(content: Mapping[str, Any]) -> int:
    config = content.get("config") or {}
    seed = config.get("seed", config.get("SEED", 0))
    return seed if isinstance(seed, int) else 0


def _protocol(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what decides the number; a version without it has its hash alone."""
    yield from (content.get("protocol") or {"fingerprint": content.get("fingerprint")}).items()
    for part, described in (content.get("data") or {}).items():
        if isinstance(described, dict):
            yield f"data.{part}", described.get("listing") or described.get("listing_hash")
