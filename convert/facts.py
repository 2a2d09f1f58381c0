"""What is known of a backbone beside its tensors, and how well.

Pixels and stride are not in the tensors. Each is *known* (our own files say it, or the layout's
code fixes it), *given* (on the command line, or by a config beside the file) or *assumed*; where a
wrong assumption is likely (Detectron2's and Caffe2's files) nothing is assumed.
"""

import ast
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from convert.errors import UserError
from convert.files import sha256
from convert.layouts import Recognised
from convert.pixels import (
    IMAGENET_PIXELS,
    ORDERS,
    UNIT_PIXELS,
    Pixels,
    parse_pixels,
    plausible,
)
from convert.resnets import IMAGENET_STEM

EXTRA_KEY = "moco_transfer"  # where our own files keep facts beside what other tools read
KNOWN, GIVEN, ASSUMED, UNKNOWN = "known", "given", "assumed", "unknown"
# Torchvision's ResNets put a bottleneck's stride into its 3x3 convolution.
STRIDE_IN_1X1 = False
# What of a pretraining's config is told beside its checkpoint, by the dictionary that it used.
TRAINING = (
    *("dictionary", "tau", "symmetric", "augmentation", "image_size"),
    *("epochs", "batch_size", "optimizer", "lr", "schedule", "seed"),
)
OF_DICTIONARY = {"queue": ("K", "m"), "bank": ("K", "bank_momentum")}
# Converters that sign their work and always start from torchvision's networks.
AUTHORS_OF_TORCHVISION = {"MOCO", "torchvision"}
NO_GUESS = {"detectron2", "caffe2"}
STYLES = ("pytorch", "caffe")  # OpenMMLab's words for the stride's place
PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Facts:
    """What is known of a backbone beside its tensors.

    Attributes:
        name: the file's name, or the words for a random initialisation.
        sha256: of the source file.
        layout: its entry in `layouts.py`; branch: which of its networks was taken.
        arch: a name of `resnets.ARCHS`; method: what trained it; epoch: how long, if said.
        pixels: what it expects of an image.
        stride_in_1x1: whether a bottleneck's stride is in its first convolution (Caffe2's MSRA).
        stem: `imagenet`, or `cifar` for a 3x3 convolution without a pool.
        sources: how well pixels and stride are known.
        dropped: tensors of the file that are not this backbone.
        dropped_parts: the same by the part of the file that they stood in.
        dtype: what the weights were stored as.
        branches: all that the file has.
        splits: of batch norms whose statistics were averaged into one.
        digest: of the weights; facts beside other weights are not theirs.
        training: the settings of our own pretraining by their keys; empty for others' files.
    """

    name: str
    sha256: str
    layout: str
    branch: str
    arch: str
    method: str
    epoch: int | None = None
    pixels: Pixels = IMAGENET_PIXELS
    stride_in_1x1: bool = STRIDE_IN_1X1
    stem: str = IMAGENET_STEM
    sources: Mapping[str, str] = field(
        default_factory=lambda: {"pixels": KNOWN, "stride_in_1x1": KNOWN}
    )
    dropped: int = 0
    dropped_parts: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "float32"
    branches: tuple[str, ...] = ("query",)
    splits: int = 1
    digest: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists; the pixels' entries stand among the others."""
        values = asdict(self)
        values |= values.pop("pixels")
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Facts":
        """Read what `as_dict` wrote."""
        rest = dict(values)
        mean, std = tuple(rest.pop("mean")), tuple(rest.pop("std"))
        rest["branches"] = tuple(rest.get("branches", ("query",)))
        return cls(pixels=Pixels(rest.pop("channel_order"), mean, std), **rest)


@dataclass(frozen=True)
class Options:
    """What is said of a source beside its file; nothing where a field is None.

    Attributes:
        branch: which of a method's encoders: query, key, ema, teacher, student; default: the one
            that its authors evaluate.
        pixels: what it expects of an image.
        stride_in_1x1: whether a bottleneck's stride is in its first convolution.
        unknown_too: describe a file although its pixels or its stride are not known.
    """

    branch: str | None = None
    pixels: Pixels | None = None
    stride_in_1x1: bool | None = None
    unknown_too: bool = False

    @classmethod
    def read(cls, branch: str | None, pixels: str | None, stride_in_1x1: str | None) -> "Options":
        """Read the words of a command line.

        Raises:
            UserError: the pixels are none.
        """
        stride = None if stride_in_1x1 is None else stride_in_1x1 == "yes"
        return cls(branch, None if pixels is None else parse_pixels(pixels), stride)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        pixels = None if self.pixels is None else json.loads(json.dumps(asdict(self.pixels)))
        return {"branch": self.branch, "pixels": pixels, "stride_in_1x1": self.stride_in_1x1}


