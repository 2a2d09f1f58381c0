"""One config habit for every script: defaults < `_BASE_` < file < flags and KEY VALUE pairs.

A config is a frozen dataclass. Its fields are the known keys; their annotations say how a word from
a command line or a YAML file is read.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from convert.errors import UserError, nearest

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "pretrain"

Config = TypeVar("Config")

BASE_KEY = "_BASE_"
CHECKPOINT_SUFFIXES = {".pth", ".tar", ".pt", ".pkl"}


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run; the defaults are the reference's, which are MoCo v1's.

    Sources: arXiv:1911.05722, Sec. 3.3 and 4; where v2 differs, arXiv:2003.04297, Sec. 2.
    """

    preset: str = ""  # auto: K, m, crops, batch and length from the number of images
    data: str = ""  # a folder, a list, shards, or `embedded`: see sources.py
    min_side: int = 8  # the least width and height of an image, pixels; smaller ones are skipped
    max_bad_share: float = 0.05  # of files that are skipped, 0..1; with more the run stops
    dictionary: str = "queue"  # queue, bank, end-to-end, simclr, or FILE.py:CLASS
    arch: str = "resnet50"
    stem: str = "imagenet"  # or cifar: 3x3, stride 1, no pool
    dim: int = 128  # C, length of an embedding
    K: int = 65536  # keys in the queue; negatives drawn from a bank
    m: float = 0.999  # momentum of the key encoder, Eq. (2)
    tau: float = 0.07  # temperature, Eq. (1); v2: 0.2
    mlp: bool = False  # v2: two-layer head
    symmetric: bool = False  # each view is query and key once, the losses add up
    bank_momentum: float = 0.0  # of a bank's entries; InstDisc: 0.5
    residual_gamma: float = 1.0  # weight of every block's residual branch at the start
    augmentation: str = "v1"  # v1, v2, cifar or simclr
    randaugment: tuple[int, ...] = ()  # beside it: RandAugment's operations and magnitude, `2 9`
    crop_scale: tuple[float, ...] = (0.2, 1.0)  # share of the image's area that a view keeps
    image_size: int = 224  # side of a view, pixels
    epochs: int = 200
    iterations: int = 0  # length of the run in steps, instead of epochs
    start_epoch: int = 0  # where a run that does not resume begins
    max_steps: int = 0  # stop after so many steps; 0: after the last epoch
    batch_size: int = 256  # images a step, on all processes
    accumulate: int = 1  # parts in which each process takes its images of a step
    bn_groups: int = 0  # batch norm groups over all processes; 0: 8 on one, else one each
    leak: bool = False  # allow a single group, where shuffling hides nothing
    allow_small_set: bool = False  # allow a queue as long as the set or longer
    init_from: str = ""  # a checkpoint whose backbone f_q starts from
    optimizer: str = "sgd"  # or lars
    lr: float = 0.03  # at batch 256
    schedule: str = "step"  # step: x gamma at the milestones; cos: half a cosine; decay: see below
    schedule_unit: str = "epochs"  # epochs or iterations: what milestones and decay_every count
    milestones: tuple[int, ...] = (120, 160)
    gamma: float = 0.1
    decay_every: int = 0  # decay: x gamma every so many
    cosine_start: int = 0  # the first epoch's number on the cosine; 1: the last one's rate is 0
    warmup_epochs: float = 0.0  # linear, from 0
    warmup_iterations: int = 0  # the same, in steps
    momentum: float = 0.9  # of the optimizer
    weight_decay: float = 1e-4
    seed: int = 0
    device: str = ""  # cpu or cuda; empty: the best at hand
    precision: str = ""  # fp32 or bf16; empty: the best at hand
    views: str = ""  # pillow, opencv or device: what realises them; empty: the fastest at hand
    channels_last: bool = True  # how images and weights lie in memory
    compile: bool = False  # compile the encoders
    workers: int = (
        -1
    )  # processes that load images on each machine; -1: its cores but one, 32 at most
    print_freq: int = 10  # steps between log lines
    knn_dir: str = ""  # a labelled folder, train/ and val/, for kNN votes; empty: the set's own
    knn_every: int = 0  # epochs between the votes; 0: none, or each epoch where knn_dir is named
    leak_meter: bool = False  # measure after every epoch what batch norm tells
    checkpoint_every: str = ""  # steps, or minutes as `5m`; empty: every epoch
    keep: int = 3  # checkpoints kept, the newest ones; 0: all

    @property
    def method(self) -> str:
        """The paper's name for these settings, as far as they tell; else one's own class's."""
        names = {"bank": "memory bank", "end-to-end": "end-to-end", "simclr": "SimCLR"}
        if self.dictionary != "queue":
            return names.get(self.dictionary, self.dictionary.rpartition(":")[2])
        ingredients = {"MLP": self.mlp, "aug+": self.augmentation == "v2"}
        ingredients["cos"] = self.schedule == "cos"
        if all(ingredients.values()):
            return "MoCo v2"
        extra = [name for name, there in ingredients.items() if there]
        return "MoCo v1" + "".join(f" + {name}" for name in extra)


