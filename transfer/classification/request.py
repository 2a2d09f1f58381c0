"""What the classification scripts share: their flags, their common keys, the folder of a run.

Nothing heavy is imported here, so that `--help` answers at once.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import UserError
from convert.files import output_folder
from pretrain.config import CHECKPOINT_SUFFIXES, split_words
from transfer.results import FILE_NAME, format_metrics

STAGES = ("res2", "res3", "res4", "res5")
HEAD_SOURCES = ("hidden", "output")
PRECISIONS = ("fp32", "bf16")
MOST_SEEDS = 2**32  # as scikit-learn takes them
# Of the reference's validation transform: Resize(256), then CenterCrop(224).
RESIZE_TO_CROP = 256 / 224


@dataclass(frozen=True)
class ProbeConfig:
    """The keys that every classification recipe knows.

    Attributes:
        image_size: side of the square that the backbone sees, px. A test image is resized so that
            its shorter side is 256/224 of it, and the middle is cut out.
        stage: where the feature is taken: `res2` to `res5`, average-pooled (res5 is the whole
            backbone); `res4-2x2`, pooled to 2x2 cells; `hidden` or `output` of pretraining's head.
        precision: of the network: fp32 or bf16; a feature is kept as float32 in both.
        seed: of the first repetition; the others count on from it.
        seeds: how many repetitions; their mean and spread are reported.
        feature_cache: folder where features are kept; empty: `features` in the output folder.
    """

    image_size: int = 224
    stage: str = "res5"
    precision: str = "fp32"
    seed: int = 0
    seeds: int = 1
    feature_cache: str = ""

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        for key in ("image_size", "seeds"):
            require_at_least(key, getattr(self, key), 1)
        if not 0 <= self.seed <= MOST_SEEDS - self.seeds:
            raise UserError(f"seed is {self.seed}, want 0 or more, and less than {MOST_SEEDS}")
        require_source("stage", self.stage)
        require_one_of("precision", self.precision, PRECISIONS)

    @property
    def resize(self) -> int:
        """The shorter side of a test image before its middle is cut out, px."""
        return round(self.image_size * RESIZE_TO_CROP)

    @property
    def all_seeds(self) -> range:
        """The seed of each repetition."""
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True)
class Request:
    """What a classification script was asked for, beside its protocol.

    Attributes:
        pretrained: a checkpoint, or the word `random`.
        arch: the network that the checkpoint must hold; None: whatever it holds.
        tensorboard: write what is logged for it too.
        also_test: folders of shifted test sets; see `shifted.py`.
        branch, pixels, stride_in_1x1: what is said of the checkpoint, in the converter's words.
        folder: holds `train/` and `val/`; None: the embedded digits.
        output_dir: everything that the run writes.
        recipe: the recipe's file; None: the defaults, which are ImageNet's protocol.
        resume: None, `auto` or a checkpoint of this run.
        device: None: the best at hand. workers: processes that read images; None: by the device.
        quiet: results and errors only.
    """

    pretrained: str
    folder: Path | None
    output_dir: Path
    recipe: Path | None = None
    arch: str | None = None
    resume: str | None = None
    device: str | None = None
    workers: int | None = None
    quiet: bool = False
    branch: str | None = None
    pixels: str | None = None
    stride_in_1x1: str | None = None
    also_test: Sequence[Path] = ()
    tensorboard: bool = False

    def recipe_name(self, task: str) -> str:
        """Name the recipe for a record: `linear_imagenet`, where none was given too."""
        return self.recipe.stem if self.recipe else f"{task}_imagenet"

    def say(self, text: str) -> None:
        """Print a line unless only results are wanted."""
        if not self.quiet:
            print(text, flush=True)


def require_at_least(key: str, value: float, least: float) -> None:
    """Refuse a value below the least one that makes sense, and what is no finite number."""
    if not least <= value < math.inf:
        raise UserError(f"{key} is {value}, want at least {least}")


def require_one_of(key: str, value: str, known: Collection[str]) -> None:
    """Refuse a word that is not among the known ones."""
    if value not in known:
        raise UserError(f"{key} is '{value}', want one of {', '.join(known)}")


def require_source(key: str, value: str) -> None:
    """Refuse a word that is no place where a feature can be taken."""
    split_source(value, key)


def split_source(source: str, key: str = "stage") -> tuple[str, int]:
    """Split a source into its stage and the cells on a side: `res4-2x2` -> ("res4", 2).

    Raises:
        UserError: it is none.
    """
    stage, dash, cells = source.partition("-")
    side, _, other = cells.partition("x")
    plain = not dash and (stage in STAGES or stage in HEAD_SOURCES)
    pooled = stage in STAGES and side == other and side.isdecimal() and 1 < int(side) < 8
    if not plain and not pooled:
        known = ", ".join((*STAGES, *HEAD_SOURCES))
        raise UserError(
            f"{key} is '{source}', want one of {known}, or a stage and its cells, as res4-2x2"
        )
    return stage, int(side) if pooled else 1


def add_flags(
    parser: argparse.ArgumentParser, images: str = "DIR/train and DIR/val, one folder a class"
) -> None:
    """Add the flags that every classification script has; `images` says what DIR is."""
    add = parser.add_argument
    add("words", nargs="*", metavar="DIR", help=images)
    add("--config", type=Path, metavar="FILE", help="a recipe; KEY VALUE pairs override it")
    add("--pretrained", default="", metavar="FILE", help="checkpoint, released name, or random")
    add("-a", "--arch", metavar="NAME", help="network the checkpoint must hold (default: its own)")
    add("--branch", metavar="NAME", help="which encoder of the checkpoint (default: its authors')")
    add("--pixels", metavar="WORDS", help="what it expects of an image, as for the converter")
    add("--stride-in-1x1", choices=["yes", "no"], help="where a bottleneck's stride is")
    add("--precision", metavar="NAME", help="of the network: fp32 or bf16 (default: fp32)")
    add("--output-dir", type=Path, metavar="DIR", help="default: output/TASK/RECIPE/CHECKPOINT")
    add("--resume", metavar="auto|FILE", help="go on with, or print again, the run in --output-dir")
    add("--seed", type=int, metavar="N", help="fixes everything that is random (default: 0)")
    add("--seeds", type=int, metavar="N", help="repeat; report mean and spread (default: 1)")
    add("-j", "--workers", type=int, metavar="N", help="reading processes (default: by device)")
    add("--device", metavar="NAME", help="cpu or cuda (default: the best at hand)")


def add_training_flags(
    parser: argparse.ArgumentParser, lr: str, schedule: str, weight_decay: str
) -> None:
    """Add the flags of a protocol that trains by SGD; the words are its defaults."""
    add = parser.add_argument
    add("-b", "--batch-size", type=int, metavar="N", help="of all processes (default: 256)")
    add("--epochs", type=int, metavar="N", help="default: 100")
    add("--lr", "--learning-rate", type=float, metavar="LR", dest="lr", help=f"default: {lr}")
    steps = f"epochs of lr / 10 (default: {schedule})"
    add("--schedule", type=int, nargs="*", metavar="N", help=steps)
    add("--momentum", type=float, metavar="M", help="of SGD (default: 0.9)")
    decay = f"default: {weight_decay}"
    add("--wd", "--weight-decay", type=float, metavar="W", dest="weight_decay", help=decay)
    add("-p", "--print-freq", type=int, metavar="N", help="steps between notes (default: 10)")


def flags_of(kind: type, args: argparse.Namespace) -> dict[str, Any]:
    """Return the parsed flags that are keys of a config, or fields of a request."""
    keys = {key.name for key in dataclasses.fields(kind)}
    return {key: value for key, value in vars(args).items() if key in keys}


def read_request(args: argparse.Namespace, task: str) -> tuple[Request, list[str]]:
    """Turn parsed flags into a request and the trailing KEY VALUE words.

    Args:
        args: what a parser with `add_flags` read.
        task: `linear`, `knn`: the folder under `output/`.

    Raises:
        UserError: no checkpoint was named, or a flag's value makes no sense.
    """
    if not args.pretrained:
        raise UserError("--pretrained is missing: name a checkpoint, a released one, or random")
    if args.workers is not None:
        require_at_least("--workers", args.workers, 0)
    folder, pairs = split_words(args.words)
    recipe = args.config.stem if args.config else "defaults"
    default = Path("output") / task / recipe / checkpoint_stem(args.pretrained)
    own = {"folder": folder, "output_dir": args.output_dir or default, "recipe": args.config}
    return Request(**flags_of(Request, args) | own), pairs


def checkpoint_stem(source: str) -> str:
    """Name a checkpoint without its folder and suffixes: `a/b.pth.tar` -> `b`."""
    path = Path(source)
    while path.suffix in CHECKPOINT_SUFFIXES:
        path = path.with_suffix("")
    return path.name


def claim_folder(
    request: Request,
    identity: Mapping[str, Any],
    may_change: Collection[str] = (),
) -> dict[str, Any] | None:
    """Make sure that the output folder is free, or holds the very run that is asked for.

    Args:
        request: names the folder, and whether an earlier run may be gone on with.
        identity: protocol, checkpoint, data and seeds of this run, flat.
        may_change: keys that a resumed run may have other values of.

    Returns:
        The finished record of the same run, where the folder holds one and `--resume` was given.

    Raises:
        UserError: it cannot be written, holds a result and `--resume` is missing, or holds the
            result of another run.
    """
    path = output_folder(request.output_dir) / FILE_NAME
    if not path.exists():
        return None
    record = _read_record(path)
    if request.resume is None:
        raise UserError(
            f"{request.output_dir}: already holds a result ({format_metrics(record)}); print it "
            "again with --resume, or choose another --output-dir"
        )
    earlier = record_identity(record)
    refuse_other_run(path, earlier, {k: v for k, v in identity.items() if k not in may_change})
    same = all(earlier.get(key) == value for key, value in identity.items())
    return record if same else None


def refuse_other_run(path: Path, earlier: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse to mix two runs in one folder: name the first keys in which they differ."""
    changed = [k for k, value in identity.items() if earlier.get(k) != value]
    if changed:
        found = ", ".join(f"{k} {_brief(earlier.get(k))}" for k in changed[:3])
        wanted = ", ".join(f"{k} {_brief(identity[k])}" for k in changed[:3])
        raise UserError(
            f"{path}: belongs to another run: found {found}; want {wanted}; "
            "choose another --output-dir"
        )


# What is said of a checkpoint beside its bytes, in its facts: other words make another network.
SAID = ("branch", "channel_order", "mean", "std", "stride_in_1x1")


def checkpoint_identity(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Say what makes a checkpoint, with what was said of it, the same as another."""
    return {"checkpoint": checkpoint["sha256"]} | {key: checkpoint[key] for key in SAID}


def record_identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """Say what run a finished record is of; see `Probe.identity`."""
    config = record["config"]
    return {
        **record["protocol"],
        **checkpoint_identity(record["checkpoint"]),
        "train": record["data"]["train"]["listing"],
        "val": record["data"]["val"]["listing"],
        "seed": config["seed"],
        "seeds": config["seeds"],
    }


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record_identity(record)
        format_metrics(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is no record of this script; choose another --output-dir"
        ) from error
    return record


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