@dataclass(frozen=True)
class Expected:
    """What a backbone expects: pixels and the stride's place, each with how well it is known."""

    pixels: Pixels
    stride_in_1x1: bool
    sources: dict[str, str]


def expected(
    found: Recognised, stem: str, values: Mapping[str, Any], path: Path, options: Options
) -> Expected:
    """Settle what a recognised backbone expects.

    Args:
        found: the backbone.
        stem: of its network.
        values: what its file holds.
        path: the file; a config beside it may tell.
        options: what the command line says.

    Raises:
        UserError: it would have to be guessed, where guesses are often wrong.
    """
    given = {"pixels": options.pixels, "stride_in_1x1": options.stride_in_1x1}
    sources = {key: GIVEN for key, value in given.items() if value is not None}
    settled = {key: value for key, value in given.items() if value is not None}
    for source, say in _ways(found, stem, values, path, options):
        if len(settled) == len(given):
            break
        for key, value in say().items():
            if value is not None and key not in settled:
                settled[key], sources[key] = value, source
    for key, flag in (("pixels", "--pixels imagenet"), ("stride_in_1x1", "--stride-in-1x1 no")):
        if key not in settled:
            raise UserError(
                f"checkpoint {path}: a file of {found.layout.name} does not say its "
                f"{key.replace('_', ' ')}, and models of both kinds are common; say it, as {flag}, "
                "or put the config.yaml of its training beside it"
            )
    return Expected(settled["pixels"], settled["stride_in_1x1"], sources)  # type: ignore[arg-type]


