"""Measure what a grid of linear classifiers costs beside a single one, a step on the same images.

examples:
  python benchmarks/speed/heads.py
  python benchmarks/speed/heads.py --batch-size 64 --classes 100 --json

A step is the forward pass of a frozen network on images that are in memory, and the update of the
fixed protocol's classifier, without or with a grid beside it; both in turn. Every classifier of the
grid is trained twice, to choose it and to judge it (transfer/classification/grid.py).
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from convert.errors import Parser, UserError, run_script
from convert.files import environment
from convert.progress import Progress, progress

GOAL_RATIO = 1.25  # of 50 heads to one: ResNet-50, 224 px, 1000 classes, batch 256


def main(argv: list[str] | None = None) -> int:
    """Measure and print; a goal that is missed is a number and no failure."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--arch", default="resnet50", metavar="NAME", help="default: resnet50")
    add("--image-size", type=int, default=224, metavar="N", help="px; default: 224")
    add("--batch-size", type=int, default=256, metavar="N", help="default: 256")
    add("--classes", type=int, default=1000, metavar="N", help="default: 1000")
    add("--heads", type=int, default=50, metavar="N", help="of the grid, on res5; default: 50")
    add("--runs", type=int, default=5, metavar="N", help="steps of each kind; default: 5")
    add("--device", metavar="NAME", help="cpu or cuda; default: the best at hand")
    add("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(argv)
    sizes = {k: getattr(args, k) for k in ("image_size", "batch_size", "classes", "heads", "runs")}
    small = [f"--{k.replace('_', '-')} {v}" for k, v in sizes.items() if v < 1]
    if small:
        raise UserError(f"{small[0]}: want 1 or more")
    record = measure(args.arch, args.device, quiet=args.quiet, **sizes)
    print(json.dumps(record) if args.json else table(record))
    return 0


def measure(
    arch: str,
    device: str | None,
    *,
    image_size: int,
    batch_size: int,
    classes: int,
    heads: int,
    runs: int,
    quiet: bool = True,
) -> dict[str, Any]:
    """Time steps without and with a grid, in turn."""
    import torch

    from convert.backbone import random_backbone
    from transfer.classification.features import FrozenNetwork, pick_device
    from transfer.classification.grid import Grid
    from transfer.classification.heads import Batch, Head, LinearConfig, train_epoch

    rates = tuple(0.01 * 1.2**i for i in range(heads))
    config = LinearConfig(lr=0.01, grid_lr=rates, grid_weight_decay=(0.0,))
    where = pick_device(device)
    network = FrozenNetwork(random_backbone(arch, 0), "res5", where)
    images = torch.randn(batch_size, 3, image_size, image_size)
    labels = torch.randint(classes, (batch_size,))
    places = torch.arange(batch_size)
    width = network(images[:1]).shape[1]
    head = Head.untrained(config, width, classes, 0, where)
    held = torch.arange(batch_size // 10)
    grid = Grid(config, {"res5": width}, classes, 0, where, batch_size, held)

    def step(beside: Callable[[Batch, float], None] | None) -> None:
        values = network(images)

        def batches() -> Iterator[Batch]:
            yield Batch(values, labels, places, {"res5": values})

        with Progress(batch_size, "step", quiet=True) as shown:
            train_epoch(head, batches(), 0, config, shown, beside)
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    kinds = {"one": lambda: step(None), "grid": lambda: step(grid.step)}
    times = in_turn(kinds, runs, quiet=quiet)
    found = {
        f"{kind}_{key}": statistics.median(run[key] for run in times[kind])
        for kind in kinds
        for key in ("s", "cpu_s")
    }
    sizes = {"image_size": image_size, "batch_size": batch_size, "classes": classes}
    return {
        "arch": arch,
        "device": str(where),
        "threads": torch.get_num_threads(),
        "heads": heads,
        "runs": runs,
        **sizes,
        **found,
        "ratio": found["grid_s"] / found["one_s"],
        "cpu_ratio": found["grid_cpu_s"] / found["one_cpu_s"],
        "all": times,
        "environment": environment(),
    }


def in_turn(
    kinds: dict[str, Callable[[], None]], runs: int, *, quiet: bool
) -> dict[str, list[dict[str, float]]]:
    """Time each kind of step once a run, one after the other, after one that does not count.

    Returns:
        kind -> of each run the seconds on the clock, `s`, and of the processor, `cpu_s`.
    """
    for step in kinds.values():
        step()
    times: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in progress(range(runs), runs, "steps of both kinds", "run", quiet=quiet):
        for kind, step in kinds.items():
            started, cpu = time.perf_counter(), time.process_time()
            step()
            used = {"s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
            times[kind].append(used)
    return times


def table(record: dict[str, Any]) -> str:
    """Say the numbers in lines for a terminal."""
    hardware = record["environment"]["hardware"]
    where = hardware["gpus"][0] if record["device"] != "cpu" and hardware["gpus"] else None
    cpu = f"{hardware['cpu']}, {record['threads']} threads, load {os.getloadavg()[0]:.1f}"
    return "\n".join(
        [
            f"{record['arch']}, {record['image_size']} px, {record['classes']} classes, batch "
            f"{record['batch_size']}; median of {record['runs']} steps",
            f"  one head:           {record['one_s']:9.3f} s, {record['one_cpu_s']:9.3f} s of CPU",
            f"  and {record['heads']:3} heads:       {record['grid_s']:9.3f} s, "
            f"{record['grid_cpu_s']:9.3f} s of CPU",
            f"  ratio:              {record['ratio']:9.3f}, of CPU time {record['cpu_ratio']:.3f} "
            f"(goal {GOAL_RATIO} at 50 heads, ResNet-50, 224 px, 1000 classes, batch 256)",
            f"on {where or cpu}",
        ]
    )


if __name__ == "__main__":
    run_script(main)
