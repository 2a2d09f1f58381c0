"""Compare the dictionaries on CIFAR-10: ten epochs each on two CPU cores, three seeds.

examples:
  python benchmarks/cifar10.py CIFAR10
  python benchmarks/cifar10.py CIFAR10 --methods moco,simclr --seeds 1
  python benchmarks/cifar10.py CIFAR10 --seeds 1 epochs 1

CIFAR10 holds train/CLASS/*.png and val/ or test/. Each run is pretrain/main_moco.py with the recipe
moco_cifar10_r18_10ep; its kNN votes, on 2,000 images of each class, come from its log, before the
first step and after the last. transfer/knn.py votes once more on each checkpoint, with its own test
view. KEY VALUE pairs go to every run. Stopped, the same command goes on; what is done stays, and
other keys want an --output-dir of their own. The table is printed, and lies as cifar10.md and
cifar10.json in --output-dir.
"""

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import child
from convert.errors import Parser, UserError, nearest, run_script
from convert.files import ROOT, environment, output_folder, sha256, write_json, write_text
from pretrain.config import split_words

RECIPE = "configs/pretrain/moco_cifar10_r18_10ep.yaml"
VOTERS = 2000  # images of each class in the bank
METHODS = {
    "random": "nothing",
    "moco": "",
    "moco-m0": "m 0",
    "end-to-end": "dictionary end-to-end",
    # InstDisc's momentum; a warm-up, as the positives of the bank's first epoch are random vectors
    "bank": "dictionary bank bank_momentum 0.5 warmup_epochs 1",
    "simclr": "dictionary simclr bn_groups 0 mlp true",  # its head has two layers
}
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run what is not done yet, and write the table."""
    parser = Parser(__doc__ or "")
    parser.add_argument("words", nargs="+", metavar="DIR | KEY VALUE", help="CIFAR-10; keys")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help=f"default: {','.join(METHODS)}"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--output-dir", type=Path, default=Path("output/benchmarks/cifar10"))
    args = parser.parse_intermixed_args(argv)
    folder, pairs = split_words(args.words)
    methods = args.methods.split(",")
    unknown = [method for method in methods if method not in METHODS]
    if unknown or folder is None or args.seeds < 1:
        close = nearest(unknown[0], METHODS) if unknown else ", ".join(METHODS)
        raise UserError(
            f"methods {args.methods}, seeds {args.seeds}, images {folder}: want a folder, at least "
            f"one seed, and methods of {close}"
        )
    root = output_folder(args.output_dir).absolute()
    bank = link_bank(folder.absolute(), root / "bank")
    rows = [
        one(method, seed, folder.absolute(), bank, root, pairs, quiet=args.quiet)
        for seed, method in itertools.product(range(args.seeds), methods)
    ]
    text = table(rows)
    record = {"rows": rows, "keys": pairs, "recipe": RECIPE, "environment": environment()}
    write_json(root / "cifar10.json", record)
    write_text(root / "cifar10.md", text)
    print(text, end="")
    return 0


def link_bank(images: Path, bank: Path) -> Path:
    """Lay out the labelled folder of the votes: some of each class, and all that are judged.

    Raises:
        UserError: there is no train/, or neither val/ nor test/.
    """
    judged = next((images / name for name in ("val", "test") if (images / name).is_dir()), None)
    if judged is None or not (images / "train").is_dir():
        raise UserError(f"images {images}: want train/CLASS/*.png and val/ or test/ in it")
    if not (bank / "val").exists():
        for folder in sorted(path for path in (images / "train").iterdir() if path.is_dir()):
            (bank / "train" / folder.name).mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.iterdir())[:VOTERS]:
                link = bank / "train" / folder.name / path.name
                link.unlink(missing_ok=True)
                link.symlink_to(path)
        (bank / "val").symlink_to(judged, target_is_directory=True)
    return bank


def one(
    method: str, seed: int, images: Path, bank: Path, root: Path, pairs: list[str], *, quiet: bool
) -> Row:
    """Train a method with a seed unless that was done, and vote; return the table's row of it.

    Raises:
        UserError: main_moco.py's own, as of a folder that holds a run with other keys.
    """
    from pretrain.monitor import read_log  # imports torch, which --help does not wait for

    folder = root / f"{method}-{seed}"
    row: Row = {"method": method, "seed": seed}
    checkpoint = "random"
    if method != "random":
        words = [str(images), "--config", str(ROOT / RECIPE), "--seed", str(seed)]
        words += ["--output-dir", str(folder), "--resume", "auto", "--knn-dir", str(bank)]
        words += [*METHODS[method].split(), *pairs]
        # Of a finished run it only checks the keys.
        child.run("pretrain/main_moco.py", words, quiet=quiet)
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        votes = [line["knn_top1"] for line in read_log(folder) if "knn_top1" in line]
        row |= {"knn_before": votes[0], "knn_after": votes[-1], "minutes": record["seconds"] / 60}
        row |= {"loss": record["loss_last_tenth"], "chance_loss": record["chance_loss"]}
        checkpoint = str(folder / record["checkpoint"])
    words = [str(bank), "--pretrained", checkpoint, "--arch", "resnet18", "--seed", str(seed)]
    words += ["--output-dir", str(folder / "knn"), "k", str(neighbours(bank)), "temperature", "0.1"]
    results = folder / "knn/results.json"
    if not is_of(results, checkpoint):
        results.unlink(missing_ok=True)
        child.run("transfer/knn.py", [*words, "image_size", "32"], quiet=quiet)
    metrics: dict[str, float] = json.loads(results.read_text(encoding="utf-8"))["metrics"]
    return row | {"knn_transfer": next(iter(metrics.values()))}


def is_of(results: Path, checkpoint: str) -> bool:
    """Say whether there is a vote, and on this checkpoint: a run may have gone on since."""
    if not results.exists():
        return False
    voted: str = json.loads(results.read_text(encoding="utf-8"))["checkpoint"]["sha256"]
    return checkpoint == "random" or voted == sha256(Path(checkpoint))


def neighbours(bank: Path) -> int:
    """Return k: 200, or as many as there are images of a class."""
    counts = [len(list(folder.iterdir())) for folder in (bank / "train").iterdir()]
    return min(200, *counts)


def table(rows: list[Row]) -> str:
    """Write the comparison as Markdown: mean and sample standard deviation over the seeds."""
    columns = {
        "knn_before": "kNN before, %",
        "knn_after": "kNN after, %",
        "knn_transfer": "transfer/knn.py, %",
        "minutes": "minutes",
        "loss": "loss, last tenth",
        "chance_loss": "chance",
    }
    lines = [
        f"| method | seeds | {' | '.join(columns.values())} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [spread([row[key] for row in mine if key in row]) for key in columns]
        lines.append(f"| {method} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Write a mean and, of several values, their standard deviation."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


if __name__ == "__main__":
    run_script(main)
