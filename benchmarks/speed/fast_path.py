"""Train the same seeds on the slow path and on the fast one: whether the loss curve stays.

examples:
  python benchmarks/speed/fast_path.py
  python benchmarks/speed/fast_path.py --steps 500 --seeds 5 --output-dir output/fast_path
  python benchmarks/speed/fast_path.py --device cuda arch resnet50 image_size 224

Slow: fp32, views by Pillow. Fast: what a run takes by default on this machine (bf16 where the
processor has it, views by OpenCV or on the device). MoCo v2 on the embedded images, ResNet-18 at 64
pixels in batches of 32 unless KEY VALUE says otherwise. Leaves `fast_path.json` with every loss and
`fast_path.png` with both curves, each the mean over the seeds in a band from the lowest to the
highest. The paths take turns, so that what else the machine does meets both.
"""

import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from convert.errors import Parser, UserError, run_script
from convert.files import atomic_write, environment, output_folder, write_json
from convert.progress import progress
from pretrain.config import PretrainConfig, as_dict, load_config
from pretrain.flags import DEFAULT_RECIPE

PATHS: dict[str, dict[str, Any]] = {"slow": {"precision": "fp32", "views": "pillow"}, "fast": {}}
SIZES = ("arch", "resnet18", "image_size", "64", "batch_size", "32")
Losses = dict[str, list[list[float]]]  # of each path: a seed's losses, step by step


def main(argv: list[str] | None = None) -> int:
    """Train, compare, print, and leave the numbers and the picture."""
    parser = Parser(__doc__ or "")
    parser.add_argument("words", nargs="*", metavar="KEY VALUE", help="keys of the recipe")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--device", default="", help="cpu or cuda; default: the best at hand")
    parser.add_argument("--output-dir", type=Path, default=Path("output/fast_path"), metavar="DIR")
    args = parser.parse_intermixed_args(argv)
    if args.steps < 2 or args.seeds < 1:
        raise UserError(f"--steps {args.steps} --seeds {args.seeds}: want 2 or more, 1 or more")
    config = load_config(PretrainConfig, DEFAULT_RECIPE, pairs=[*SIZES, *args.words])
    config = replace(config, device=args.device, knn_every=0, print_freq=1, checkpoint_every="")
    config = replace(config, iterations=args.steps, checkpoint_every=str(args.steps))
    folder = output_folder(args.output_dir)
    record = measure(config, args.seeds, quiet=args.quiet)
    write_json(folder / "fast_path.json", record)
    draw(record["losses"], folder / "fast_path.png")
    print(table(record), f"{folder / 'fast_path.json'}, {folder / 'fast_path.png'}", sep="\n")
    return 0


def measure(config: PretrainConfig, seeds: int, *, quiet: bool = False) -> dict[str, Any]:
    """Train every seed on both paths; return the losses, the rates and what they come to."""
    runs = [(seed, path) for seed in range(seeds) for path in PATHS]
    losses: Losses = {path: [] for path in PATHS}
    rates: dict[str, list[float]] = {path: [] for path in PATHS}
    settings: dict[str, str] = {}
    for seed, path in progress(runs, len(runs), "training", "run", quiet=quiet):
        found, rate, settings[path] = train_one(replace(config, seed=seed, **PATHS[path]))
        losses[path].append(found)
        rates[path].append(rate)
    return {
        "config": as_dict(config),
        "paths": settings,
        "seeds": seeds,
        "final_loss": {path: [last_tenth(one) for one in losses[path]] for path in PATHS},
        "steps_per_s": rates,
        "losses": losses,
        "environment": environment(),
    }


def train_one(config: PretrainConfig) -> tuple[list[float], float, str]:
    """Return one run's loss of every step, its steps a second after the first, and its path."""
    from pretrain.checks import check
    from pretrain.loop import train
    from pretrain.monitor import read_log
    from pretrain.sources import open_set

    images, _ = open_set(config.data)
    config = check(config, len(images))
    with tempfile.TemporaryDirectory(prefix="moco-transfer-") as folder:
        train(config, images, Path(folder), quiet=True)
        lines = [line for line in read_log(Path(folder)) if "loss" in line]
    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
    path = f"{config.precision}, views {config.views}"
    return [line["loss"] for line in lines], (len(lines) - 1) / seconds, path


def last_tenth(losses: list[float]) -> float:
    """Return the mean loss of the last tenth of the steps."""
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def table(record: dict[str, Any]) -> str:
    """Say the numbers in lines for a terminal."""
    finals, rates = record["final_loss"], record["steps_per_s"]
    lines = [f"{'':6}{'loss of the last tenth':>24}{'lowest':>9}{'highest':>9}{'steps/s':>9}"]
    for name in PATHS:
        mean, rate = statistics.fmean(finals[name]), statistics.median(rates[name])
        ends = f"{min(finals[name]):9.3f}{max(finals[name]):9.3f}"
        lines.append(f"{name:6}{mean:24.3f}{ends}{rate:9.2f}")
    pairs = list(zip(*(finals[name] for name in PATHS), strict=True))
    gaps = [fast - slow for slow, fast in pairs]
    spread = max(finals["slow"]) - min(finals["slow"])
    ratio = statistics.median(
        fast / slow for slow, fast in zip(*(rates[name] for name in PATHS), strict=True)
    )
    config, hardware = record["config"], record["environment"]["hardware"]
    return "\n".join(
        [
            *lines,
            *(f"{name}: {record['paths'][name]}" for name in PATHS),
            f"fast - slow, seed by seed: {', '.join(f'{gap:+.3f}' for gap in gaps)}; "
            f"the slow path's seeds lie {spread:.3f} apart",
            f"the fast path takes {ratio:.2f} times the steps a second",
            f"{config['arch']}, {config['image_size']} px, batch {config['batch_size']}, "
            f"{config['iterations']} steps, {record['seeds']} seeds; "
            f"{', '.join(hardware['gpus']) or hardware['cpu']}, {hardware['cores']} cores",
        ]
    )


def draw(losses: Losses, path: Path) -> None:
    """Draw both curves, smoothed over a fortieth of the steps, with the seeds' spread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(PATHS, ("#1f4e79", "#c55a11"), strict=True):
        width = max(1, len(losses[name][0]) // 40)
        seeds = [_smooth(one, width) for one in losses[name]]
        steps = range(width, width + len(seeds[0]))
        columns = list(zip(*seeds, strict=True))
        axes.plot(steps, [statistics.fmean(c) for c in columns], color=colour, label=name)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    seeds_said = f"mean and range of {len(losses['slow'])} seeds"
    axes.set(xlabel="step", ylabel=f"loss, running mean of {width}", title=seeds_said)
    axes.legend(frameon=False)
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def _smooth(values: list[float], width: int) -> list[float]:
    return [statistics.fmean(values[i : i + width]) for i in range(len(values) - width + 1)]


if __name__ == "__main__":
    run_script(main)
