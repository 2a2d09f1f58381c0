"""Join the results of one evaluation's seeds, each measured by a run of its own, into one record.

python benchmarks/seeds.py OUTPUT_DIR seed0/results.json seed1/results.json ...
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

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
        UserError: a file is no record, or two differ in protocol, checkpoint, data or metrics.
    """
    records = [_read(file) for file in files]
    first = records[0]
    for file, record in zip(files, records, strict=True):
        for key in ("task", "fingerprint", "data"):
            if record[key] != first[key]:
                raise UserError(f"{file}: has another {key} than {files[0]}; they are not one row")
        if list(record["metrics"]) != list(first["metrics"]):
            raise UserError(f"{file}: has other metrics than {files[0]}; they are not one row")
        same = record["checkpoint"].get("sha256") == first["checkpoint"].get("sha256")
        if not same and first["checkpoint"].get("name") != "random":
            raise UserError(f"{file}: has another checkpoint than {files[0]}; they are not one row")
    return write_results(
        output_folder(output_dir),
        task=first["task"],
        per_seed=[metrics for record in records for metrics in record["per_seed"]],
        protocol=first["protocol"],
        config=first["config"],
        checkpoint=first["checkpoint"],
        data=first["data"],
        recipe=first.get("recipe"),
        details=first.get("details"),
        started=time.time() - sum(float(record["seconds"]) for record in records),
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if {"task", "fingerprint", "metrics", "per_seed", "protocol", "checkpoint"} <= set(record):
            return record
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is no record of an evaluation ({error})") from error
    raise UserError(f"{file}: is no record of an evaluation")


if __name__ == "__main__":
    run_script(main)
