"""Compare checkpoints on small image sets by every protocol of frozen features, with spread.

  python benchmarks/small_sets.py --init MoCo=ckpt.pth --set caltech101=DIR --set voc=VOCDIR
  python benchmarks/small_sets.py --init MoCo=a.pth --set cifar10=DIR --per-class cifar10=40,20

Random initialisation is always the first row, drawn anew for each seed. Each cell is a run of one
of transfer/{knn,main_lincls,logreg,svm}.py, whose results.json stays; what is done is not run
again. A set with several classes an image (VOC2007) takes logreg and svm only. Writes table.md and
table.json. The protocols are the scripts' with fewer values to choose among, as the table says.
"""

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.errors import Parser, UserError, run_script
from convert.files import ROOT, environment, write_json, write_text

RANDOM = "random init"
# Script, its metric in the table, and what differs from its defaults: small sets on a few cores.
PROTOCOLS: dict[str, tuple[str, str, list[str]]] = {
    "kNN, k = 20": ("knn.py", "knn20/top1", ["k", "20"]),
    "linear": (
        "main_lincls.py",
        "linear/top1",
        ["features", "cached", "standardize", "true", "lr", "0.01"],
    ),
    "logreg": ("logreg.py", "logreg/top1", ["l2_values", "8", "max_iter", "200"]),
    "SVM": ("svm.py", "svm/top1", ["costs", ".01,.1,1", "max_iter", "500"]),
}
TAGGED = {
    "logreg mAP": ("logreg.py", "logreg/mAP", ["l2_values", "8", "max_iter", "200", "apart", ".4"]),
    "SVM mAP": ("svm.py", "voc07_svm/mAP", ["costs", ".01,.1,1,10", "folds", "2"]),
}


@dataclass(frozen=True)
class Cell:
    """One run: a checkpoint on a set by a protocol.

    Attributes:
        init, images, protocol: names for people; they are the run's folders too.
        command: the words after Python. metric: which of the run's numbers stands in the table.
        folder: where its results.json goes.
    """

    init: str
    images: str
    protocol: str
    command: list[str]
    metric: str
    folder: Path


def main(argv: list[str] | None = None) -> int:
    """Run what is not done yet, and write the table."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--init", action="append", default=[], metavar="NAME=FILE", help="a checkpoint, a row")
    add("--set", action="append", default=[], metavar="NAME=DIR", help="images, some columns")
    add("--per-class", action="append", default=[], metavar="NAME=N,N", help="train and val images")
    add("--image-size", type=int, default=64, metavar="N", help="default: 64 px")
    add("--arch", default="resnet50", metavar="NAME", help="of random init (default: resnet50)")
    add("--seeds", type=int, default=3, metavar="N", help="default: 3")
    add("--output-dir", type=Path, default=Path("output/small_sets"), metavar="DIR")
    add("--resume", action="store_true", help="keep the cells that are done")
    args = parser.parse_args(argv)
    inits = {RANDOM: "random"} | named(args.init, "--init")
    sets = {name: Path(path) for name, path in named(args.set, "--set").items()}
    if not sets:
        raise UserError("--set is missing: name images, as --set caltech101=DIR")
    started = time.time()
    for name, words in named(args.per_class, "--per-class").items():
        if name not in sets or not (sets[name] / "train").is_dir():
            raise UserError(f"--per-class {name}: want the name of a --set with class folders")
        sets[name] = subset(sets[name], words, args.output_dir / "sets" / name)
    cells = plan(inits, sets, args)
    for number, cell in enumerate(cells, 1):
        run(cell, f"{number}/{len(cells)}", quiet=args.quiet)
    text, record = table(cells, args, time.time() - started)
    write_json(args.output_dir / "table.json", record)
    write_text(args.output_dir / "table.md", text)
    print(text)
    return 0


def named(words: list[str], flag: str) -> dict[str, str]:
    """Read NAME=VALUE words."""
    pairs = [word.partition("=") for word in words]
    bad = next((word for word, (n, _, v) in zip(words, pairs, strict=True) if not (n and v)), None)
    if bad is not None:
        raise UserError(f"{flag} {bad}: want NAME=PATH")
    return {name: value for name, _, value in pairs}


def subset(root: Path, words: str, out: Path) -> Path:
    """Link a few images of each class, drawn once, into a folder of the same layout.

    Args:
        root: holds train/ and val/ or test/.
        words: `N,N`: images a class, in train and in the other.
        out: the new folder.
    """
    counts = [int(word) if word.isdecimal() else 0 for word in words.split(",")]
    if len(counts) != 2 or min(counts) < 1:
        raise UserError(f"--per-class {words}: want two numbers above 0, as caltech101=12,6")
    judged = "val" if (root / "val").is_dir() else "test"
    for (part, target), count in zip((("train", "train"), (judged, "val")), counts, strict=True):
        for folder in sorted(path for path in (root / part).iterdir() if path.is_dir()):
            files = sorted(path for path in folder.iterdir() if path.is_file())
            drawn = random.Random(f"{part} {folder.name}").sample(files, min(count, len(files)))
            (out / target / folder.name).mkdir(parents=True, exist_ok=True)
            for file in drawn:
                link = out / target / folder.name / file.name
                if not link.is_symlink():
                    link.symlink_to(file.resolve())
    return out


def plan(inits: Mapping[str, str], sets: Mapping[str, Path], args: Any) -> list[Cell]:
    """List the runs, set by set, so that a set's features are computed together."""
    cells = []
    for images, folder in sets.items():
        protocols = PROTOCOLS if (folder / "train").is_dir() else TAGGED
        for init, source in inits.items():
            for protocol, (script, metric, keys) in protocols.items():
                out = args.output_dir / images / init / Path(script).stem
                arch = ["-a", args.arch] if init == RANDOM else []
                cache = str(args.output_dir / "features")
                command = [str(ROOT / "transfer" / script), str(folder), "--pretrained", source]
                command += [*arch, "--output-dir", str(out), "--seeds", str(args.seeds), *keys]
                command += ["image_size", str(args.image_size), "feature_cache", cache, "--quiet"]
                command += ["--resume"] if args.resume else []
                cells.append(Cell(init, images, protocol, command, metric, out))
    return cells


