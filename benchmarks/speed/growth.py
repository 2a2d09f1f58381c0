"""Measure how pretraining grows: with K, the batch, the dictionary, processes, and images listed.

examples:
  python benchmarks/speed/growth.py
  python benchmarks/speed/growth.py --of K,dictionary --size 64 arch resnet18
  python benchmarks/speed/growth.py --of files --files 10000,100000

K:           images/s and memory of the step, at each --K
batch:       the same at each --batches
dictionary:  the queue beside end-to-end at each --batches: the paper's cost table
processes:   whole runs of pretrain/main_moco.py on embedded images, by torchrun, over gloo on a CPU
files:       seconds to list a folder, to list it again, and to the first batch of views
Steps are taken in turn, each setting in a process of its own, as in benchmarks/speed/step.py.
KEY VALUE pairs go to the recipe.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.speed.step import SIZES, Setting, measure
from convert.errors import Parser, UserError, nearest, run_script
from convert.files import CACHE_VARIABLE, ROOT, environment
from pretrain.config import PretrainConfig, load_config

Rows = dict[str, dict[str, Any]]  # a row's name -> its numbers
SIDE = 64  # px, of the files that are listed
LINKS = 30_000  # to one file: file systems hold no more than 65,000


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("words", nargs="*", metavar="KEY VALUE", help="keys of the recipe")
    add("--of", default=",".join(OF), metavar="A,B", help=f"default: {','.join(OF)}")
    add("--K", default="4096,65536,1048576", metavar="A,B", help="default: 4096,65536,1048576")
    add("--batches", default="16,32,64", metavar="A,B", help="default: 16,32,64")
    add("--processes", default="1,2", metavar="A,B", help="default: 1,2")
    add("--files", default="10000,100000", metavar="A,B", help="default: 10000,100000")
    add("--size", type=int, default=112, metavar="PX", help="side of a view (default: 112)")
    add("--steps", type=int, default=3, metavar="N", help="of a round (default: 3)")
    add("--rounds", type=int, default=5, metavar="N", help="default: 5; the median")
    add("--device", default="", help="cpu or cuda; default: the best at hand")
    add("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_intermixed_args(argv)
    args.K, args.batches, args.processes, args.files = (
        _counts(name, getattr(args, name)) for name in ("K", "batches", "processes", "files")
    )
    names = args.of.split(",")
    for name in names:
        if name not in OF:
            raise UserError(f"--of: there is no '{name}'; try {nearest(name, OF)}")
    found = {}
    for name in names:
        found[name] = OF[name](args)
        if not args.json:  # at once: the next may take minutes, or fail
            print(table(name, found[name]), flush=True)
    record = {"size": args.size, "words": args.words, "found": found, "environment": environment()}
    print(json.dumps(record) if args.json else where(record))
    return 0


def _counts(name: str, words: str) -> list[int]:
    try:
        counts = [int(word) for word in words.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UserError(f"--{name} {words}: want counts with commas between")
    return counts


def grow_keys(args: Any) -> Rows:
    """Measure the step at several lengths of the queue."""
    return _steps(args, {f"K {K}": ["K", str(K)] for K in args.K})


def grow_batch(args: Any) -> Rows:
    """Measure the step at several batch sizes."""
    return _steps(args, {f"batch {n}": ["batch_size", str(n)] for n in args.batches})


def compare_dictionaries(args: Any) -> Rows:
    """Measure the queue's step beside end-to-end's (arXiv:1911.05722, Sec. 4.2, its cost table)."""
    kinds = [(kind, n) for n in args.batches for kind in ("queue", "end-to-end")]
    settings = {f"{k}, batch {n}": ["dictionary", k, "batch_size", str(n)] for k, n in kinds}
    return _steps(args, settings)


def _steps(args: Any, settings: dict[str, list[str]]) -> Rows:
    entries = {}
    for name, pairs in settings.items():
        words = [*SIZES, "batch_size", "32", *args.words, *pairs]
        config = load_config(PretrainConfig, None, pairs=words)
        config = replace(config, device=args.device, image_size=args.size, workers=0, knn_every=0)
        entries[name] = ("ours", Setting(config, None))
    return measure(entries, args.steps, args.rounds, quiet=args.quiet)


def grow_processes(args: Any) -> Rows:
    """Measure whole runs on several processes, at the same global batch."""
    rows: Rows = {}
    with tempfile.TemporaryDirectory(prefix="moco-transfer-") as folder:
        for count in args.processes:
            out = Path(folder) / str(count)
            rows[f"{count} processes"] = {"images_per_s": _run(args, count, out)}
    first = next(iter(rows.values()))["images_per_s"]
    for row in rows.values():
        row["ratio"] = row["images_per_s"] / first
    return rows


def _run(args: Any, processes: int, out: Path) -> float:
    steps = 2 * args.rounds * args.steps
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(processes), str(ROOT / "pretrain/main_moco.py")]
    words = ["--quiet", "--max-steps", str(steps), "--output-dir", str(out)]
    words += ["-p", str(args.steps), "image_size", str(args.size), "knn_every", "0"]
    words += ["bn_groups", str(max(args.processes)), *(["device", args.device] * bool(args.device))]
    done = subprocess.run([*launch, *words, *args.words], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("main_moco.py: ")]
        raise UserError(f"{processes} processes: {(said or [done.stderr[-300:]])[-1]}")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rates = [line["images_per_s"] for line in lines if "images_per_s" in line]
    return float(statistics.median(rates[1:] or rates))


def grow_files(args: Any) -> Rows:
    """Measure how long a folder of so many files takes until its first batch of views."""
    return {f"{count} files": _list(count, args.size) for count in args.files}


def _list(count: int, size: int) -> dict[str, Any]:
    from pretrain.loader import OPENCV, Views, collate
    from pretrain.sources import image_folder
    from pretrain.views import AUGMENTATIONS
    from pretrain.workers import load

    with tempfile.TemporaryDirectory(prefix="moco-transfer-") as folder:
        os.environ[CACHE_VARIABLE] = f"{folder}/cache"  # where a listing is remembered
        root = Path(folder) / "images"
        _write_files(root, count)
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            images = image_folder(root, remember=True)
            seconds.append(time.perf_counter() - began)
        assert len(images) == count
        began = time.perf_counter()
        views = Views(images, AUGMENTATIONS["v2"], size, 0, backend=OPENCV)
        next(load(views, [[(0, i) for i in range(32)]], 1, collate))
        batch_s = time.perf_counter() - began
    first, again = seconds
    million = {"million_s": first * 1e6 / count}
    return {"list_s": first, "list_again_s": again, "first_batch_s": batch_s} | million


def _write_files(folder: Path, count: int) -> None:
    """Write an image and link it, in a hundred classes; so many links on, write another."""
    from PIL import Image

    for index in range(count):
        one = folder.with_name(f"{index // LINKS}.jpg")
        if index % LINKS == 0:
            Image.effect_noise((SIDE, SIDE), 60).convert("RGB").save(one)
        path = folder / f"{index % 100:03d}" / f"{index:08d}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.hardlink_to(one)


OF: dict[str, Callable[[Any], Rows]] = {
    "K": grow_keys,
    "batch": grow_batch,
    "dictionary": compare_dictionaries,
    "processes": grow_processes,
    "files": grow_files,
}


def table(name: str, rows: Rows) -> str:
    """Write the numbers of one thing that grew."""
    lines = [name]
    for row, found in rows.items():
        numbers = [f"{key} {found[key]:.3g}" for key in SHOWN if key in found]
        lines.append(f"  {row:<26} {'  '.join(numbers)}")
    return "\n".join(lines)


def where(record: dict[str, Any]) -> str:
    """Write at which size, on which machine, and of which commit."""
    hardware, commit = record["environment"]["hardware"], record["environment"]["commit"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    return f"{record['size']} px; {machine}, commit {commit}"


SHOWN = (
    "images_per_s",
    "ratio",
    "host_MiB",
    "device_MiB",
    "list_s",
    "list_again_s",
    "first_batch_s",
    "million_s",
)


if __name__ == "__main__":
    run_script(main)
