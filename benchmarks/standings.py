"""Records side by side: a row a checkpoint, a column a number under one protocol.

Two records stand in one column only if their protocols are equal up to what belongs to the
checkpoint (pixels, stride). Where they are not, the column is split, and the keys that differ are
named. A number stands beside a printed one only if its recipe was followed unchanged and it is over
as many test images.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from benchmarks.literature import Printed, counterpart, printed_rows
from benchmarks.records import RANDOM, Record, differing_keys, pooled
from benchmarks.trials import Comparison, Spread, compare, summarise

HEADLINES = (
    "coco/box_AP",
    "coco/keypoint_AP",
    "voc07/AP50",
    "linear/top1",
    "knn20/top1",
    "voc07_svm/mAP",
)
# Of several changed keys the one that a reader should hear of first.
LENGTHS = ("SOLVER.MAX_ITER", "iterations", "epochs")


@dataclass(frozen=True)
class Column:
    """One number under one protocol.

    Attributes:
        recipe: `voc_R50_C4_24k`. metric: `voc07/AP50`.
        group: hash of the protocol.
        mark: a letter where the recipe was run under several protocols, else empty.
    """

    recipe: str
    metric: str
    group: str
    mark: str = ""

    @property
    def title(self) -> str:
        """The recipe, with the letter of its protocol."""
        return f"{self.recipe} [{self.mark}]" if self.mark else self.recipe


@dataclass
class Cell:
    """A measured number.

    Attributes:
        values: seed -> number.
        records: what it was read from.
        printed: what the authors printed for such a start, where the two may stand side by side.
        why_not: why no printed number may stand beside it, though its recipe may have some.
    """

    values: dict[int, float]
    records: list[Record]
    printed: float | None = None
    why_not: str = ""

    @cached_property
    def spread(self) -> Spread:
        """Mean, deviation and interval over the seeds."""
        return summarise(self.values)

    @property
    def gap(self) -> float | None:
        """Ours minus printed, in points."""
        return None if self.printed is None else self.spread.mean - self.printed


@dataclass
class Standing:
    """One checkpoint's row."""

    key: str
    label: str
    method: str
    cells: dict[Column, Cell] = field(default_factory=dict)


@dataclass
class Standings:
    """The whole table.

    Attributes:
        columns: by recipe, then in the order of the records.
        rows: checkpoints in the order of the records, random initialisation last.
        printed: the papers' rows for these recipes, or beside them as a reminder.
        mixed: a sentence for each recipe that was run under several protocols.
    """

    columns: list[Column]
    rows: list[Standing]
    printed: list[Printed]
    mixed: list[str]

    @property
    def recipes(self) -> list[str]:
        """The recipes, with the letters of their protocols, in the order of the columns."""
        return list(dict.fromkeys(column.title for column in self.columns))

    def headlines(self) -> list[Column]:
        """Return one column a recipe: the number that papers quote, else the first."""
        found = []
        for title in self.recipes:
            own = [column for column in self.columns if column.title == title]
            found.append(next((c for c in own if c.metric in HEADLINES), own[0]))
        return found

    def against(self, baseline: str = RANDOM) -> dict[tuple[str, Column], Comparison]:
        """Compare each row with a baseline's, column by column."""
        base = next((row for row in self.rows if row.key == baseline), None)
        if base is None:
            return {}
        return {
            (row.key, column): compare(cell.values, base.cells[column].values)
            for row in self.rows
            if row is not base
            for column, cell in row.cells.items()
            if column in base.cells
        }


def stand(records: Iterable[Record], labels: Mapping[str, str] | None = None) -> Standings:
    """Lay records out as a table.

    Args:
        records: of any checkpoints, recipes and protocols.
        labels: names of rows by their keys; default: what the checkpoint is.
    """
    kept = list(records)
    groups: dict[str, dict[str, list[Record]]] = {}
    for record in kept:
        groups.setdefault(record.recipe, {}).setdefault(record.group, []).append(record)
    columns, mixed = [], []
    for recipe, by_group in groups.items():
        marks = _marks(len(by_group))
        for mark, (group, own) in zip(marks, by_group.items(), strict=True):
            metrics = dict.fromkeys(metric for record in own for metric in record.metrics)
            columns += [Column(recipe, metric, group, mark) for metric in metrics]
        if len(by_group) > 1:
            mixed.append(_mixed(recipe, marks, list(by_group.values())))
    rows = _rows(kept, columns, labels or {})
    return Standings(columns, rows, _printed(columns), mixed)


