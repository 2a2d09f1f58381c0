"""Any supported checkpoint, read safely -> torchvision weights and facts, or a clear refusal."""

import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convert.errors import UserError
from convert.files import sha256
from convert.layouts import Recognised, find_layout
from convert.names import COUNTER, is_backbone_name, to_detectron2
from convert.pixels import IMAGENET_PIXELS, Pixels
from convert.resnets import build_network, expected_shapes, recognise_arch

EXTRA_KEY = "moco_transfer"  # where our own files keep facts beside what other tools read
RANDOM = "random"  # the word that asks for random initialisation by name

# Torchvision's ResNets put a bottleneck's stride into its 3x3 convolution.
STRIDE_IN_1X1 = False


@dataclass(frozen=True)
class Facts:
    """What is known of a backbone beside its tensors.

    Attributes:
        name: the file's name, or the words for a random initialisation.
        sha256: of the source file.
        layout: its entry in `layouts.py`; branch: which of its networks was taken.
        arch: torchvision's name of the network; method: what trained it; epoch: how long, if said.
        pixels: what it expects of an image.
        stride_in_1x1: whether a bottleneck's stride is in its first convolution (Caffe2's MSRA).
        dropped: tensors of the file that are not this backbone.
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
    dropped: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists; the pixels' entries stand among the others."""
        values = asdict(self)
        pixels = values.pop("pixels")
        return values | {k: list(v) if isinstance(v, tuple) else v for k, v in pixels.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Facts":
        """Read what `as_dict` wrote."""
        rest = dict(values)
        mean, std = tuple(rest.pop("mean")), tuple(rest.pop("std"))
        return cls(pixels=Pixels(rest.pop("channel_order"), mean, std), **rest)


@dataclass(frozen=True)
class Backbone:
    """A ResNet without its head.

    Attributes:
        weights: torchvision's names -> float32 tensors (counters int64), on the CPU.
        facts: where they come from and what they expect.
    """

    weights: dict[str, Tensor]
    facts: Facts


def load_backbone(source: str | Path, seed: int = 0) -> Backbone:
    """Read the backbone of a checkpoint, whatever supported layout it has.

    Args:
        source: a checkpoint file, or the word `random` for a ResNet-50 initialised from `seed`.
        seed: of a random initialisation; unused for a file.

    Raises:
        UserError: the file is missing, cannot be read safely, or holds no whole ResNet.
    """
    if str(source) == RANDOM:
        return random_backbone("resnet50", seed)
    path = Path(source)
    _check_file(path)
    if path.suffix == ".pkl" and not _is_torch_file(path):
        arrays, facts = read_detectron2(path)
        names = {to_detectron2(name): name for name in expected_shapes(facts.arch)}
        weights = {names[name]: torch.from_numpy(array) for name, array in arrays.items()}
        return Backbone(weights, facts)
    checkpoint = _read_torch(path)
    return _backbone(find_layout(checkpoint, path.name), checkpoint, path)


def random_backbone(arch: str, seed: int) -> Backbone:
    """Initialise a backbone as torchvision does, from a seed, leaving torch's own state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(arch)
    weights = {k: v for k, v in network.state_dict().items() if is_backbone_name(k)}
    name = f"{arch} random init, seed {seed}"
    facts = Facts(
        name=name,
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        layout="torchvision",
        branch="query",
        arch=arch,
        method="random init",
    )
    return Backbone(weights, facts)


def build_resnet(arch: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build torchvision's ResNet around backbone weights; it gives the pooled (N, C) feature."""
    network: nn.Module = build_network(arch)
    network.fc = nn.Identity()
    network.load_state_dict(dict(weights), strict=True)
    return network.eval()


def read_detectron2(path: Path) -> tuple[dict[str, np.ndarray], Facts]:
    """Read the weights in a pickle that `convert/to_detectron2.py` wrote.

    Returns:
        Detectron2's backbone names -> arrays, and the facts that travel with them.

    Raises:
        UserError: it is missing, damaged, or was not written by this project's converter.
    """
    content = read_pickle(path)
    return content["model"], Facts.from_dict(content[EXTRA_KEY]["facts"])


def read_pickle(path: Path) -> dict[str, Any]:
    """Read everything in a pickle that `convert/to_detectron2.py` wrote, without running its code.

    Returns:
        `model`, `__author__`, `matching_heuristics`, and under `EXTRA_KEY` facts and certificate.

    Raises:
        UserError: it is missing, damaged, or was not written by this project's converter.
    """
    path = Path(path)
    _check_file(path)
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes())).load()
        if isinstance(content["model"], dict) and isinstance(content[EXTRA_KEY]["facts"], dict):
            return dict(content)
        raise KeyError("facts")
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{path}: is not a file of this project's converter ({_short(error)}); "
            "make one with python convert/to_detectron2.py ckpt.pth"
        ) from error


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numbers, strings, containers and NumPy arrays, and imports nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            if name == "_reconstruct":
                return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        elif module == "numpy" and name in {"ndarray", "dtype"}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _check_file(path: Path) -> None:
    """Say in one line what is wrong with a checkpoint's path, before anything reads it."""
    if not path.exists():
        raise UserError(f"checkpoint {path}: no such file")
    if path.is_dir():
        raise UserError(f"checkpoint {path}: is a folder; name the file in it")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error.strerror})") from error
    if not head:
        raise UserError(f"checkpoint {path}: is empty; fetch it again")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(
            f"checkpoint {path}: is a web page, as a failed download leaves; fetch the file again"
        )