def load_config(
    kind: type[Config],
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    pairs: Sequence[str] = (),
) -> Config:
    """Build a config from its defaults, a recipe and the command line, the later winning.

    Args:
        kind: a frozen dataclass whose every field has a default.
        file: a YAML recipe; its `_BASE_`, a path or a list of paths relative to it, comes first.
        flags: values of command line flags; a flag that was not given is None.
        pairs: trailing words, `KEY VALUE KEY VALUE ...`.

    Raises:
        UserError: a file that is missing or is not a mapping, an unknown key, a value of the wrong
            type, an odd number of words.
    """
    values: dict[str, Any] = {}
    if file is not None:
        for layer, content in layers(file):
            values |= _checked(kind, content, str(layer))
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    values |= _checked(kind, given, "command line")
    if len(pairs) % 2:
        raise UserError(f"command line: '{pairs[-1]}' has no value; overrides are KEY VALUE pairs")
    values |= _checked(kind, dict(zip(pairs[::2], pairs[1::2], strict=True)), "command line")
    return kind(**values)


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Split trailing words: an odd count means that the first one is the images' folder.

    Raises:
        UserError: that word is empty, which `Path` would take for the current folder.
    """
    if not len(words) % 2:
        return None, list(words)
    if not words[0]:  # as of a shell's variable that is not set
        raise UserError("images '': names no folder; want one, or no word at all")
    return Path(words[0]), list(words[1:])


def join_resume(argv: Sequence[str]) -> list[str]:
    """Let `--resume` take the next word only if that is `auto` or a checkpoint file.

    So `--resume lr 0.1` still overrides a key, and a checkpoint that does not exist is still meant
    as one.
    """
    joined: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--resume":
            following = words[0] if words else ""
            path = Path(following)
            if words and not following:  # as of a shell's variable that is not set
                raise UserError("--resume: names no checkpoint; want auto, a file, or no --resume")
            is_file = bool(following) and (path.is_file() or path.suffix in CHECKPOINT_SUFFIXES)
            word = f"--resume={words.pop(0) if following == 'auto' or is_file else 'auto'}"
        joined.append(word)
    return joined


def as_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain numbers, strings and lists, to be saved beside a result."""
    values = dataclasses.asdict(config)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def layers(file: Path, above: Sequence[Path] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the files that a recipe is made of, each with its own keys, the later winning.

    Args:
        file: the recipe; its `_BASE_`, a path or a list of paths relative to it, comes first.
        above: the files that named this one as their base.

    Raises:
        UserError: a file cannot be read, is no mapping, or is its own base.
    """
    if file.resolve() in above:
        raise UserError(f"recipe {above[-1]}: _BASE_ leads back to {file}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"recipe {file}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {file}: is not plain YAML ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {file}: found a {type(content).__name__}, want KEY: VALUE lines")
    bases = content.pop(BASE_KEY, [])
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in bases):
        raise UserError(f"recipe {file}: _BASE_ is {bases}, want a path or a list of paths")
    for base in bases:
        yield from layers(file.parent / Path(base).expanduser(), [*above, file.resolve()])
    yield file, content


def _checked(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    checked = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(
                f"{where}: unknown key '{key}'; known keys near it: {nearest(key, hints)}"
            )
        try:
            checked[key] = _read_value(hints[key], value)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {key} is {value!r}, want {_named(hints[key])}") from error
    return checked


def _named(wanted: Any) -> str:
    """Name a field's type in an error: `int`, or what a list of such values looks like."""
    if typing.get_origin(wanted) is tuple:
        return f"{typing.get_args(wanted)[0].__name__} values, as A,B or [A, B]"
    return getattr(wanted, "__name__", str(wanted))


def _read_value(wanted: Any, value: Any) -> Any:
    """Read one value as the type of its field; words from a command line are strings."""
    if typing.get_origin(wanted) is tuple:
        words = value.strip(" []()").replace(",", " ").split() if isinstance(value, str) else value
        return tuple(_read_value(typing.get_args(wanted)[0], word) for word in words)
    if wanted is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "false": False}[str(value).lower()] if _is_bool(value) else _fail()
    if wanted is str:
        return value if isinstance(value, str) else str(value)
    if isinstance(value, bool) or value is None:
        return _fail()
    return _read_int(value) if wanted is int else wanted(value)


def _read_int(value: Any) -> int:
    """Read a whole number; `1e3` and `1.0` are some too, and no digit of a long one is lost."""
    if isinstance(value, str | int):
        with contextlib.suppress(ValueError):
            return int(value)
    if not float(value).is_integer():
        return _fail()
    return int(float(value))


def _is_bool(value: Any) -> bool:
    return str(value).lower() in {"true", "false"}


def _fail() -> typing.NoReturn:
    raise ValueError
