"""Any supported checkpoint, read safely -> torchvision weights and facts, or a clear refusal."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convert import released
from convert.errors import UserError
from convert.facts import EXTRA_KEY, GIVEN, KNOWN, Expected, Facts, Options, expected
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

RANDOM = "random"  # the word that asks for random initialisation by name


@dataclass(frozen=True)
class Backbone:
    """A ResNet without its head.

    Attributes:
        weights: torchvision's names -> float32 tensors (counters int64), on the CPU.
        facts: where they come from and what they expect.
    """

    weights: dict[str, Tensor]
    facts: Facts

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
    if ours is not None:
        return Backbone(whole, _overruled(ours, where, options))
    fits = expected(found, values, path, options)
    return Backbone(whole, _facts(found, values, path, arch, stem, fits))


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
    words = content.metadata.get(EXTRA_KEY) or getattr(values, "_metadata", {}).get(EXTRA_KEY)
    if isinstance(words, str):
        return Facts.from_dict(json.loads(words))
    ours = values.get(EXTRA_KEY) if isinstance(values, Mapping) else None
    if not isinstance(ours, Mapping) or "facts" not in ours or "pixels" in ours:
        return None  # beside "pixels" they are those of what a detector began from
    return Facts.from_dict(ours["facts"])


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
        dtype=str(found.weights["conv1.weight"].dtype).removeprefix("torch."),
    )


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
    return said if isinstance(said, int) and not isinstance(said, bool) else None


def _whole(found: Recognised, arch: str, stem: str, where: str) -> dict[str, Tensor]:
    """Return every tensor of the architecture, float32 and our own, or say what is wrong."""
    wanted = expected_shapes(arch, stem)
    weights = {k: _folded(k, v, wanted) for k, v in found.weights.items()}
    if found.dialect == "caffe2":
        weights = _from_caffe2(weights, wanted)
    missing = [k for k in wanted if k not in weights and not k.endswith(COUNTER)]
    extra = [k for k in weights if k not in wanted]
    shaped = [k for k in weights if k in wanted and weights[k].shape != wanted[k]]
    for fault, names in (("missing", missing), ("unknown", extra), ("of another shape", shaped)):
        if names:
            raise UserError(
                f"{where}: {len(names)} of {len(wanted)} tensors of {arch} are {fault},"
                f" first '{names[0]}'{_shapes(names[0], weights, wanted)}"
            )
    broken = [k for k, v in weights.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise UserError(
            f"{where}: {len(broken)} tensors hold NaN or infinity, first '{broken[0]}'; "
            "the training diverged: take an earlier checkpoint"
        )
    return {name: _own(weights.get(name, torch.tensor(0))) for name in wanted}


def _own(tensor: Tensor) -> Tensor:
    """Copy a tensor, so that the file can be unmapped or replaced; a counter stays an integer."""
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _folded(name: str, tensor: Tensor, wanted: Mapping[str, torch.Size]) -> Tensor:
    """Average the statistics of a batch norm in S splits, (S * C,) -> (C,), as lightly does."""
    split = name in wanted and "running" in name and tensor.dim() == 1
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
