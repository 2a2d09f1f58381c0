"""What is known of a backbone beside its tensors, and how well.

Pixels and stride are not in the tensors. Each is *known* (our own files say it, or the layout's
code fixes it), *given* (on the command line, or by a config beside the file) or *assumed*; where a
wrong assumption is likely (Detectron2's and Caffe2's files) nothing is assumed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from convert.errors import UserError
from convert.layouts import Recognised
from convert.pixels import IMAGENET_PIXELS, ORDERS, Pixels, parse_pixels
from convert.resnets import IMAGENET_STEM

EXTRA_KEY = "moco_transfer"  # where our own files keep facts beside what other tools read
KNOWN, GIVEN, ASSUMED, UNKNOWN = "known", "given", "assumed", "unknown"
# Torchvision's ResNets put a bottleneck's stride into its 3x3 convolution.
STRIDE_IN_1X1 = False
# Converters that sign their work and always start from torchvision's networks.
AUTHORS_OF_TORCHVISION = {"MOCO", "torchvision"}
NO_GUESS = {"detectron2", "caffe2"}


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
        pixels = str(self.pixels) if self.pixels else None
        return {"branch": self.branch, "pixels": pixels, "stride_in_1x1": self.stride_in_1x1}


@dataclass(frozen=True)
class Expected:
    """What a backbone expects: pixels and the stride's place, each with how well it is known."""

    pixels: Pixels
    stride_in_1x1: bool
    sources: dict[str, str]


def expected(
    found: Recognised, values: Mapping[str, Any], path: Path, options: Options
) -> Expected:
    """Settle what a recognised backbone expects.

    Args:
        found: the backbone.
        values: what its file holds.
        path: the file; a config beside it may tell.
        options: what the command line says.

    Raises:
        UserError: it would have to be guessed, where guesses are often wrong.
    """
    ways: list[tuple[str, dict[str, Any]]] = [
        (GIVEN, {"pixels": options.pixels, "stride_in_1x1": options.stride_in_1x1}),
        (KNOWN, _written_down(values)),
        (KNOWN, {"pixels": found.layout.pixels, "stride_in_1x1": found.layout.stride_in_1x1}),
        (GIVEN, _beside(found, path)),
    ]
    guess = {"pixels": IMAGENET_PIXELS, "stride_in_1x1": STRIDE_IN_1X1}
    if found.dialect not in NO_GUESS:
        ways.append((ASSUMED, guess))
    elif options.unknown_too:
        ways.append((UNKNOWN, guess))
    settled: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, flag in (("pixels", "--pixels imagenet"), ("stride_in_1x1", "--stride-in-1x1 no")):
        way = next((w for w in ways if w[1].get(key) is not None), None)
        if way is None:
            raise UserError(
                f"checkpoint {path}: a file of {found.layout.name} does not say its "
                f"{key.replace('_', ' ')}, and models of both kinds are common; say it, as {flag}, "
                "or put the config.yaml of its training beside it"
            )
        sources[key], settled[key] = way[0], way[1][key]
    return Expected(settled["pixels"], settled["stride_in_1x1"], sources)


def _written_down(values: Mapping[str, Any]) -> dict[str, Any]:
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
        return _read_openmmlab(text)
    return {}


def _read_openmmlab(text: str) -> dict[str, Any]:
    """Read pixels and stride in the config that OpenMMLab's checkpoints carry as text."""
    said: dict[str, Any] = {}
    style = re.search(r"style\s*=\s*'(pytorch|caffe)'", text)
    if style:
        said["stride_in_1x1"] = style[1] == "caffe"
    mean, std = (_numbers(name, text) for name in ("mean", "std"))
    flipped = re.search(r"(bgr_to_rgb|to_rgb)\s*=\s*(True|False)", text)
    if mean and std and flipped:
        # Their images are read as BGR; the numbers stand in the order that the network sees.
        order = "RGB" if flipped[2] == "True" else "BGR"
        said["pixels"] = Pixels.from_detectron2(order, mean, std)
    return said


def _numbers(name: str, text: str) -> list[float]:
    match = re.search(rf"\b{name}\s*=\s*[\[(]([\d.,\s]+)[\])]", text)
    numbers = [float(n) for n in re.findall(r"\d+(?:\.\d*)?|\.\d+", match[1])] if match else []
    return numbers if len(numbers) == 3 else []


def _beside(found: Recognised, path: Path) -> dict[str, Any]:
    """Read the config that training or publishing leaves in the checkpoint's folder."""
    if found.dialect in NO_GUESS:
        return _read_detectron2(path.with_name("config.yaml"))
    if found.dialect == "huggingface":
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
    said: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "config.json"):
        try:
            text = path.with_name(name).read_text(encoding="utf-8")
            config = json.loads(text)
        except (OSError, ValueError):
            continue
        if "image_mean" in config and "image_std" in config:
            mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
            said["pixels"] = Pixels("RGB", mean, std)
        if "downsample_in_bottleneck" in config:
            said["stride_in_1x1"] = bool(config["downsample_in_bottleneck"])
    return said
