"""Any supported checkpoint, read safely -> torchvision weights and facts, or a clear refusal."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convert import released
from convert.errors import UserError
from convert.facts import EXTRA_KEY, GIVEN, KNOWN, Expected, Facts, Options, expected, training
from convert.files import sha256
from convert.layouts import Recognised, find_layout
from convert.names import COUNTER, is_backbone_name
from convert.reading import Content, read_file
from convert.resnets import (
    CIFAR_STEM,
    IMAGENET_STEM,
    build_network,
    expected_shapes,
    recognise_arch,
)

# The heads of MoCo v1 and v2: which tensors they have.
HEADS = (
    ("fc.weight", "fc.bias"),
    ("fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"),
)
RANDOM = "random"  # the word that asks for random initialisation by name


@dataclass(frozen=True)
class Backbone:
    """A ResNet without its head.

    Attributes:
        weights: torchvision's names -> float32 tensors (counters int64), on the CPU.
        facts: where they come from and what they expect.
        head: what pretraining put on the pooled feature, where that is known: `fc.weight` and
            `fc.bias` (MoCo v1), or those of `fc.0` and `fc.2` with a ReLU between (v2); else empty.
    """

    weights: dict[str, Tensor]
    facts: Facts
    head: dict[str, Tensor] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Build the network around its weights; it gives the pooled (N, C) feature."""
        facts = self.facts
        return build_resnet(facts.arch, self.weights, facts.stem, facts.stride_in_1x1)


def load_backbone(
    source: str | Path,
    options: Options | None = None,
    *,
    seed: int = 0,
    **said: Any,
) -> Backbone:
    """Read the backbone of a checkpoint, whatever supported layout it has.

    Args:
        source: a checkpoint file, a released checkpoint's name (`released.py`), or the word
            `random` for a ResNet-50 initialised from `seed`.
        options: what is said of it beside the file.
        seed: of a random initialisation; unused for a file.
        said: the fields of `Options`, as keywords.

    Raises:
        UserError: the file is missing, cannot be read safely, or holds no whole ResNet.
    """
    if str(source) == RANDOM:
        return random_backbone("resnet50", seed)
    options = options or Options(**said)
    release = None if Path(source).exists() else released.find(str(source))
    if release is not None:
        return _of_release(release, options)
    path = released.locate(source)
    content = read_file(path)
    where = f"checkpoint {path}"
    values = content.values
    ours = _embedded(content)
    found = find_layout(values, where, options.branch if ours is None else None)
    arch, stem = recognise_arch(found.weights, where)
    whole = _whole(found, arch, stem, where)
    digest = weights_digest(whole)
    if ours is not None and ours.arch == arch and ours.digest in ("", digest):
        return Backbone(whole, _overruled(ours, where, options))
    fits = expected(found, stem, values, path, options)
    facts = _facts(found, values, path, arch, stem, fits)
    return Backbone(whole, replace(facts, digest=digest), _head(found))


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


def build_resnet(
    arch: str,
    weights: Mapping[str, Tensor],
    stem: str = IMAGENET_STEM,
    stride_in_1x1: bool = False,
) -> nn.Module:
    """Build a ResNet around backbone weights; it gives the pooled (N, C) feature."""
    with torch.device("meta"):
        network: nn.Module = build_network(arch, stem=stem, stride_in_1x1=stride_in_1x1)
    network.fc = nn.Identity()
    network.load_state_dict({k: v.clone() for k, v in weights.items()}, strict=True, assign=True)
    return network.eval()


def _of_release(release: released.Release, options: Options) -> Backbone:
    """Read a released checkpoint, whose pixels, stride and training its publisher has told."""
    said = replace(
        options,
        pixels=options.pixels or release.pixels,
        stride_in_1x1=release.stride_in_1x1
        if options.stride_in_1x1 is None
        else options.stride_in_1x1,
    )
    backbone = load_backbone(released.fetch(release), said)
    given = {"pixels": options.pixels, "stride_in_1x1": options.stride_in_1x1}
    sources = {key: KNOWN if value is None else GIVEN for key, value in given.items()}
    facts = replace(
        backbone.facts,
        name=release.name,
        method=release.method,
        epoch=release.epochs,
        sources=sources,
    )
    return replace(backbone, facts=facts)


def _embedded(content: Content) -> Facts | None:
    """Return the facts in a file that this project wrote for others, if it is one."""
    values = content.values
    beside = getattr(values, "_metadata", None)
    words = content.metadata.get(EXTRA_KEY)
    if words is None and isinstance(beside, Mapping):
        words = beside.get(EXTRA_KEY)
    ours = values.get(EXTRA_KEY) if isinstance(values, Mapping) else None
    try:
        if isinstance(words, str):
            return Facts.from_dict(json.loads(words))
        if isinstance(ours, Mapping) and "facts" in ours and "pixels" not in ours:
            return Facts.from_dict(ours["facts"])
    except (KeyError, TypeError, ValueError):
        pass  # damaged facts are none: the file is read as anybody else's
    return None  # facts beside "pixels" are those of what a detector began from


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Hash names and tensors, so that facts are not taken for those of other weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):  # safetensors keep an order of their own
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _overruled(facts: Facts, where: str, options: Options) -> Facts:
    """Return embedded facts, changed where the command line says otherwise."""
    if options.branch not in (None, facts.branch):
        raise UserError(f"{where}: holds the {facts.branch} branch only; take the original file")
    sources = dict(facts.sources)
    if options.pixels is not None:
        facts, sources["pixels"] = replace(facts, pixels=options.pixels), GIVEN
    if options.stride_in_1x1 is not None:
        facts = replace(facts, stride_in_1x1=options.stride_in_1x1)
        sources["stride_in_1x1"] = GIVEN
    return replace(facts, sources=sources)


