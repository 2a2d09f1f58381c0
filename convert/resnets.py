"""The ResNets that are known here: their widths and depths, how to build and how to tell each.

Shapes:
    C: channels of the stem's output, 64 times the width
A network is torchvision's `ResNet` with torchvision's names. Three shapes that torchvision lacks
are made of its parts: the papers' ResNeXt-50 32x8d, and ResNet-50 with every width doubled or
quadrupled, stem included (MoCo v1, Table 1: 46, 94 and 375 million parameters).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from convert.errors import UserError, nearest
from convert.names import is_backbone_name

IMAGENET_STEM, CIFAR_STEM = "imagenet", "cifar"
CIFAR_PAD2_STEM = "cifar-pad2"  # solo-learn pads the same 3x3 convolution by 2


@dataclass(frozen=True)
class Arch:
    """The shape of a ResNet.

    Attributes:
        blocks: residual blocks in each of the four stages.
        bottleneck: blocks of 1x1, 3x3, 1x1 convolutions; else of two 3x3.
        groups: of the 3x3 convolutions; width_per_group: their channels a group, in stage one.
        widen: what every width is multiplied by, stem included.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool = True
    groups: int = 1
    width_per_group: int = 64
    widen: int = 1

    @property
    def out_channels(self) -> int:
        """Channels of the pooled feature."""
        return 512 * self.widen * (4 if self.bottleneck else 1)


ARCHS: dict[str, Arch] = {
    "resnet18": Arch((2, 2, 2, 2), bottleneck=False),
    "resnet34": Arch((3, 4, 6, 3), bottleneck=False),
    "resnet50": Arch((3, 4, 6, 3)),
    "resnet101": Arch((3, 4, 23, 3)),
    "resnet152": Arch((3, 8, 36, 3)),
    "resnet50w2x": Arch((3, 4, 6, 3), widen=2),
    "resnet50w4x": Arch((3, 4, 6, 3), widen=4),
    "resnext50_32x4d": Arch((3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext50_32x8d": Arch((3, 4, 6, 3), groups=32, width_per_group=8),
    "resnext101_32x8d": Arch((3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": Arch((3, 4, 23, 3), groups=64, width_per_group=4),
    "wide_resnet50_2": Arch((3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": Arch((3, 4, 23, 3), width_per_group=128),
}


def build_network(
    arch: str,
    *,
    num_classes: int = 1000,
    stem: str = IMAGENET_STEM,
    stride_in_1x1: bool = False,
    norm_layer: Callable[..., nn.Module] | None = None,
) -> ResNet:
    """Build a network with torchvision's modules, names and initialisation.

    Args:
        arch: a name of `ARCHS`.
        num_classes: outputs of its `fc`.
        stem: `imagenet` is a 7x7 convolution of stride 2 and a max pool; `cifar` a 3x3 convolution
            of stride 1 and no pool, for images of 32 px; `cifar-pad2` the same, padded by 2.
        stride_in_1x1: put a bottleneck's stride into its first convolution, as MSRA's networks do,
            and not into its 3x3.
        norm_layer: makes a norm from its channels; default: `nn.BatchNorm2d`.

    Raises:
        UserError: the name is not known.
    """
    shape = find_arch(arch)
    block = Bottleneck if shape.bottleneck else BasicBlock
    network = ResNet(
        block,
        list(shape.blocks),
        num_classes=num_classes,
        groups=shape.groups,
        width_per_group=shape.width_per_group,
        norm_layer=norm_layer,
    )
    if shape.widen != 1:
        _widen(network, block, shape, num_classes)
    if stem != IMAGENET_STEM:
        padding = 2 if stem == CIFAR_PAD2_STEM else 1
        network.conv1 = _fresh(nn.Conv2d(3, 64 * shape.widen, 3, padding=padding, bias=False))
        network.maxpool = nn.Identity()
    if stride_in_1x1 and shape.bottleneck:
        for module in network.modules():
            if isinstance(module, Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
    return network


def find_arch(name: str) -> Arch:
    """Return the shape of that name.

    Raises:
        UserError: it is not known.
    """
    if name not in ARCHS:
        near = nearest(name, ARCHS)
        raise UserError(f"arch '{name}': is not a ResNet that is known here; near it: {near}")
    return ARCHS[name]


@lru_cache
def expected_shapes(arch: str, stem: str = IMAGENET_STEM) -> dict[str, torch.Size]:
    """Return every backbone tensor's name and shape, in torchvision's order."""
    with torch.device("meta"):
        network = build_network(arch, stem=stem)
    return {k: v.shape for k, v in network.state_dict().items() if is_backbone_name(k)}


def detectron2_shape(arch: str) -> dict[str, Any]:
    """Return the Detectron2 settings, below MODEL.RESNETS, that make a network of this shape."""
    shape = find_arch(arch)
    stage_out = (256 if shape.bottleneck else 64) * shape.widen
    return {
        "DEPTH": _DEPTHS[shape.bottleneck, shape.blocks],
        "NUM_GROUPS": shape.groups,
        "WIDTH_PER_GROUP": shape.width_per_group * shape.widen,
        "STEM_OUT_CHANNELS": 64 * shape.widen,
        "RES2_OUT_CHANNELS": stage_out,
    }


_DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


def recognise_arch(weights: Mapping[str, Tensor], where: str) -> tuple[str, str]:
    """Tell a network and its stem by its weights, torchvision names.

    Returns:
        A name of `ARCHS`, and `imagenet` or `cifar`.

    Raises:
        UserError: it is none of them.
    """
    found = _signature(weights)
    for name, shape in ARCHS.items():
        width = shape.width_per_group * shape.groups * shape.widen
        wanted = (shape.bottleneck, shape.blocks, 64 * shape.widen, width, shape.groups)
        if found == wanted:
            stem = tuple(weights["conv1.weight"].shape[1:])
            return name, CIFAR_STEM if stem == (3, 3, 3) else IMAGENET_STEM
    bottleneck, blocks, stem_out, width, groups = found
    kind = "bottleneck" if bottleneck else "basic"
    raise UserError(
        f"{where}: found {kind} blocks {blocks} in its four stages, a stem of {stem_out} channels, "
        f"3x3 convolutions of {width} channels in {groups} groups; want one of {', '.join(ARCHS)}"
    )


def _signature(
    weights: Mapping[str, Tensor],
) -> tuple[bool, tuple[int, ...], int, int, int]:
    blocks: list[set[str]] = [set(), set(), set(), set()]
    for name in weights:
        if name.startswith("layer"):
            stage, block = name.removeprefix("layer").split(".")[:2]
            blocks[int(stage) - 1].add(block)
    bottleneck = "layer1.0.conv3.weight" in weights
    wide, narrow = weights["layer1.0.conv2.weight"].shape[:2]
    counts = tuple(len(stage) for stage in blocks)
    return bottleneck, counts, len(weights["conv1.weight"]), wide, wide // max(narrow, 1)


def _widen(network: ResNet, block: type, shape: Arch, num_classes: int) -> None:
    """Replace every part by one with all widths multiplied; torchvision widens the 3x3 only."""
    base = 64 * shape.widen
    network.inplanes = base
    network.conv1 = nn.Conv2d(3, base, kernel_size=7, stride=2, padding=3, bias=False)
    network.bn1 = network._norm_layer(base)
    for stage, count in enumerate(shape.blocks):
        layer = network._make_layer(block, base << stage, count, stride=1 if stage == 0 else 2)
        setattr(network, f"layer{stage + 1}", layer)
    network.fc = nn.Linear(shape.out_channels, num_classes)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            _fresh(module)


def _fresh(convolution: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
