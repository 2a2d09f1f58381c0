"""Measure the loader: images/s of one core, two v2 views an image, beside the reference recipe.

examples:
  python benchmarks/speed/loader.py
  python benchmarks/speed/loader.py --images /path/to/photographs --rounds 5 --json

Photographs are brought to the size and quality of ImageNet's (500x375, JPEG quality 92) in a
temporary folder, and read one by one by each loader in turn, in one process of one thread: the
reference recipe (Pillow and torchvision), lightly's transform of MoCo v2 where it is installed,
and ours with each backend; `device` only reads and decodes, its views are made elsewhere.
"""

import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from convert.errors import Parser, UserError, run_script
from convert.files import environment
from convert.progress import progress

GOALS = {"pillow": None, "opencv": 3.0, "device": 6.0}  # times the reference recipe
SIDE = (500, 375)  # px, ImageNet's usual size
QUALITY = 92
SUFFIXES = {".jpg", ".jpeg", ".png"}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; a goal that is missed is a number and no failure."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs (default: two)")
    parser.add_argument("--count", type=int, default=32, metavar="N", help="images (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5; the median")
    parser.add_argument("--size", type=int, default=224, metavar="PX", help="side of a view")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(argv)
    if min(args.count, args.rounds, args.size) < 1:
        raise UserError("--count, --rounds and --size: want 1 or more")
    with tempfile.TemporaryDirectory(prefix="moco-transfer-") as folder:
        files = write_photographs(args.images, Path(folder), args.count)
        found = measure(files, args.size, args.rounds, quiet=args.quiet)
    record = {"size": args.size, "images": args.count, "rounds": args.rounds}
    record |= {"loaders": found, "environment": environment()}
    print(json.dumps(record) if args.json else table(record))
    return 0


def write_photographs(source: Path | None, folder: Path, count: int) -> list[Path]:
    """Write photographs as ImageNet's: 500x375 px, JPEG quality 92.

    Raises:
        UserError: the source holds no photograph.
    """
    from PIL import Image

    if source is None:
        from sklearn.datasets import load_sample_images

        images = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    else:
        named = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not named:
            raise UserError(f"--images {source}: holds no {', '.join(sorted(SUFFIXES))}")
        images = [Image.open(path).convert("RGB") for path in named[:count]]
    (folder / "train/a").mkdir(parents=True)
    files = []
    for place in range(count):
        files.append(folder / "train/a" / f"{place:05d}.jpg")
        images[place % len(images)].resize(SIDE).save(files[-1], quality=QUALITY)
    return files


def measure(
    files: list[Path], size: int, rounds: int, *, quiet: bool = True
) -> dict[str, dict[str, float]]:
    """Read every file with every loader in turn, round after round.

    Returns:
        loader -> `images_per_s` of one core (median), and `ratio` to the reference recipe.
    """
    import torch

    torch.set_num_threads(1)
    loaders = make_loaders(files, size)
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in progress(range(rounds), rounds, "loading", "round", quiet=quiet):
        for name, load in loaders.items():
            began = time.perf_counter()
            for index in range(len(files)):
                load(index)
            seconds[name].append(time.perf_counter() - began)
    rates = {name: len(files) / statistics.median(values) for name, values in seconds.items()}
    base = rates["reference"]
    return {name: {"images_per_s": rate, "ratio": rate / base} for name, rate in rates.items()}


def make_loaders(files: list[Path], size: int) -> dict[str, Callable[[int], Any]]:
    """Make each loader: the index of an image -> its two views."""
    from PIL import Image

    from benchmarks.speed.reference_recipe import TwoCrops
    from pretrain.loader import BACKENDS, Views
    from pretrain.sources import image_folder
    from pretrain.views import AUGMENTATIONS

    two_crops = TwoCrops(size, aug_plus=True)
    loaders: dict[str, Callable[[int], Any]] = {
        "reference": lambda index: two_crops(Image.open(files[index]).convert("RGB"))
    }
    if importlib.util.find_spec("lightly"):
        from lightly.transforms.moco_transform import MoCoV2Transform

        lightly = MoCoV2Transform(input_size=size)
        loaders["lightly"] = lambda index: lightly(Image.open(files[index]).convert("RGB"))
    images = image_folder(files[0].parents[1])
    for backend in BACKENDS:
        views = Views(images, AUGMENTATIONS["v2"], size, seed=0, backend=backend)
        loaders[backend] = lambda index, views=views: views[0, index]  # type: ignore[misc]
    return loaders


def table(record: dict[str, Any]) -> str:
    """Write the numbers beside the goals."""
    lines = [f"two v2 views of {record['size']} px, images/s of one core, median of rounds"]
    for name, found in record["loaders"].items():
        goal = GOALS.get(name)
        wanted = f"  goal {goal:g}x" if goal else ""
        lines.append(f"{name:<10} {found['images_per_s']:8.1f}  {found['ratio']:5.2f}x{wanted}")
    hardware = record["environment"]["hardware"]
    return "\n".join([*lines, f"{hardware['cpu']}, commit {record['environment']['commit']}"])


if __name__ == "__main__":
    run_script(main)
