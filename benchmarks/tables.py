"""Standings as tables of a document: ours, the papers' below, and what the seeds can say."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from benchmarks import plots, sweeps
from benchmarks.document import Block, Cell, Folded, Line, Mark, Picture, Table, Text
from benchmarks.literature import Printed
from benchmarks.records import RANDOM, Record
from benchmarks.standings import Cell as Number
from benchmarks.standings import Column, Standing, Standings
from benchmarks.titles import metric_name, recipe_title

WIDE = 16  # columns of numbers that one table takes; beyond it one a recipe, and an overview
NOTHING = "–"
OWN = "recipe's own"


def table_blocks(standings: Standings) -> list[Block]:
    """Write the whole table, cut where it is too wide, and what has to be said under it."""
    if not standings.columns:
        return [Text("not run: no measurement ended well, so there is no number to show", "hole")]
    blocks: list[Block] = [Text(sentence, "hole") for sentence in standings.mixed]
    if len(standings.columns) <= WIDE:
        blocks.append(_table(standings, standings.columns))
    else:
        blocks.append(_table(standings, standings.headlines()))
        for title in standings.recipes:
            own = [column for column in standings.columns if column.title == title]
            blocks.append(_table(standings, own))
    blocks.append(Text(legend(standings), "note"))
    return [*blocks, *_remarks(standings), *_more_printed(standings), *_sources(standings)]


def seeds_blocks(standings: Standings) -> list[Block]:
    """Say of each headline number what its seeds can tell: interval, test, smallest difference."""
    against = standings.against()
    lines = []
    for column in standings.headlines():
        for row in standings.rows:
            if column in row.cells:
                lines.append(_seeds_line(row, column, standings, against))
    if not lines:
        return []
    head = ["number", "seeds", "mean", "sd", "95% interval", "minus random", "p", "smallest"]
    return [
        Table(head, lines, numbers=True, sortable=True),
        Text(
            "95% interval: of the mean, by Student's t. p: of no difference from random "
            "initialisation, by a paired t test where both have the same seeds, else by Welch's. "
            "smallest: the smallest true difference that so many seeds would find in four of five "
            "tries at the 5% level. A run below half of the median of its siblings has diverged: "
            "it is counted, and named.",
            "note",
        ),
    ]


def command_blocks(records: Iterable[Record]) -> list[Block]:
    """Write the exact command, protocol and hardware of every record."""
    lines = []
    for record in records:
        content = record.content
        environment = content.get("environment") or {}
        hardware = environment.get("hardware") or {}
        where = ", ".join(hardware.get("gpus") or []) or str(hardware.get("cpu") or "unknown")
        lines.append(
            Line(
                [
                    f"{recipe_title(record.recipe)}\n{row_name(record)}",
                    f"`{content.get('fingerprint')}`",
                    _data(record),
                    f"{content.get('seconds') or 0:.0f}",
                    f"{where}, commit {environment.get('commit')}",
                    f"`{content.get('command')}`",
                ]
            )
        )
    head = ["evaluation", "fingerprint", "data", "seconds", "hardware", "command"]
    return [Table(head, lines, sortable=True)] if lines else []


def card_blocks(starts: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """Write one line a checkpoint: what it is, how it was made, what it expects of an image.

    Args:
        starts: name -> a checkpoint's facts, as `convert.facts.Facts.as_dict` has them.
    """
    lines = [
        Line(
            [
                name,
                str(facts.get("method") or "unknown"),
                str(facts.get("arch") or "unknown"),
                "" if facts.get("epoch") is None else str(facts["epoch"]),
                trained(facts.get("training") or {}) or "its file does not say",
                f"`{str(facts.get('sha256') or '')[:12]}`",
                f"{facts.get('channel_order')}, mean {facts.get('mean')}, std {facts.get('std')}",
                "1x1" if facts.get("stride_in_1x1") else "3x3",
            ]
        )
        for name, facts in starts.items()
        if facts.get("method") != RANDOM
    ]
    head = ["checkpoint", "method", "network", "epoch", "pretraining", "sha256", "pixels", "stride"]
    return [Table(head, lines, sortable=True)] if lines else []


def trained(settings: Mapping[str, Any]) -> str:
    """Say a pretraining's settings in a line, by the papers' symbols; what is unknown is left out.

    Args:
        settings: of a checkpoint's `training`, or of a run's `run.json`.
    """
    names = {
        "K": "K = {}",
        "m": "m = {}",
        "tau": "tau = {}",
        "augmentation": "augmentation {}",
        "epochs": "{} epochs planned",
        "batch_size": "batch {}",
        "lr": "lr {}",
        "schedule": "{} schedule",
        "images": "{:,} images",
    }
    return ", ".join(text.format(settings[key]) for key, text in names.items() if key in settings)


def curve_blocks(standings: Standings) -> list[Block]:
    """Draw the curves that records carry: grids of learning rates, low-shot, shares of labels."""
    records: dict[str, list[Record]] = {}
    for row in standings.rows:
        own = {str(r.file): r for cell in row.cells.values() for r in cell.records}
        records[row.label] = list(own.values())
    kinds = (
        (
            sweeps.sensitivity(records),
            ("learning rate", "held-out top-1, percent"),
            "sensitivity",
            "Linear classifiers of a grid, each at its best weight decay, on training images held "
            "out: how much the choice of a learning rate matters for each feature.",
        ),
        (
            sweeps.low_shot(records),
            ("training images a class", "percent"),
            "low_shot",
            "Classifiers of few images a class, mean over draws.",
        ),
        (
            sweeps.label_fractions(records),
            ("share of the labels, percent", "percent"),
            "labels",
            "The same evaluation with a share of the labels; each share may have a recipe, and so "
            "a schedule, of its own.",
        ),
    )
    blocks: list[Block] = []
    for found, (x, y), name, caption in kinds:
        figure = plots.curve_figure(found, x, y, ticks=name != "sensitivity")
        if figure is not None:
            left = len(found) - plots.LINES
            more = f" {left} more are not drawn." if left > 0 else ""
            blocks.append(Picture(figure, f"figures/{name}.svg", caption + more))
    return blocks


def row_name(record: Record) -> str:
    """Name what a record evaluated."""
    return RANDOM if record.row == RANDOM else str(record.start.get("name") or record.method)


def signed(value: float) -> str:
    """Write a difference with its sign; none where it rounds to nothing."""
    text = f"{value:+.1f}"
    return text[1:] if float(text) == 0 else text


def number(cell: Number) -> str:
    """Write a number with its spread: `41.1` over `± 0.3`."""
    spread = cell.spread
    return f"{spread.mean:.1f}" + (f"\n± {spread.sd:.1f}" if spread.sd is not None else "")


def legend(standings: Standings) -> str:
    """Say how to read the table."""
    counts = {c.spread.seeds for row in standings.rows for c in row.cells.values()}
    several = " or ".join(str(count) for count in sorted(counts - {1}))
    spread = f" ± is the sample standard deviation over {several} seeds." if several else ""
    once = " Numbers without ± are single runs: their spread is unknown." if 1 in counts else ""
    gaps = any(c.gap is not None for row in standings.rows for c in row.cells.values())
    gap = (
        " Under a number stands its gap to what the authors printed for such a checkpoint: grey "
        "within two standard deviations of ours, blue above, orange below, plain where ours is "
        "one run."
        if gaps
        else ""
    )
    return f"All numbers are percent; {NOTHING} is not measured or not printed.{spread}{once}{gap}"


def _table(standings: Standings, columns: list[Column]) -> Table:
    titles = list(dict.fromkeys(column.title for column in columns))
    groups = [("", 1)]
    groups += [(recipe_title(title), sum(c.title == title for c in columns)) for title in titles]
    head = ["checkpoint", *(metric_name(column.metric) for column in columns)]
    rows = [row for row in standings.rows if set(row.cells) & set(columns)]
    lines = [Line([row.label, *(_shown(row.cells.get(c)) for c in columns)]) for row in rows]
    lines += _difference(rows, columns)
    whole = {c for row in rows for c, cell in row.cells.items() if not cell.why_not}
    papers = [row for row in standings.printed if row.plain and not row.table.rerun]
    equal, reminders = _printed_lines(papers, columns, whole)
    if equal:
        lines.append(Line(["Printed in the papers, under the same protocol"], "rule"))
    lines += equal
    if reminders:
        rule = (
            "Printed in the papers, not comparable: ImageNet-1k (IN-1M) on 8 GPUs for days, the "
            "full sets at full size"
        )
        lines.append(Line([rule], "rule"))
    lines += reminders
    return Table(head, lines, groups, numbers=True, sortable=True)


def _more_printed(standings: Standings) -> list[Block]:
    """Fold away what was printed of other networks, settings and methods, and measured again."""
    more = [row for row in standings.printed if not row.plain or row.table.rerun]
    blocks: list[Block] = []
    count = 0
    for title in standings.recipes:
        columns = [column for column in standings.columns if column.title == title]
        lines, _ = _printed_lines(more, columns, columns)
        if lines:
            head = ["printed row", *(metric_name(column.metric) for column in columns)]
            groups = [("", 1), (recipe_title(title), len(columns))]
            blocks.append(Table(head, [Line(line.cells) for line in lines], groups, numbers=True))
            count += len(lines)
    return [Folded(f"{count} more printed rows of these recipes", blocks)] if blocks else []


def _difference(rows: list[Standing], columns: list[Column]) -> list[Line]:
    """A line of differences where there is one checkpoint and random initialisation."""
    if len(rows) != 2 or rows[1].key != RANDOM:
        return []
    first, random = (row.cells for row in rows)
    shown = [
        signed(first[c].spread.mean - random[c].spread.mean) if c in first and c in random else ""
        for c in columns
    ]
    return [Line(["difference", *(text or NOTHING for text in shown)], "sum")]


def _shown(cell: Number | None) -> Cell:
    if cell is None:
        return NOTHING
    text, spread = number(cell), cell.spread
    if spread.diverged:
        lost = ", ".join(f"seed {seed}: {value:.1f}" for seed, value in spread.diverged.items())
        without = f"; {spread.mean_without:.1f} without" if spread.mean_without is not None else ""
        count = f"{len(spread.diverged)} of {spread.seeds} diverged"
        return Mark(f"{text}\n{count}", "reduced", f"{lost}{without}")
    if cell.why_not:
        return Mark(f"{text}\nreduced", "reduced", cell.why_not)
    if cell.gap is None or cell.printed is None:
        return text
    return Mark(f"{text}\n{signed(cell.gap)}", _judged(cell), f"printed: {cell.printed:.1f}")


def _judged(cell: Number) -> str:
    if cell.spread.sd is None or cell.gap is None:
        return "plain"
    if abs(cell.gap) <= 2 * cell.spread.sd:
        return "near"
    return "above" if cell.gap > 0 else "below"


def _printed_lines(
    rows: Iterable[Printed], columns: list[Column], whole: Collection[Column]
) -> tuple[list[Line], list[Line]]:
    """One line a label: those of the same protocol, and those that only remind.

    Where every number of ours is a reduced one (its column is not in `whole`), all only remind.
    """
    equal: dict[str, dict[Column, float]] = {}
    reminders: dict[str, dict[Column, float]] = {}
    for row in rows:
        for column in columns:
            value = row.numbers.get(column.metric)
            if value is None:
                continue
            same = row.table.recipe == column.recipe
            if same and column in whole:
                equal.setdefault(row.label, {})[column] = value
            elif same or (column.recipe in row.table.beside and row.plain):
                reminders.setdefault(row.label, {})[column] = value
    return _grey(equal, columns), _grey(reminders, columns)


def _grey(rows: Mapping[str, Mapping[Column, float]], columns: list[Column]) -> list[Line]:
    return [
        Line([label, *(f"{own[c]:.1f}" if c in own else NOTHING for c in columns)], "grey")
        for label, own in rows.items()
    ]


def _remarks(standings: Standings) -> list[Block]:
    """Say, once each, why numbers of a recipe stand beside no printed ones."""
    printed = {row.table.recipe for row in standings.printed}
    whose = {column: "published" for column in standings.columns if column.recipe in printed}
    said = dict.fromkeys(
        f"{recipe_title(column.title)}: reduced, not the {whose.get(column, OWN)} protocol "
        f"({cell.why_not})"
        for row in standings.rows
        for column, cell in row.cells.items()
        if cell.why_not
    )
    return [Text(sentence, "hole") for sentence in said]


def _sources(standings: Standings) -> list[Block]:
    """Say where each printed row stands, and what has to be known beside it."""
    places: dict[str, dict[str, list[str]]] = {}
    marks: dict[str, dict[str, None]] = {}
    columns = standings.columns
    for row in standings.printed:
        shown = any(
            row.table.recipe == c.recipe or (c.recipe in row.table.beside and row.plain)
            for c in columns
            if c.metric in row.numbers
        )
        if shown:
            tables = places.setdefault(row.label, {}).setdefault(row.table.cite, [])
            tables += [row.table.name] if row.table.name not in tables else []
            marks.setdefault(row.label, {}).update({row.mark: None} if row.mark else {})
    lines = []
    for label, cited in places.items():
        source = "; ".join(
            f"{cite}, {', '.join(at)}" if cite else ", ".join(at) for cite, at in cited.items()
        )
        lines.append(Line([label, "; ".join([source, *marks[label]])], "grey"))
    table = Table(["printed row", "source"], lines)
    return [Folded("Where the printed numbers stand", [table])] if lines else []


def _seeds_line(row: Standing, column: Column, standings: Standings, against: Mapping) -> Line:
    spread = row.cells[column].spread
    compared = against.get((row.key, column))
    interval = NOTHING
    if spread.ci95 is not None:
        interval = f"{spread.mean - spread.ci95:.1f} to {spread.mean + spread.ci95:.1f}"
    name = f"{row.label}: {metric_name(column.metric)}\n{recipe_title(column.title)}"
    if spread.diverged:
        lost = ", ".join(f"seed {seed} at {value:.1f}" for seed, value in spread.diverged.items())
        name += f"; diverged: {lost}"
    tested = [NOTHING] * 3
    if compared is not None:
        tested = [
            signed(compared.difference),
            NOTHING if compared.p is None else f"{compared.p:.3f}",
            NOTHING if compared.smallest is None else f"{compared.smallest:.1f}",
        ]
    sd = NOTHING if spread.sd is None else f"{spread.sd:.2f}"
    return Line([name, str(spread.seeds), f"{spread.mean:.1f}", sd, interval, *tested])


def _data(record: Record) -> str:
    data = record.content.get("data") or {}
    parts = [data[part] for part in ("train", "val", "test") if isinstance(data.get(part), dict)]
    names = [str(name) for part in parts for name in part.get("names", [])]
    counts = ", ".join(f"{part['images']:,}" for part in parts if "images" in part)
    name = str(data.get("name") or ", ".join(names))
    return f"{name} ({counts} images)" if counts else name
