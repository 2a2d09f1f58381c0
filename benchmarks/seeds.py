"""Join the results of one evaluation's seeds, each measured by a run of its own, into one record.

python benchmarks/seeds.py OUTPUT_DIR seed0/results.json seed1/results.json ...
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from benchmarks.records import Record

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, UserError, run_script
from convert.files import output_folder
from transfer.results import format_metrics, write_results


def main(argv: list[str] | None = None) -> int:
    """Join the records and print the mean."""
    parser = Parser(__doc__ or "")
    parser.add_argument("output_dir", type=Path, help="where results.json goes")
    parser.add_argument("records", type=Path, nargs="+", help="results.json of each seed")
    args = parser.parse_args(argv)
    print(format_metrics(join(args.output_dir, args.records)))
    return 0


def join(output_dir: Path, files: list[Path]) -> dict[str, Any]:
    """Write the record of all seeds and return it.

    Raises:
        UserError: a file is no record, or two differ in protocol, data, checkpoint or metrics.
    """
    from benchmarks.records import differing_keys, pooled  # torch behind it: --help does not wait

    records = [_read(file) for file in files]
    first = records[0]
    for file, record in zip(files, records, strict=True):
        if keys := differing_keys([first, record]):
            _refuse(file, files[0], f"another {', '.join(list(keys)[:3])}")
        if record.row != first.row:
            _refuse(file, files[0], "another checkpoint")
        if record.metrics.keys() != first.metrics.keys():
            _refuse(file, files[0], "other metrics")
    seeds = pooled(records)
    if len(seeds) < sum(len(record.per_seed) for record in records):
        raise UserError(f"{files[0]} and those after it: two have the same seed; want one of each")
    content = first.content
    return write_results(
        output_folder(output_dir),
        task=first.task,
        per_seed=list(seeds.values()),
        **{key: content[key] for key in ("protocol", "config", "checkpoint", "data")},
        recipe=content.get("recipe"),
        details=content.get("details"),
        started=time.time() - sum(float(record.content["seconds"]) for record in records),
    )


def _refuse(file: Path, other: Path, what: str) -> NoReturn:
    raise UserError(f"{file}: has {what} than {other}; they are not one row")


def _read(file: Path) -> "Record":
    from benchmarks.records import read_record

    try:
        return read_record(file)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


if __name__ == "__main__":
    run_script(main)
