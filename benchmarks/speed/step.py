"""Measure MoCo v2's step: images/s and peak memory of the reference recipe, lightly's and ours.

examples:
  python benchmarks/speed/step.py
  python benchmarks/speed/step.py --photographs DIR --size 112 --batch-size 32 --workers 1
  python benchmarks/speed/step.py --device cuda --size 224 --batch-size 256 --steps 50 K 65536
  python benchmarks/speed/step.py --contenders ours --profile
  python benchmarks/speed/step.py --contenders reference,ours arch resnet18 K 4096

Alone, a step gets views that are already on the device. With --photographs it begins at JPEG files,
brought to the size and quality of ImageNet's: decoding, views and step. Every contender is a
process of its own, built once; they take their rounds in turn, so that what else the machine does
meets all of them. KEY VALUE pairs go to our recipe; arch, K and dim to the others too. Memory is
the process's largest resident set, and on a GPU the most that torch had allocated there. With
--profile our step is taken apart afterwards: the share of each operation's own time.
"""

import contextlib
import copy
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from convert.errors import Parser, UserError, nearest, run_script
from convert.files import environment
from convert.progress import progress
from pretrain.config import PretrainConfig, load_config

IMAGENET = 1_281_167  # images
Steps = Callable[[int], float]  # takes so many steps, returns their seconds
SIZES = ("mlp", "true", "tau", "0.2", "augmentation", "v2", "allow_small_set", "true")


@dataclass(frozen=True)
class Setting:
    """What all contenders are measured at.

    Attributes:
        config: our recipe, with image_size, batch_size, arch, K, dim and workers of all.
        photographs: a folder of class folders; None: the step alone.
    """

    config: PretrainConfig
    photographs: Path | None


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("words", nargs="*", metavar="KEY VALUE", help="keys of our recipe")
    add("--photographs", type=Path, metavar="DIR", help="measure from files on: photographs")
    add("--contenders", metavar="A,B", help=f"of {', '.join(CONTENDERS)}; default: all at hand")
    add("--device", default="", help="cpu or cuda; default: the best at hand")
    add("--size", type=int, default=112, metavar="PX", help="side of a view (default: 112)")
    add("--batch-size", type=int, default=32, metavar="N", help="default: 32")
    add("--workers", type=int, default=1, metavar="N", help="processes that load (default: 1)")
    add("--steps", type=int, default=5, metavar="N", help="of a round (default: 5)")
    add("--rounds", type=int, default=5, metavar="N", help="default: 5; the median")
    add("--profile", action="store_true", help="say where the time of our step goes")
    add("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_intermixed_args(argv)
    if min(args.size, args.batch_size, args.steps, args.rounds) < 1:
        raise UserError("--size, --batch-size, --steps and --rounds: want 1 or more")
    config = load_config(PretrainConfig, None, pairs=[*SIZES, *args.words])
    config = replace(
        config,
        device=args.device,
        image_size=args.size,
        batch_size=args.batch_size,
        workers=args.workers if args.photographs else 0,
        knn_every=0,
    )
    names = chosen(args.contenders)
    with tempfile.TemporaryDirectory(prefix="moco-transfer-") as folder:
        photographs = None
        if args.photographs is not None:
            from benchmarks.speed.loader import write_photographs

            count = args.batch_size * (args.steps + 3)
            photographs = write_photographs(args.photographs, Path(folder), count)[0].parents[1]
        setting = Setting(config, photographs)
        entries = {name: (name, setting) for name in names}
        found = measure(entries, args.steps, args.rounds, quiet=args.quiet)
        shares = profile(setting, args.steps) if args.profile else {}
    record = {"size": args.size, "batch_size": args.batch_size, "arch": config.arch, "K": config.K}
    record |= {"end_to_end": args.photographs is not None, "workers": config.workers}
    record |= {"contenders": found, "profile": shares, "environment": environment()}
    print(json.dumps(record) if args.json else table(record))
    return 0


def chosen(words: str | None) -> list[str]:
    """Return the contenders asked for, or those that are installed.

    Raises:
        UserError: there is no such contender, or it is not installed.
    """
    lightly = importlib.util.find_spec("lightly") is not None
    if words is None:
        return [name for name in CONTENDERS if name != "lightly" or lightly]
    names = words.split(",")
    for name in names:
        if name not in CONTENDERS:
            raise UserError(f"--contenders: there is no '{name}'; try {nearest(name, CONTENDERS)}")
        if name == "lightly" and not lightly:
            raise UserError("--contenders lightly: it is not installed; pip install lightly")
    return names


def measure(
    entries: Mapping[str, tuple[str, Setting]], steps: int, rounds: int, *, quiet: bool = True
) -> dict[str, dict[str, Any]]:
    """Let contenders take their rounds in turn.

    Args:
        entries: name -> which of `CONTENDERS` it is, and at which setting.
        steps: of a round.
        rounds: how many.
        quiet: show no progress.

    Returns:
        name -> `images_per_s` (median), all `rounds`, `ratio` to the first entry's, `host_MiB`, on
        a GPU `device_MiB`, and `what` ran.
    """
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        lines = {
            name: stack.enter_context(_contender(context, setting, contender))
            for name, (contender, setting) in entries.items()
        }
        rates: dict[str, list[float]] = {name: [] for name in entries}
        for _ in progress(range(rounds), rounds, "measuring", "round", quiet=quiet):
            for name, line in lines.items():
                seconds = _ask(line, steps)
                rates[name].append(steps * entries[name][1].config.batch_size / seconds)
        found = {name: _ask(line, 0) for name, line in lines.items()}
    base = statistics.median(next(iter(rates.values())))
    for name, values in rates.items():
        rate = statistics.median(values)
        found[name] |= {"images_per_s": rate, "rounds": values, "ratio": rate / base}
    return found


@contextlib.contextmanager
def _contender(context: Any, setting: Setting, name: str) -> Iterator[Connection]:
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, setting, name))
    process.start()
    theirs.close()
    try:
        _ask(ours, 1)  # warm-up: caches, a compiler
        yield ours
    finally:
        ours.close()  # which ends it
        process.join()