def _is_torch_file(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"  # torch.save writes a zip, whatever the file is called


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no closed list of what a damaged file raises
        raise UserError(
            f"checkpoint {path}: cannot be read ({_short(error)}); it is cut short, not a "
            "checkpoint, or holds Python objects beside its tensors"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(
            f"checkpoint {path}: holds a {type(checkpoint).__name__}, want a dictionary of tensors"
        )
    return checkpoint


def _short(error: Exception) -> str:
    """The first sentence of an error, without what torch.load appends to it."""
    text = str(error).split("\n", 1)[0].split(". ", 1)[0]
    return f"{type(error).__name__}: {text[:160]}"


def _backbone(found: Recognised, checkpoint: Mapping[str, Any], path: Path) -> Backbone:
    arch, _ = recognise_arch(found.weights, f"checkpoint {path}")
    weights = _whole(found.weights, arch, path)
    epoch = checkpoint.get("epoch")
    facts = Facts(
        name=path.name,
        sha256=sha256(path),
        layout=found.layout.name,
        branch=found.branch,
        arch=arch,
        method=_method(found, checkpoint),
        epoch=epoch if isinstance(epoch, int) else None,
        pixels=found.layout.pixels,
        dropped=len(found.dropped),
    )
    return Backbone(weights, facts)


def _method(found: Recognised, checkpoint: Mapping[str, Any]) -> str:
    """Name the method: as our own files say it, else as the layout and the head tell."""
    ours = checkpoint.get(EXTRA_KEY)
    if isinstance(ours, Mapping) and isinstance(ours.get("method"), str):
        return str(ours["method"])
    if found.layout.name == "moco" and "fc.2.weight" in found.head:  # v2's two-layer head
        return "MoCo v2"
    return found.layout.method


def _whole(weights: Mapping[str, Tensor], arch: str, path: Path) -> dict[str, Tensor]:
    """Return every tensor of the architecture, or say which are missing, extra, wrong."""
    expected = expected_shapes(arch)
    missing = [k for k in expected if k not in weights and not k.endswith(COUNTER)]
    extra = [k for k in weights if k not in expected]
    shaped = [k for k in weights if k in expected and weights[k].shape != expected[k]]
    for fault, names in (("missing", missing), ("unknown", extra), ("of another shape", shaped)):
        if names:
            raise UserError(
                f"checkpoint {path}: {len(names)} of {len(expected)} tensors of {arch} are {fault},"
                f" first '{names[0]}'{_shapes(names[0], weights, expected)}"
            )
    broken = [k for k, v in weights.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise UserError(
            f"checkpoint {path}: {len(broken)} tensors hold NaN or infinity, first '{broken[0]}'; "
            "the training diverged: take an earlier checkpoint"
        )
    whole = {}
    for name in expected:
        tensor = weights.get(name, torch.tensor(0))  # a counter that an old file lacks
        whole[name] = tensor.float() if tensor.is_floating_point() else tensor
    return whole


def _shapes(name: str, weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> str:
    if name in weights and name in expected:
        return f" (found {tuple(weights[name].shape)}, want {tuple(expected[name])})"
    return ""
