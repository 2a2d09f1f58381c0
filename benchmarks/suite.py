"""One checkpoint in, a table out: runs a suite's jobs, each once, and writes the page.

python benchmarks/suite.py                            pretrain, convert, measure, all embedded
python benchmarks/suite.py ckpt.pth --suite quick     measure a checkpoint of your own
python benchmarks/suite.py a.pth b.pth RUN_FOLDER     several, a row each
python benchmarks/suite.py --suite quick --dry-run    what would run, what is already done
python benchmarks/suite.py ckpt.pth --suite quick --override 'voc/*' SOLVER.MAX_ITER 20
python benchmarks/suite.py RUN_FOLDER --watch         each new checkpoint of a pretraining
python benchmarks/suite.py ckpt.pth --on slurm --slurm partition=gpu --slurm time=1440

Stopped or killed, the same command goes on where it was. What is finished is never run twice;
what a change of recipe, checkpoint, data, code or library touches is run again.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.board import make_board
from benchmarks.evaluation import Evaluation
from benchmarks.forecast import beforehand, forecast
from benchmarks.rows import find_rows
from benchmarks.templates import Override, load_suite
from benchmarks.watching import watch
from convert.errors import Parser, run_script
from convert.files import output_folder


def main(argv: list[str] | None = None) -> int:
    """Run a suite and write its report; the last line printed is `report: PATH`."""
    args = parser().parse_args(argv)
    overrides = [Override(*words) for words in args.override]
    suite = load_suite(args.suite, overrides, args.seeds)
    root = args.output_dir or _default_folder(suite.name, args.checkpoints)
    evaluation = Evaluation.prepare(suite, root.absolute(), args)
    if args.watch:
        return watch(evaluation, args.checkpoints, make_board(args.quiet))
    laid = evaluation.lay_out(find_rows(args.checkpoints))
    if args.dry_run:
        print("\n".join(forecast(suite, laid.steps, evaluation.place, laid.table)))
        return 0
    output_folder(evaluation.root)
    if not args.quiet:
        where = evaluation.place.describe()
        print(f"suite {suite.name}: {len(laid.steps)} jobs, {where}, into {evaluation.root}")
        lines = beforehand(laid.steps, laid.table)
        print("".join(f"{line}\n" for line in lines), end="", flush=True)
    return evaluation.run(laid, make_board(args.quiet))


def parser() -> Parser:
    """Build the command line."""
    words = Parser(__doc__ or "")
    add = words.add_argument
    add("checkpoints", nargs="*", type=Path, help="any layout convert/ recognises; a run's folder")
    add("--suite", default="quick", help="benchmarks/suites/NAME.yaml, or a file")
    add("--output-dir", type=Path, help="default: output/benchmarks/<suite>")
    add("--dry-run", action="store_true", help="say what would run, write nothing")
    add("--data", action="append", default=[], metavar="NAME=PATH", help="where a set is")
    add(
        *("--override",),
        nargs=3,
        action="append",
        default=[],
        metavar=("JOBS", "KEY", "VALUE"),
        help="set a key of the recipes of jobs that fit a pattern; their results are `reduced`",
    )
    add("--seeds", type=int, metavar="N", help="trials of an evaluation; default: the suite's")
    add("--processes", type=int, metavar="N", help="of a job at most; default: the GPUs at hand")
    add("--on", choices=("local", "slurm"), default="local", help="where jobs run")
    add(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of sbatch, as partition=gpu",
    )
    add("--watch", action="store_true", help="measure each new checkpoint of the run's folder")
    return words


def _default_folder(suite: str, checkpoints: list[Path]) -> Path:
    """One folder a checkpoint, so that measuring a second one replaces nothing."""
    stems = "-".join(path.absolute().name.split(".")[0] for path in checkpoints[:3])
    return Path("output/benchmarks") / (f"{suite}-{stems}" if checkpoints else suite)


if __name__ == "__main__":
    run_script(main)