def _ask(line: Connection, steps: int) -> Any:
    line.send(steps)
    answer = line.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def serve(line: Connection, setting: Setting, name: str) -> None:
    """Be a contender: take the steps that are asked for, until nobody asks any more.

    Args:
        line: gets a number of steps and sends their seconds; for 0 steps it sends the memory.
        setting: of the measurement.
        name: which contender.
    """
    import torch

    # What a contender says is not part of the numbers, which may be asked for as JSON.
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(EOFError), line:
        try:
            take, what = CONTENDERS[name](setting)
        except UserError as error:
            line.recv()
            line.send(error)
            return
        while True:
            steps = line.recv()
            if steps:
                line.send(take(steps))
                continue
            memory = {"what": what, "host_MiB": _peak_kib() / 1024}
            if torch.cuda.is_available():
                memory["device_MiB"] = torch.cuda.max_memory_allocated() / 2**20
            line.send(memory)


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reference(setting: Setting) -> tuple[Steps, str]:
    """Build the reference recipe: fp32, NCHW, tensor by tensor."""
    import torch

    from benchmarks.speed import reference_recipe as recipe

    config, device = setting.config, _device(setting)
    model = recipe.PlainMoCo(config.arch, config.dim, config.K, config.m, config.tau).to(device)
    wrapped, optimizer = recipe.build(model)
    tf32 = "TF32 convolutions" if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else ""
    what = ", ".join(filter(None, ["fp32, NCHW", tf32]))
    batches = _plain_batches(setting, recipe.TwoCrops(config.image_size, aug_plus=True))

    def take(views: list[Any]) -> float:
        return recipe.take_step(wrapped, optimizer, [view.to(device) for view in views])

    return _steps(batches, take), what