def run(cell: Cell, place: str, *, quiet: bool) -> None:
    """Run a cell; the script itself knows whether it is done.

    Raises:
        UserError: it failed.
    """
    done = subprocess.run([sys.executable, *cell.command], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"{cell.images}, {cell.init}, {cell.protocol}: {last}")
    if not quiet:
        said = done.stdout.strip().splitlines()[-1]
        print(f"{place} {cell.images}, {cell.init}, {cell.protocol}: {said}", flush=True)


def table(cells: list[Cell], args: Any, seconds: float) -> tuple[str, dict[str, Any]]:
    """Return the Markdown page and its record: a row a checkpoint, a column a set and protocol."""
    records = {id(c): json.loads((c.folder / "results.json").read_text("utf-8")) for c in cells}
    columns = list(dict.fromkeys((cell.images, cell.protocol) for cell in cells))
    values: dict[str, dict[tuple[str, str], list[float]]] = {}
    for cell in cells:
        each = [seed[cell.metric] for seed in records[id(cell)]["per_seed"]]
        values.setdefault(cell.init, {})[cell.images, cell.protocol] = each
    head = ["checkpoint", *(f"{images}: {protocol}" for images, protocol in columns)]
    rows = [[init, *(said(found[column]) for column in columns)] for init, found in values.items()]
    first = {c.images: records[id(c)]["data"] for c in cells}
    sizes = "; ".join(
        f"{name}: {data['train']['images']} train and {data['val']['images']} val images, "
        f"{data['classes']} classes"
        for name, data in first.items()
    )
    seeds = f"{args.seeds} seeds, mean and standard deviation" if args.seeds > 1 else "one seed"
    where = environment()
    lines = [
        "# Frozen features on small sets",
        "",
        f"{args.arch} at {args.image_size} px, percent, {seeds}. Sets: {sizes}.",
        "",
        *("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)),
        "",
        f"{where['hardware']['cpu']}, {where['hardware']['cores']} cores, {seconds:.0f} s in this "
        f"call, torch {where['versions']['torch']}, commit {where['commit']}. "
        "What differs from the scripts' defaults: "
        + "; ".join(
            f"{name}: {' '.join(keys)}" for name, (_, _, keys) in (PROTOCOLS | TAGGED).items()
        )
        + ".",
    ]
    record = {
        "arch": args.arch,
        "image_size": args.image_size,
        "sets": first,
        "columns": [list(column) for column in columns],
        "values": {i: [found[c] for c in columns] for i, found in values.items()},
        "checkpoints": {c.init: records[id(c)]["checkpoint"] for c in cells},
        "environment": where,
    }
    return "\n".join(lines) + "\n", record


def said(values: list[float]) -> str:
    """Say mean and spread."""
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


if __name__ == "__main__":
    run_script(main)
