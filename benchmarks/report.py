"""The page of a suite: one self-contained HTML file, the same as Markdown and JSON.

python benchmarks/report.py output/benchmarks/quick    rewrite the report of a suite's output folder

The suite writes its report when it ends; this writes it again, of an unfinished suite too.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.findings import Findings, gather
from convert.errors import Parser, run_script
from convert.files import write_json, write_text

SCHEMA = 1


def main(argv: list[str] | None = None) -> int:
    """Write the report of a suite's output folder; prints `report: PATH`."""
    parser = Parser(__doc__ or "")
    parser.add_argument("folder", type=Path, help="what a suite wrote: its --output-dir")
    args = parser.parse_args(argv)
    print(f"report: {write_report(args.folder)}")
    return 0


def write_report(root: Path) -> Path:
    """Write `report.html`, `report.md`, `report.json` and `figures/` into a suite's output folder.

    Returns:
        The path of the HTML page.

    Raises:
        UserError: the folder is not a suite's, or cannot be written.
    """
    from benchmarks.document import Picture, to_html, to_markdown
    from benchmarks.page import build

    findings = gather(root)
    document = build(findings)
    for section in document.sections:
        for block in section.blocks:
            if isinstance(block, Picture) and isinstance(block.content, str):
                write_text(root / block.path, block.content)
    write_text(root / "report.md", to_markdown(document))
    write_json(root / "report.json", as_json(findings))
    write_text(root / "report.html", to_html(document))
    return root / "report.html"


def as_json(findings: Findings) -> dict[str, Any]:
    """Return all findings as plain numbers, strings and lists."""
    found = findings.pretraining
    return {
        "schema": SCHEMA,
        "suite": findings.suite,
        "metrics": findings.columns,
        "rows": [asdict(row) for row in findings.rows],
        "difference": findings.differences(),
        "mixed_protocols": findings.mixed_protocols(),
        "certificate": findings.certificate,
        "pretraining": asdict(found) | {"under_chance_percent": found.under_chance}
        if found
        else None,
        "detectors": findings.curves,
        "pictures": {
            name: str(p.relative_to(findings.root)) for name, p in findings.pictures.items()
        },
        "records": findings.records,
        "holes": findings.holes,
    }


if __name__ == "__main__":
    run_script(main)