def _ways(
    found: Recognised, stem: str, values: Mapping[str, Any], path: Path, options: Options
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield who may tell what the command line does not, the most trusted first."""
    layout = found.layout
    yield KNOWN, lambda: _written_down(values, path)
    # Code that fixes ImageNet's statistics fixes them for ImageNet's stem.
    fixed = layout.pixels if stem == IMAGENET_STEM or layout.pixels != IMAGENET_PIXELS else None
    yield KNOWN, lambda: {"pixels": fixed, "stride_in_1x1": layout.stride_in_1x1}
    yield GIVEN, lambda: _beside(found.dialect, path)
    guess = {"pixels": IMAGENET_PIXELS, "stride_in_1x1": STRIDE_IN_1X1}
    if found.dialect not in NO_GUESS:
        yield ASSUMED, lambda: guess
    elif options.unknown_too:
        yield UNKNOWN, lambda: guess


def training(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that our own pretraining has left in its checkpoint; else nothing."""
    ours = values.get(EXTRA_KEY)
    text = ours.get("config") if isinstance(ours, Mapping) else None
    try:
        config = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        return {}
    keys = (*OF_DICTIONARY.get(str(config.get("dictionary")), ()), *TRAINING)
    found = {key: config[key] for key in keys if isinstance(config.get(key), str | int | float)}
    images = ours.get("images") if isinstance(ours, Mapping) else None
    return found | ({"images": images} if isinstance(images, int) else {})


def _written_down(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what the file itself says, beside its tensors."""
    ours = values.get(EXTRA_KEY)
    if isinstance(ours, Mapping) and isinstance(ours.get("pixels"), Mapping):  # our own detectors
        said = ours["pixels"]
        statistics = (said["MODEL.PIXEL_MEAN"], said["MODEL.PIXEL_STD"])
        return {
            "pixels": Pixels.from_detectron2(said["INPUT.FORMAT"], *statistics),
            "stride_in_1x1": said["MODEL.RESNETS.STRIDE_IN_1X1"],
        }
    if values.get("__author__") in AUTHORS_OF_TORCHVISION:
        return {"pixels": IMAGENET_PIXELS, "stride_in_1x1": False}
    meta = values.get("meta")
    if isinstance(meta, Mapping):
        text = next((meta[k] for k in ("cfg", "config") if isinstance(meta.get(k), str)), "")
        return _read_openmmlab(text, path)
    return {}


def _read_openmmlab(text: str, path: Path) -> dict[str, Any]:
    """Read pixels and stride in the config that OpenMMLab's checkpoints carry as Python text.

    Raises:
        UserError: it holds several, as of a student and its teacher.
    """
    parts = list(_dictionaries(text))
    styles = {part["style"] == "caffe" for part in parts if part.get("style") in STYLES}
    pixels = {found for part in parts if (found := _openmmlab_pixels(part))}
    for name, values, flag in (
        ("styles", styles, "--stride-in-1x1"),
        ("pixels", pixels, "--pixels"),
    ):
        if len(values) > 1:
            raise UserError(
                f"checkpoint {path}: the config inside names {len(values)} {name}; say which "
                f"holds, with {flag}"
            )
    return {
        "stride_in_1x1": next(iter(styles), None),
        "pixels": next(iter(pixels), None),
    }


def _dictionaries(text: str) -> Iterator[dict[str, Any]]:
    """Yield the plain entries of every `dict(...)` and `{...}` in Python text; nothing is run."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in nodes:
        pairs: list[tuple[Any, ast.expr]] = []
        if isinstance(node, ast.Call):
            pairs = [(word.arg, word.value) for word in node.keywords]
        elif isinstance(node, ast.Dict):
            keys = (getattr(key, "value", None) for key in node.keys)
            pairs = list(zip(keys, node.values, strict=True))
        found = {}
        for key, value in pairs:
            with contextlib.suppress(ValueError, TypeError, SyntaxError):
                found[key] = ast.literal_eval(value)
        yield found


def _openmmlab_pixels(part: Mapping[str, Any]) -> Pixels | None:
    """Return the pixels of a dictionary that has them; images are read as BGR and may be turned."""
    turned = part.get("bgr_to_rgb", part.get("to_rgb"))
    mean, std = part.get("mean"), part.get("std")
    if not isinstance(turned, bool) or not (_is_three(mean) and _is_three(std)):
        return None
    # Their numbers stand in the order that the network sees, on the scale 0..255.
    pixels = Pixels.from_detectron2("RGB" if turned else "BGR", mean, std)
    return pixels if plausible(pixels.mean, pixels.std) and max(mean) > 1 else None


def _is_three(values: Any) -> TypeGuard[Sequence[float]]:
    return (
        isinstance(values, Sequence)
        and len(values) == 3
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    )


def sidecars(dialect: str, path: Path) -> dict[str, str]:
    """Return name -> SHA-256 of the configs beside a file that its facts depend on."""
    names = [PREPROCESSOR, "config.json"] if dialect == "huggingface" else []
    names += ["config.yaml"] if dialect in NO_GUESS else []
    found = (path.with_name(name) for name in names)
    return {file.name: sha256(file) for file in found if file.is_file()}


def _beside(dialect: str, path: Path) -> dict[str, Any]:
    """Read the config that training or publishing leaves in the checkpoint's folder."""
    if dialect in NO_GUESS:
        return _read_detectron2(path.with_name("config.yaml"))
    if dialect == "huggingface":
        return _read_huggingface(path)
    return {}


def _read_detectron2(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        model, order = config["MODEL"], config["INPUT"]["FORMAT"]
        if order not in ORDERS:
            raise ValueError(f"INPUT.FORMAT {order}")
        return {
            "pixels": Pixels.from_detectron2(order, model["PIXEL_MEAN"], model["PIXEL_STD"]),
            "stride_in_1x1": bool(model["RESNETS"]["STRIDE_IN_1X1"]),
        }
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: stands beside the checkpoint and is no whole config of Detectron2 ({error}); "
            "take it away, or say --pixels and --stride-in-1x1"
        ) from error


def _read_huggingface(path: Path) -> dict[str, Any]:
    """Read what transformers writes beside its weights.

    Raises:
        UserError: it describes a network that is no plain ResNet, or pixels that are none.
    """
    said: dict[str, Any] = {}
    model, images = (_read_json(path.with_name(n)) for n in ("config.json", PREPROCESSOR))
    if model.get("downsample_in_first_stage") or model.get("hidden_act", "relu") != "relu":
        raise UserError(
            f"{path.with_name('config.json')}: asks for downsample_in_first_stage or an activation "
            "other than relu; want a plain ResNet"
        )
    if "downsample_in_bottleneck" in model:
        said["stride_in_1x1"] = bool(model["downsample_in_bottleneck"])
    if images.get("do_normalize") is False:
        said["pixels"] = UNIT_PIXELS
    elif "image_mean" in images and "image_std" in images:
        mean, std = images["image_mean"], images["image_std"]
        if not (_is_three(mean) and _is_three(std) and plausible(mean, std)):
            raise UserError(
                f"{path.with_name(PREPROCESSOR)}: image_mean {mean} and image_std {std} are no "
                "statistics of images; say --pixels"
            )
        said["pixels"] = Pixels("RGB", tuple(mean), tuple(std))
    return said


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
