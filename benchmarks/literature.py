"""The papers' numbers, `published/*.yaml`, as rows of the same table as ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PUBLISHED = Path(__file__).resolve().parent / "published"
SETTINGS = ("K", "m", "tau", "batch", "norm")  # what sets a row apart from its method's defaults


@dataclass(frozen=True)
class Table:
    """A printed table: one protocol.

    Attributes:
        name: `Table 2b`. cite: the paper.
        recipe: the recipe of ours that follows its protocol; empty where we have none.
        beside: recipes on whose pages its rows stand as a reminder, never as an equal.
        protocol: in words.
        test_images: how many its numbers are over; None where that was not stated.
        trials: runs that its numbers are the mean of.
        rerun: who measured it, where that was not the paper itself.
    """

    name: str
    cite: str
    recipe: str
    beside: tuple[str, ...]
    protocol: str
    test_images: int | None
    trials: int
    rerun: str


@dataclass(frozen=True)
class Printed:
    """One row of a printed table.

    Attributes:
        label: method and what sets the row apart.
        method, epochs, plain: by which a row of ours finds its counterpart; `plain` is a ResNet-50
            on ImageNet-1k with its method's own settings.
        numbers: metric -> percent.
        mark: what a reader has to know beside the number.
    """

    table: Table
    label: str
    method: str
    epochs: int | None
    plain: bool
    numbers: Mapping[str, float]
    mark: str = ""
    trials: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@cache
def printed_rows(folder: Path = PUBLISHED) -> tuple[Printed, ...]:
    """Read every published file."""
    rows = []
    for file in sorted(folder.glob("*.yaml")):
        paper = yaml.safe_load(file.read_text(encoding="utf-8"))
        for content in paper["tables"]:
            table = _table(content, paper["cite"])
            rows += [_row(table, content["metrics"], entry) for entry in content["rows"]]
    return tuple(rows)


def counterpart(
    recipe: str, metric: str, method: str, epochs: int | None, arch: str
) -> Printed | None:
    """Find what the authors printed for a start like this one, under the same recipe.

    Args:
        recipe: of our number, without what it starts from.
        metric: whose number is wanted.
        method: `MoCo v2`, `random init`, `supervised`.
        epochs: of pretraining; None where it is unknown or means nothing.
        arch: torchvision's name; only a ResNet-50 has a counterpart here.
    """
    if arch != "resnet50":
        return None
    for row in printed_rows():
        same_start = row.plain and row.method == method and row.epochs in (None, epochs)
        same_number = row.table.recipe == recipe and metric in row.numbers
        if same_start and same_number and not row.table.rerun:
            return row
    return None


def _table(content: Mapping[str, Any], cite: str) -> Table:
    return Table(
        name=content["table"],
        cite=cite,
        recipe=content.get("recipe", ""),
        beside=tuple(content.get("beside", ())),
        protocol=content["protocol"],
        test_images=content.get("test_images"),
        trials=content.get("trials", 1),
        rerun=content.get("rerun", ""),
    )


def _row(table: Table, metrics: list[str], entry: Mapping[str, Any]) -> Printed:
    values = zip(metrics, entry["values"], strict=True)
    data, epochs = entry.get("pretrained_on", ""), entry.get("epochs")
    apart = [f"{key} {entry[key]}" for key in SETTINGS if key in entry]
    parts = [
        f"{entry['method']}{' ' + entry['arch'] if 'arch' in entry else ''}",
        data,
        f"{epochs} ep" if epochs else "",
        *apart,
    ]
    label = ", ".join(filter(None, parts))
    return Printed(
        table=table,
        label=f"{label}, {table.rerun}" if table.rerun else label,
        method=entry["method"],
        epochs=epochs,
        plain=not apart and "arch" not in entry and data in ("", "IN-1M"),
        numbers={metric: float(value) for metric, value in values if value is not None},
        mark=entry.get("mark", ""),
        trials={metrics[0]: tuple(entry["trials"])} if "trials" in entry else {},
    )
