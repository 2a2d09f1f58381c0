"""Measure a detector's training beside the plain Detectron2 recipe: images/s and their ratios.

examples:
  python benchmarks/speed/detection.py
  python benchmarks/speed/detection.py --config configs/coco_R50_C4_1x_random.yaml --workers 8
  python benchmarks/speed/detection.py --rounds 5 --json SOLVER.IMS_PER_BATCH 4

The plain recipe is float32 with Detectron2's own loader and loop, and as many workers. All variants
take turns, a few iterations each, so that what else the machine does falls on all of them; the
numbers are medians over the rounds. Trailing KEY VALUE pairs override the recipe.
"""

import importlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from convert.errors import Parser, UserError, run_script
from convert.files import ROOT, environment
from convert.progress import progress

PLAIN = "plain Detectron2, fp32"
# What of ours is switched on.
VARIANTS: dict[str, dict[str, str]] = {
    PLAIN: {},
    "ours, fp32": {},
    "ours, channels_last": {"MOCO.CHANNELS_LAST": "True"},
    "ours, bf16": {"MOCO.PRECISION": "bf16"},
    "ours, bf16, channels_last": {"MOCO.PRECISION": "bf16", "MOCO.CHANNELS_LAST": "True"},
}
GOAL = 1.5  # times the plain recipe, for Mask R-CNN R50-C4 on one H100
EMBEDDED = ROOT / "configs" / "embedded_coco_R50_C4_moco.yaml"


def main(argv: list[str] | None = None) -> int:
    """Measure and print; a goal that is missed is a number and no failure."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--config", type=Path, default=EMBEDDED, metavar="FILE", help="default: embedded COCO")
    add("--iterations", type=int, default=5, metavar="N", help="a turn; default: 5")
    add("--rounds", type=int, default=5, metavar="N", help="default: 5; the median")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images")
    add("--json", action="store_true", help="print the numbers as JSON")
    add("opts", nargs="*", metavar="KEY VALUE", help="override the recipe")
    args = parser.parse_intermixed_args(argv)
    if min(args.rounds, args.iterations) < 1:
        raise UserError("--rounds, --iterations: want 1 or more")
    found = measure(args.config, args.opts, args.iterations, args.rounds, args.workers, args.quiet)
    record = {"config": args.config.name, "opts": args.opts, "workers": args.workers} | found
    record |= {"environment": environment()}
    print(json.dumps(record) if args.json else table(record))
    return 0


def measure(
    config: Path, pairs: list[str], iterations: int, rounds: int, workers: int, quiet: bool
) -> dict[str, Any]:
    """Let all variants take turns.

    Returns:
        `images_per_s` and `ratio` to the plain recipe, by variant.
    """
    recipes = importlib.import_module("transfer.detection.recipes")
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="moco-transfer-") as folder:
        steps = {}
        for name, switched in VARIANTS.items():
            own = ["MODEL.WEIGHTS", "", "MOCO.PRECISION", "fp32", "OUTPUT_DIR", folder, *pairs]
            own += ["DATALOADER.NUM_WORKERS", str(workers)]
            own += [word for pair in switched.items() for word in pair]
            cfg = recipes.load_recipe(config, own)
            recipes.fit_to_machine(cfg, 1)
            steps[name] = plain_steps(cfg) if name == PLAIN else our_steps(cfg)
            next(steps[name])  # warms up
        for _ in progress(range(rounds), rounds, "measuring", "round", quiet=quiet):
            for name, own_steps in steps.items():
                started = time.perf_counter()
                for _ in itertools.islice(own_steps, iterations):
                    pass
                seconds[name].append((time.perf_counter() - started) / iterations)
        batch = int(cfg.SOLVER.IMS_PER_BATCH)
        steps.clear()  # their loaders end before the folder does
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "images_per_s": {name: batch / each for name, each in medians.items()},
        "ratio": {name: medians[PLAIN] / each for name, each in medians.items()},
    }


def plain_steps(cfg: Any, mapper: Callable[..., Any] | None = None) -> Iterator[float]:
    """Train by Detectron2's own loader and a loop of six lines; yield the losses, without end.

    Args:
        cfg: a recipe, of one process; its MOCO keys are not looked at.
        mapper: from a record to a training example; default: the recipe's.
    """
    import torch
    from detectron2.data import build_detection_train_loader
    from detectron2.data.samplers import TrainingSampler
    from detectron2.modeling import build_model
    from detectron2.solver import build_lr_scheduler, build_optimizer
    from detectron2.utils.events import EventStorage

    from transfer.detection import datasets, roi_heads  # noqa: F401 (registers the head)

    data = datasets.load(cfg.DATASETS.TRAIN, training=True)
    sampler = TrainingSampler(len(data.dicts), seed=cfg.SEED)
    loader = build_detection_train_loader(cfg, dataset=data.dicts, mapper=mapper, sampler=sampler)
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for batch in loader:
        with EventStorage():
            loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        yield loss.item()


def our_steps(cfg: Any) -> Iterator[float]:
    """Train by our loop, without its hooks; yield the losses, without end."""
    import torch
    from detectron2.utils.events import EventStorage

    from transfer.detection import batches, datasets
    from transfer.detection.trainer import Trainer
    from transfer.detection.weights import build_detector

    data = datasets.load(cfg.DATASETS.TRAIN, training=True)
    torch.manual_seed(cfg.SEED)
    trainer = Trainer(cfg, build_detector(cfg), data, {}, quiet=True)
    trainer.data_loader = batches.training_batches(cfg, data.dicts)
    for trainer.iter in itertools.count():
        with EventStorage(trainer.iter) as trainer.storage:
            trainer.run_step()
            loss = float(trainer.storage.latest()["total_loss"][0])
        trainer.scheduler.step()
        yield loss


def table(record: dict[str, Any]) -> str:
    """Lay the numbers out beside the goal."""
    where = record["environment"]
    hardware = ", ".join(where["hardware"]["gpus"]) or where["hardware"]["cpu"]
    opts = f" {' '.join(record['opts'])}" if record["opts"] else ""
    lines = [
        f"{record['config']}{opts}, {record['workers']} workers, on {hardware}, "
        f"torch {where['versions']['torch']}, {where['versions']['detectron2']}",
        f"{'':28} images/s   times plain",
    ]
    for name, rate in record["images_per_s"].items():
        lines.append(f"{name:28} {rate:8.2f} {record['ratio'][name]:13.2f}")
    lines.append(f"goal: {GOAL} times plain for Mask R-CNN R50-C4 on one H100, with AP unchanged")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
