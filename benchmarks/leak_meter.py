"""Look for batch norm's leak: the leak meter on runs with one batch norm group and with eight.

examples:
  python benchmarks/leak_meter.py
  python benchmarks/leak_meter.py --seeds 3
  python benchmarks/leak_meter.py iterations 84

Each run is pretrain/main_moco.py --leak-meter with the recipe leak_r18_embedded, on the embedded
digits: as many steps, groups of 32 images, and a queue of four batches. After every epoch a
query's key is looked for three times: encoded in the query's own group, as where nothing is
shuffled; as the run does it, shuffled across its groups; and among any images. What the run finds
more than the last is its leak. KEY VALUE pairs go to every run.
Stopped, the same command goes on. The numbers are printed; they lie as leak.json in --output-dir,
and the plot as leak.png.
"""

import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import child
from convert.errors import Parser, UserError, run_script
from convert.files import ROOT, atomic_write, environment, output_folder, write_json

RECIPE = "configs/pretrain/leak_r18_embedded.yaml"
GROUPS = (1, 8)
IMAGES = 32  # of a group: what a group of fewer tells by its size alone is not the question
BATCHES = 4  # in the queue
WAYS = ("leak_same", "leak_shuffled", "leak_apart")  # see pretrain/leak.py
Curves = dict[int, dict[str, list[list[float]]]]  # groups -> way -> seed -> after each epoch


def main(argv: list[str] | None = None) -> int:
    """Train what is not trained yet, print the last numbers, draw all of them."""
    parser = Parser(__doc__ or "")
    parser.add_argument("pairs", nargs="*", metavar="KEY VALUE", help="keys for every run")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--output-dir", type=Path, default=Path("output/benchmarks/leak_meter"))
    args = parser.parse_intermixed_args(argv)
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: want 1 or more")
    root = output_folder(args.output_dir)
    for groups, seed in itertools.product(GROUPS, range(args.seeds)):
        train(root / f"{groups}-groups-{seed}", groups, seed, args.pairs, quiet=args.quiet)

    from pretrain.monitor import read_log  # imports torch, which --help does not wait for

    found: Curves = {groups: {way: [] for way in WAYS} for groups in GROUPS}
    steps: dict[int, list[int]] = {}
    for groups, seed in itertools.product(GROUPS, range(args.seeds)):
        lines = [x for x in read_log(root / f"{groups}-groups-{seed}") if "leak_same" in x]
        steps[groups] = [line["step"] for line in lines]
        for way in WAYS:
            found[groups][way].append([line[way] for line in lines])
    record = {"curves": found, "steps": steps, "environment": environment()}
    write_json(root / "leak.json", record)
    with atomic_write(root / "leak.png") as temporary:
        draw(found, steps, temporary)
    print("\n".join(f"{groups} batch norm groups: {said(found[groups])}" for groups in GROUPS))
    print(root / "leak.png")
    return 0


def train(folder: Path, groups: int, seed: int, pairs: list[str], *, quiet: bool) -> None:
    """Train with so many groups, unless that was done."""
    if (folder / "run.json").exists():
        return
    words = ["--config", str(ROOT / RECIPE), "--seed", str(seed), "--output-dir", str(folder)]
    words += ["--leak-meter", "--leak", "--bn-groups", str(groups), "--resume", "auto"]
    words += ["batch_size", str(IMAGES * groups), "K", str(BATCHES * IMAGES * groups), *pairs]
    child.run("pretrain/main_moco.py", words, quiet=quiet)


def said(curves: dict[str, list[list[float]]]) -> str:
    """Say what was found over the last third of the epochs, where the noise of one is averaged."""
    means = {}
    for way, seeds in curves.items():
        late = [values[-max(1, len(values) // 3) :] for values in seeds]
        means[way] = statistics.fmean(itertools.chain(*late))
    same, shuffled, apart = (means[way] for way in WAYS)
    return (
        f"a leak of {shuffled - apart:+.1f} points: {shuffled:.1f}% of queries find a key encoded "
        f"as the run does it, {apart:.1f}% one encoded among any images, {same:.1f}% one of the "
        "query's own group (the last third of the epochs)"
    )


def draw(found: Curves, steps: dict[int, list[int]], path: Path) -> None:
    """Draw all ways against the step, a panel for each number of groups; thin: single seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    from pretrain.curves import LEAK, ORANGE

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, len(GROUPS), sharey=True)
    for axis, groups in zip(axes, GROUPS, strict=True):
        drawn: dict[str, Any] = {}
        for curve in LEAK:
            seeds, look = found[groups][curve.key], {"color": curve.colour, "ls": curve.style}
            for values in seeds if len(seeds) > 1 else []:
                axis.plot(steps[groups], values, linewidth=0.6, alpha=0.4, **look)
            means = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
            axis.plot(steps[groups], means, label=curve.name, **look)
            drawn[curve.key] = means
        leaked = (drawn["leak_shuffled"], drawn["leak_apart"])
        axis.fill_between(steps[groups], *leaked, color=ORANGE, alpha=0.15, label="the leak")
        groups_name = "one batch norm group" if groups == 1 else f"{groups} batch norm groups"
        axis.set_title(f"{groups_name} of {IMAGES} images")
        axis.set_xlabel("step")
        axis.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("queries that find their key, percent")
    axes[0].legend(frameon=False)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    run_script(main)