def _facts(
    found: Recognised,
    values: Mapping[str, Any],
    path: Path,
    arch: str,
    stem: str,
    fits: Expected,
) -> Facts:
    return Facts(
        name=path.name,
        sha256=sha256(path),
        layout=found.layout.name,
        branch=found.branch,
        arch=arch,
        method=_method(found, values),
        epoch=_epoch(values),
        pixels=fits.pixels,
        stride_in_1x1=fits.stride_in_1x1,
        stem=found.layout.cifar_stem if stem == CIFAR_STEM else stem,
        sources=fits.sources,
        dropped=sum(found.dropped.values()),
        dropped_parts=found.dropped,
        branches=found.branches,
        splits=max(1, len(found.weights["bn1.running_mean"]) // len(found.weights["bn1.weight"]))
        if "bn1.running_mean" in found.weights
        else 1,
        dtype=str(found.weights["conv1.weight"].dtype).removeprefix("torch."),
        training=training(values),
    )


def _head(found: Recognised) -> dict[str, Tensor]:
    """Return the projection head of a file of MoCo's layout, if it is whole and finite."""
    head = found.head_weights
    known = found.layout.name == "moco" and any(head.keys() == set(names) for names in HEADS)
    if not known or not all(_is_plain(name, tensor) for name, tensor in head.items()):
        return {}
    own = {name: _own(tensor) for name, tensor in head.items()}
    return own if all(tensor.isfinite().all() for tensor in own.values()) else {}


def _method(found: Recognised, values: Mapping[str, Any]) -> str:
    """Name the method: as our own files say it, else as the layout and the head tell."""
    ours = values.get(EXTRA_KEY)
    if isinstance(ours, Mapping) and isinstance(ours.get("method"), str):
        return str(ours["method"])
    if isinstance(ours, Mapping) and isinstance(ours.get("facts"), Mapping):  # our own detectors
        return f"{ours['facts'].get('method', 'unknown')}, fine-tuned as a detector"
    if found.layout.name == "moco" and "fc.2.weight" in found.head:  # v2's two-layer head
        return "MoCo v2"
    return found.layout.method


def _epoch(values: Mapping[str, Any]) -> int | None:
    meta = values.get("meta")
    said = values.get("epoch", meta.get("epoch") if isinstance(meta, Mapping) else None)
    whole = isinstance(said, int) and not isinstance(said, bool) and 0 <= said < 10**6
    return said if whole else None


def _whole(found: Recognised, arch: str, stem: str, where: str) -> dict[str, Tensor]:
    """Return every tensor of the architecture, float32 and our own, or say what is wrong."""
    wanted = expected_shapes(arch, stem)
    weights = {k: _folded(k, v, wanted) for k, v in found.weights.items()}
    if found.dialect == "caffe2":
        weights = _from_caffe2(weights, wanted)
    missing = [k for k in wanted if k not in weights and not k.endswith(COUNTER)]
    extra = [k for k in weights if k not in wanted]
    shaped = [k for k in weights if k in wanted and weights[k].shape != wanted[k]]
    odd = [k for k, v in weights.items() if not _is_plain(k, v)]
    for fault, names in (
        ("missing", missing),
        ("unknown", extra),
        ("of another shape", shaped),
        ("no dense floating-point numbers", odd),
    ):
        if names:
            raise UserError(
                f"{where}: {len(names)} of {len(wanted)} tensors of {arch} are {fault},"
                f" first '{names[0]}'{_shapes(names[0], weights, wanted)}"
            )
    whole = {name: _own(weights.get(name, torch.tensor(0))) for name in wanted}
    broken = [k for k, v in whole.items() if v.is_floating_point() and not v.isfinite().all()]
    broken += [k for k, v in whole.items() if k.endswith("running_var") and (v < 0).any()]
    if broken:
        raise UserError(
            f"{where}: {len(broken)} tensors hold NaN, infinity or a variance below 0, first "
            f"'{broken[0]}'; the training diverged: take an earlier checkpoint"
        )
    return whole


def _is_plain(name: str, tensor: Tensor) -> bool:
    """Tell a dense tensor of numbers that float32 can hold; counters are integers."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    counts = name.endswith(COUNTER) and not tensor.is_complex() and not tensor.is_quantized
    return dense and (tensor.is_floating_point() or counts)


def _own(tensor: Tensor) -> Tensor:
    """Copy a tensor, so that the file can be unmapped or replaced; a counter stays an integer."""
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _folded(name: str, tensor: Tensor, wanted: Mapping[str, torch.Size]) -> Tensor:
    """Average the statistics of a batch norm in S splits, (S * C,) -> (C,), as lightly does."""
    split = name in wanted and "running" in name and tensor.dim() == 1
    if name.endswith(COUNTER) and tensor.numel() == 1:
        return tensor.reshape(())
    if split and len(tensor) > wanted[name][0] and len(tensor) % wanted[name][0] == 0:
        return tensor.float().view(-1, wanted[name][0]).mean(dim=0)
    return tensor


def _from_caffe2(weights: dict[str, Tensor], wanted: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Drop the stem's bias, which is zero, and complete norms that only scale and shift."""
    if not weights.get("conv1.bias", torch.zeros(1)).any():
        weights.pop("conv1.bias", None)
    if any("running" in name for name in weights):
        return weights
    for name, shape in wanted.items():
        if name.endswith("running_mean"):
            weights[name] = torch.zeros(shape)
        elif name.endswith("running_var"):
            weights[name] = torch.full(shape, 1 - 1e-5)  # with the norm's epsilon it is 1
    return weights


def _shapes(name: str, weights: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> str:
    if name in weights and name in wanted:
        return f" (found {tuple(weights[name].shape)}, want {tuple(wanted[name])})"
    return ""
