"""The page of results: one self-contained HTML file, the same as Markdown and JSON.

python benchmarks/report.py output/benchmarks/quick       a suite's page again, unfinished or not
python benchmarks/report.py output results/*              all records below, side by side
python benchmarks/report.py output --output-dir page      written into a folder of your choice

A suite writes its page when it ends; this writes it again. From several folders, or one that no
suite wrote, it collects every results.json and puts equal protocols into one column.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, UserError, run_script
from convert.files import output_folder, write_json, write_text

SCHEMA = 2
DEFAULT = Path("output/benchmarks/report")


def main(argv: list[str] | None = None) -> int:
    """Write the page of some folders; prints `report: PATH`."""
    parser = Parser(__doc__ or "")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what runs wrote")
    parser.add_argument("--output-dir", type=Path, help=f"default: the suite's own, or {DEFAULT}")
    args = parser.parse_args(argv)
    for folder in args.folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name what a suite or a script wrote")
    first = args.folders[0]
    if len(args.folders) == 1 and (first / "suite.json").exists() and args.output_dir is None:
        print(f"report: {write_report(first)}")
    else:
        print(f"report: {write_leaderboard(args.folders, args.output_dir or DEFAULT)}")
    return 0


def write_report(root: Path) -> Path:
    """Write `report.html`, `report.md`, `report.json` and `figures/` into a suite's output folder.

    Returns:
        The path of the HTML page.

    Raises:
        UserError: the folder is not a suite's, or cannot be written.
    """
    from benchmarks.findings import gather
    from benchmarks.page import build

    findings = gather(root)
    found = findings.pretraining
    pictures = {name: str(file.relative_to(root)) for name, file in findings.pictures.items()}
    content = {
        "suite": findings.suite,
        **_table(findings.standings),
        "certificate": findings.certificate,
        "pretraining": asdict(found) | {"under_chance_percent": found.under_chance}
        if found
        else None,
        "detectors": findings.curves,
        "pictures": pictures,
        "records": {name: record.content for name, record in findings.records.items()},
        "holes": findings.holes,
    }
    return _write(root, build(findings), content)


def write_leaderboard(folders: list[Path], output: Path) -> Path:
    """Write the page of every record below some folders.

    Returns:
        The path of the HTML page.

    Raises:
        UserError: there is no record, or the page cannot be written.
    """
    from benchmarks.leaderboard import build_leaderboard
    from benchmarks.records import read_registry
    from benchmarks.standings import stand

    registry = read_registry(folders)
    if not registry.records:
        named = ", ".join(map(str, folders))
        left = f" ({'; '.join(registry.holes[:3])})" if registry.holes else ""
        raise UserError(f"{named}: found no readable results.json{left}; run an evaluation first")
    standings = stand(registry.records)
    content = {
        **_table(standings),
        "records": [{**record.content, "file": str(record.file)} for record in registry.records],
        "holes": registry.holes,
    }
    return _write(output_folder(output), build_leaderboard(registry, standings), content)


def _write(root: Path, document: Any, content: dict[str, Any]) -> Path:
    from benchmarks.document import Picture, to_html, to_markdown

    for section in document.sections:
        for block in section.blocks:
            if isinstance(block, Picture) and isinstance(block.content, str):
                write_text(root / block.path, block.content)
    write_text(root / "report.md", to_markdown(document))
    write_json(root / "report.json", {"schema": SCHEMA} | content)
    write_text(root / "report.html", to_html(document))
    return root / "report.html"


def _table(standings: Any) -> dict[str, Any]:
    """Return the table as plain numbers and strings."""
    rows = []
    for row in standings.rows:
        cells = [
            {
                **asdict(column),
                **asdict(cell.spread),
                "per_seed": cell.values,
                "printed": cell.printed,
                "reduced": cell.why_not,
            }
            for column, cell in row.cells.items()
        ]
        rows.append({"label": row.label, "key": row.key, "method": row.method, "cells": cells})
    against = [
        {"row": key, **asdict(column), **asdict(compared)}
        for (key, column), compared in standings.against().items()
    ]
    printed = [
        {"label": row.label, "source": row.table.name, "cite": row.table.cite}
        | {"recipe": row.table.recipe, "numbers": dict(row.numbers), "mark": row.mark}
        for row in standings.printed
    ]
    return {"rows": rows, "minus_random": against, "mixed": standings.mixed, "printed": printed}


if __name__ == "__main__":
    run_script(main)