def lightly(setting: Setting) -> tuple[Steps, str]:
    """Build lightly's MoCo v2, from its modules as its documentation puts them together."""
    import torch
    import torchvision
    from lightly.loss import NTXentLoss
    from lightly.models import utils
    from lightly.models.modules import MoCoProjectionHead
    from lightly.transforms.moco_transform import MoCoV2Transform
    from torch import nn

    config, device = setting.config, _device(setting)
    network = getattr(torchvision.models, config.arch)()
    width = network.fc.in_features
    network.fc = nn.Identity()
    head = MoCoProjectionHead(width, width, config.dim)
    query = nn.Sequential(network, head).to(device)
    key = copy.deepcopy(query)
    utils.deactivate_requires_grad(key)
    criterion = NTXentLoss(config.tau, memory_bank_size=(config.K, config.dim)).to(device)
    optimizer = torch.optim.SGD(query.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    batches = _plain_batches(setting, MoCoV2Transform(input_size=config.image_size))

    def take(views: list[Any]) -> float:
        x_q, x_k = (view.to(device) for view in views)
        utils.update_momentum(query, key, config.m)
        q = query(x_q)
        with torch.no_grad():
            shuffled, order = utils.batch_shuffle(x_k)
            k = utils.batch_unshuffle(key(shuffled), order)
        loss = criterion(q, k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return _steps(batches, take), "fp32, NCHW"


def ours(setting: Setting) -> tuple[Steps, str]:
    """Build our run, with whatever it takes by default on this machine."""
    import torch

    from convert.allocator import keep_freed_memory
    from pretrain.checks import check
    from pretrain.loader import on_device
    from pretrain.loop import Run
    from pretrain.sources import ArrayList, ImageList, image_folder

    keep_freed_memory()
    config = setting.config
    if setting.photographs is None:
        images: ImageList = ArrayList(Path("none"), (), pixels=_nothing())
    else:
        images = image_folder(setting.photographs)
    config = check(replace(config, epochs=10**6), len(images))
    run = Run(config, images, Path("nowhere"), None)
    what = f"{config.precision}, channels_last, views {config.views}, {config.bn_groups} groups"
    if setting.photographs is None:
        draw = torch.Generator(run.device).manual_seed(0)
        shape = (config.batch_size, 3, config.image_size, config.image_size)
        views = [torch.randn(shape, generator=draw, device=run.device) for _ in range(2)]
        batches: Iterator[Any] = iter(lambda: views, None)
    else:
        batches = run.batches()

    def take(batch: Any) -> Any:
        alone = setting.photographs is None
        views = batch if alone else on_device(batch, run.device, config.image_size)
        loss = run.take_step(views)
        run.step += 1
        return loss

    return _steps(batches, take), what


CONTENDERS: dict[str, Callable[[Setting], tuple[Steps, str]]] = {
    "reference": reference,
    "lightly": lightly,
    "ours": ours,
}


def profile(setting: Setting, steps: int) -> dict[str, float]:
    """Return the share of each operation's own time in our step, percent: those of 1 and more."""
    import torch
    from torch.profiler import profile as profiled

    with contextlib.redirect_stdout(sys.stderr):
        take, _ = ours(setting)
    take(2)
    with profiled() as seen:
        take(steps)
    cuda = torch.cuda.is_available()
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in seen.key_averages()
    }
    shares = {key: 100 * time / sum(times.values()) for key, time in times.items()}
    return {
        key: shares[key] for key in sorted(shares, key=shares.__getitem__)[::-1] if shares[key] >= 1
    }


def _steps(batches: Iterator[Any], take: Callable[[Any], Any]) -> Steps:
    """Return what takes steps and waits for the device once, as a run does at its log lines."""
    import torch

    def steps(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            take(next(batches))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return steps


def _plain_batches(setting: Setting, transform: Callable[[Any], Any]) -> Iterator[Any]:
    import torch
    import torchvision
    from torch.utils.data import DataLoader

    config, device = setting.config, _device(setting)
    if setting.photographs is None:
        shape = (config.batch_size, 3, config.image_size, config.image_size)
        views = [torch.randn(shape, device=device) for _ in range(2)]
        while True:
            yield views
    images = torchvision.datasets.ImageFolder(str(setting.photographs), transform)
    loader = DataLoader(
        images,
        config.batch_size,
        shuffle=True,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
        persistent_workers=config.workers > 0,
    )
    while True:
        for views, _ in loader:
            yield views


def _nothing() -> Any:
    """Return as many pixels as ImageNet-1k has images, without the memory: only their number."""
    import numpy as np

    return np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (IMAGENET, 1, 1, 3))


def _device(setting: Setting) -> Any:
    import torch

    from pretrain.checks import best_device

    return torch.device(best_device(setting.config.device))


def table(record: dict[str, Any]) -> str:
    """Write the numbers beside each other."""
    begins = "from JPEG files" if record["end_to_end"] else "step alone"
    title = f"MoCo v2, {record['arch']}, {record['size']} px, batch {record['batch_size']}, "
    lines = [f"{title}K {record['K']}, {begins}; median of rounds"]
    first = next(iter(record["contenders"]))
    for name, found in record["contenders"].items():
        memory = f"{found['host_MiB']:7.0f} MiB"
        if "device_MiB" in found:
            memory += f", on the device {found['device_MiB']:.0f} MiB"
        rate = f"{found['images_per_s']:9.1f} images/s  {found['ratio']:5.2f}x {first}"
        lines.append(f"{name:<10}{rate}  {memory}  {found['what']}")
    lines += [f"{share:9.1f}%  {key}" for key, share in record["profile"].items()]
    hardware, commit = record["environment"]["hardware"], record["environment"]["commit"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    return "\n".join([*lines, f"{machine}, commit {commit}"])


if __name__ == "__main__":
    run_script(main)