def _rows(
    records: list[Record], columns: list[Column], labels: Mapping[str, str]
) -> list[Standing]:
    rows: dict[str, Standing] = {}
    evaluations: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record.row not in rows:
            label = labels.get(record.row) or _label(record)
            rows[record.row] = Standing(record.row, label, record.method)
        evaluations.setdefault((record.row, record.recipe, record.group), []).append(record)
    places = {(column.recipe, column.group, column.metric): column for column in columns}
    for (row, recipe, group), own in evaluations.items():
        seeds = pooled(own)
        for metric in dict.fromkeys(metric for record in own for metric in record.metrics):
            column = places[recipe, group, metric]
            values = {seed: found[metric] for seed, found in seeds.items() if metric in found}
            cell = Cell(values, [record for record in own if metric in record.metrics])
            rows[row].cells[column] = cell
            _put_beside(column, cell)
    return sorted(rows.values(), key=lambda row: row.key == RANDOM)


def _put_beside(column: Column, cell: Cell) -> None:
    """Find what was printed for such a number, or say why nothing may stand beside it."""
    record = cell.records[-1]
    start = record.start
    epoch = start.get("epoch")
    row = counterpart(
        column.recipe,
        column.metric,
        record.method,
        epoch if isinstance(epoch, int) else None,
        str(start.get("arch") or "resnet50"),
    )
    same_recipe = [row for row in printed_rows() if row.table.recipe == column.recipe]
    if same_recipe:
        cell.why_not = reduced(record, same_recipe[0].table.test_images)
    cell.why_not = cell.why_not or overridden(cell.records)
    if row is not None and not cell.why_not:
        cell.printed = row.numbers[column.metric]


def reduced(record: Record, test_images: int | None) -> str:
    """Say what keeps a record from standing beside printed numbers; empty if nothing does."""
    if record.changed:
        first = next((key for key in LENGTHS if key in record.changed), next(iter(record.changed)))
        own, ours = record.changed[first]
        more = f" and {len(record.changed) - 1} more" if len(record.changed) > 1 else ""
        return f"changed: {first} is {ours}, the recipe's is {own}{more}"
    if test_images is not None and record.test_images != test_images:
        return f"other data: {record.test_images} test images, the published set has {test_images}"
    return ""


def overridden(records: Iterable[Record]) -> str:
    """Say which settings a suite's command line overrode; empty if none."""
    settings = dict.fromkeys(f"{k} {v}" for record in records for k, v in record.overridden.items())
    shown = list(settings)[:2]
    more = f" and {len(settings) - 2} more" if len(settings) > 2 else ""
    return f"overridden: {', '.join(shown)}{more}" if settings else ""


def _label(record: Record) -> str:
    start = record.start
    if record.row == RANDOM:
        return RANDOM
    epoch = f", {start['epoch']} ep" if isinstance(start.get("epoch"), int) else ""
    name = str(start.get("name") or "").removesuffix(".tar").removesuffix(".pth")
    return f"{record.method}{epoch} ({name})" if name else f"{record.method}{epoch}"


def _marks(count: int) -> list[str]:
    if count == 1:
        return [""]
    return [chr(ord("A") + place) if place < 26 else str(place) for place in range(count)]


def _mixed(recipe: str, marks: list[str], groups: list[list[Record]]) -> str:
    keys = differing_keys([group[0] for group in groups])
    shown = [f"{key} ({' or '.join(map(_brief, values))})" for key, values in keys.items()]
    rest = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return (
        f"{recipe} was run under {len(groups)} protocols, {', '.join(marks)}, which must not be "
        f"compared; they differ in {', '.join(shown[:4])}{rest}"
    )


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _printed(columns: list[Column]) -> list[Printed]:
    recipes = {column.recipe for column in columns}
    return [
        row
        for row in printed_rows()
        if row.table.recipe in recipes or recipes & set(row.table.beside)
    ]
