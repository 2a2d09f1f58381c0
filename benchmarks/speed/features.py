"""Measure feature extraction beside a plain fp32 loop, images read from disk in both.

examples:
  python benchmarks/speed/features.py
  python benchmarks/speed/features.py --arch resnet18 --images 64 --json

The plain loop is what people write: torchvision's ResNet, transforms and DataLoader, contiguous
memory, fp32. Ours is what transfer/knn.py and the others run, in fp32 and in bf16, cache and
all. The three run in turn on the same JPEG images of noise.
"""

import json
import os
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

GOAL_SPEEDUP = 1.8  # over the plain loop, on a CPU
SIDES = (500, 375)  # px of an image, ImageNet's usual ones
KINDS = ("plain", "fp32", "bf16")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; a goal that is missed is a number and no failure."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--arch", default="resnet50", metavar="NAME", help="default: resnet50")
    add("--images", type=int, default=128, metavar="N", help="default: 128")
    add("--image-size", type=int, default=224, metavar="N", help="px; default: 224")
    add("--runs", type=int, default=3, metavar="N", help="of each kind; default: 3")
    add("--workers", type=int, metavar="N", help="reading processes; default: by device")
    add("--device", metavar="NAME", help="cpu or cuda; default: the best at hand")
    add("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(argv)
    for name in ("images", "image_size", "runs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: want 1 or more")
    with tempfile.TemporaryDirectory(prefix="moco-transfer-") as folder:
        record = measure(Path(folder), args)
    print(json.dumps(record) if args.json else table(record))
    return 0


def write_images(root: Path, count: int) -> Path:
    """Write a class folder of JPEG images."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    folder = root / "class"
    folder.mkdir(parents=True)
    for i in range(count):
        noise = draw.integers(0, 255, (SIDES[1] // 5, SIDES[0] // 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(SIDES).save(folder / f"{i}.jpg", quality=90)
    return root


def measure(folder: Path, args: Any) -> dict[str, Any]:
    """Time the three kinds in turn, and compare their features."""
    import torch

    from convert.backbone import random_backbone
    from pretrain.sources import image_folder
    from transfer.classification.features import (
        FrozenNetwork,
        frozen_features,
        pick_device,
        reading_processes,
    )
    from transfer.classification.request import ProbeConfig, Request

    images = image_folder(write_images(folder / "images", args.images))
    device = pick_device(args.device)
    workers = reading_processes(args.workers, device)
    backbone = random_backbone(args.arch, 0)
    plain = backbone.build().to(device)
    networks = {p: FrozenNetwork(backbone, "res5", device, precision=p) for p in KINDS[1:]}

    def extract(kind: str, run: int) -> Any:
        if kind == "plain":
            return plain_loop(plain, images.root, args.image_size, workers, device)
        output = folder / f"{kind}_{run}"
        request = Request("random", None, output, workers=args.workers, quiet=True)
        config = ProbeConfig(image_size=args.image_size, precision=kind)
        return frozen_features(networks[kind], images, config, request, kind).values

    times: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    found: dict[str, torch.Tensor] = {}
    for run in progress(range(args.runs + 1), args.runs + 1, "runs", "run", quiet=args.quiet):
        for kind in KINDS:
            started, cpu = time.perf_counter(), time.process_time()
            found[kind] = extract(kind, run)
            if run > 0:  # the first one warms up
                used = {"s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
                times[kind].append(used)
    norm = found["plain"].norm()
    record: dict[str, Any] = {
        "arch": args.arch,
        "images": args.images,
        "image_size": args.image_size,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "workers": workers,
        "runs": args.runs,
        "all": times,
    }
    for kind in KINDS:
        for key in ("s", "cpu_s"):
            record[f"{kind}_{key}"] = statistics.median(run[key] for run in times[kind])
        record[f"{kind}_difference"] = ((found[kind] - found["plain"]).norm() / norm).item()
    for kind in KINDS[1:]:
        record[f"{kind}_speedup"] = record["plain_s"] / record[f"{kind}_s"]
        record[f"{kind}_cpu_speedup"] = record["plain_cpu_s"] / record[f"{kind}_cpu_s"]
    return record | {"environment": environment()}


def plain_loop(network: Any, root: Path, image_size: int, workers: int, device: Any) -> Any:
    """Extract features as people write it; returns (N, D)."""
    import torch
    from torchvision import datasets, transforms

    from convert.pixels import IMAGENET_PIXELS
    from transfer.classification.request import RESIZE_TO_CROP

    view: Callable[[Any], Any] = transforms.Compose(
        [
            transforms.Resize(round(image_size * RESIZE_TO_CROP)),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_PIXELS.mean, IMAGENET_PIXELS.std),
        ]
    )
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(root), view), batch_size=64, num_workers=workers
    )
    with torch.no_grad():
        return torch.cat([network(batch.to(device)).cpu() for batch, _ in loader])


def table(record: dict[str, Any]) -> str:
    """Say the numbers in lines for a terminal."""
    hardware = record["environment"]["hardware"]
    lines = [
        f"{record['arch']}, {record['images']} JPEG images of {SIDES[0]} x {SIDES[1]} px to "
        f"{record['image_size']} px; median of {record['runs']} runs",
        f"{'':8}{'images/s':>10}{'CPU s':>9}{'speedup':>9}{'of CPU':>8}  difference",
    ]
    for kind in KINDS:
        rate = record["images"] / record[f"{kind}_s"]
        gain = record.get(f"{kind}_speedup", 1.0), record.get(f"{kind}_cpu_speedup", 1.0)
        lines.append(
            f"{kind:8}{rate:10.1f}{record[f'{kind}_cpu_s']:9.2f}{gain[0]:9.2f}{gain[1]:8.2f}"
            f"  {record[f'{kind}_difference']:.1e}"
        )
    lines.append(f"goal on a CPU: {GOAL_SPEEDUP} times the plain loop, in bf16")
    gpu = hardware["gpus"][0] if record["device"] != "cpu" and hardware["gpus"] else None
    cpu = f"{hardware['cpu']}, {record['threads']} threads, load {os.getloadavg()[0]:.1f}"
    return "\n".join([*lines, f"on {gpu or cpu}"])


if __name__ == "__main__":
    run_script(main)
