"""One checkpoint in, a table out: runs a suite's jobs, each once, and writes the page.

python benchmarks/suite.py                            pretrain, convert, measure, all embedded
python benchmarks/suite.py ckpt.pth --suite quick     measure a checkpoint of your own
python benchmarks/suite.py --suite quick --dry-run    what would run, what is already done

Stopped or killed, the same command goes on where it was. What is finished is never run twice;
what a change of recipe, checkpoint, code or library touches is run again.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.board import make_board
from benchmarks.jobs import Step, Suite, load_suite, plan
from benchmarks.runner import Runner, cores
from convert.errors import Parser, UserError, run_script
from convert.files import output_folder


def main(argv: list[str] | None = None) -> int:
    """Run a suite and write its report; the last line printed is `report: PATH`."""
    parser = Parser(__doc__ or "")
    parser.add_argument("checkpoint", nargs="?", type=Path, help="any layout convert/ recognises")
    parser.add_argument("--suite", default="quick", help="benchmarks/suites/NAME.yaml, or a file")
    parser.add_argument("--output-dir", type=Path, help="default: output/benchmarks/<suite>")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, write nothing")
    args = parser.parse_args(argv)

    suite = load_suite(args.suite)
    given = {"checkpoint": _checkpoint(args.checkpoint)} if args.checkpoint else {}
    root = (args.output_dir or _default_folder(suite, args.checkpoint)).absolute()
    steps = plan(suite, given, root)
    if args.dry_run:
        print("\n".join(forecast(suite, steps)))
        return 0
    output_folder(root)
    if not args.quiet:
        print(f"suite {suite.name}: {len(steps)} jobs, up to {suite.parallel} at once on ", end="")
        print(f"{cores()} cores, into {root}", flush=True)
    status = Runner(suite, steps, given, root, make_board(args.quiet)).run()

    from benchmarks.report import write_report  # matplotlib waits until the numbers are there

    print(f"report: {write_report(root)}")
    return status


def forecast(suite: Suite, steps: list[Step]) -> list[str]:
    """Say what a suite would do: each job's state, needs and command."""
    lines = [f"suite {suite.name}: {suite.title}"]
    for step in steps:
        state = "done before" if step.finished() else "would run"
        about = f", about {step.job.minutes:g} min" if step.job.minutes else ""
        after = f", after {', '.join(step.needs)}" if step.needs else ""
        lines += [f"{state}: {step.name}{about}{after}", f"    {' '.join(step.job.command)}"]
    left = sum(step.job.minutes or 0 for step in steps if not step.finished()) / suite.parallel
    return [*lines, f"about {left:.0f} minutes on two cores; nothing was run or written"]


def _checkpoint(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file; name one, or none to pretrain first")
    return path.absolute()


def _default_folder(suite: Suite, checkpoint: Path | None) -> Path:
    """One folder a checkpoint, so that measuring a second one replaces nothing."""
    name = f"{suite.name}-{checkpoint.name.split('.')[0]}" if checkpoint else suite.name
    return Path("output/benchmarks") / name


if __name__ == "__main__":
    run_script(main)
