"""The FCN of MoCo v1's appendix: a ResNet of stride 16 under three convolutions.

Legend: B: images; H, W: their height and width, px; L: classes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convert.backbone import Backbone
from convert.errors import UserError

HEAD_CHANNELS = 256
HEAD_DILATION = 6
CONV5_DILATION = 2
INIT_STD = 0.01  # of the new convolutions, as in Detectron2's heads; the paper prints none


class Fcn(nn.Module):
    """Fully convolutional network (MoCo v1, appendix, semantic segmentation).

    The 3x3 convolutions of conv5 have dilation 2 and stride 1, so that the stride is 16. Two 3x3
    convolutions of 256 channels and dilation 6, each with BN and ReLU, and a 1x1 convolution that
    classifies pixels follow; the result is enlarged to the image's size.

    Args:
        backbone: any ResNet with an ImageNet stem.
        num_classes: L.
        seed: of the new convolutions.

    Raises:
        UserError: the backbone's stem is a CIFAR one, whose stride is not 16.
    """

    def __init__(self, backbone: Backbone, num_classes: int, seed: int) -> None:
        super().__init__()
        if backbone.facts.stem != "imagenet":
            raise UserError(
                f"{backbone.facts.name}: has a '{backbone.facts.stem}' stem, semantic segmentation "
                "wants an ImageNet stem (7x7, stride 2)"
            )
        resnet: Any = backbone.build()
        dilate_conv5(resnet)
        self.body = nn.Sequential(
            nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool),
            *(getattr(resnet, f"layer{number}") for number in range(1, 5)),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = _head(_width(resnet.layer4), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify the pixels of x, (B, 3, H, W) -> logits (B, L, H, W), in float32."""
        logits = self.head(self.body(x)).float()
        size = x.shape[-2:]
        return functional.interpolate(logits, size, mode="bilinear", align_corners=False)


def dilate_conv5(resnet: Any) -> None:
    """Trade conv5's stride for dilation: every 3x3 of it, the first block's too."""
    for module in resnet.layer4.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = (CONV5_DILATION, CONV5_DILATION)
                module.padding = (CONV5_DILATION, CONV5_DILATION)


def _head(width: int, num_classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (width, HEAD_CHANNELS):
        dilation = HEAD_DILATION
        conv = nn.Conv2d(channels, HEAD_CHANNELS, 3, 1, dilation, dilation, bias=False)
        layers += [conv, nn.BatchNorm2d(HEAD_CHANNELS), nn.ReLU(inplace=True)]
    layers.append(nn.Conv2d(HEAD_CHANNELS, num_classes, 1))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=INIT_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def _width(stage: nn.Module) -> int:
    last = [module for module in stage.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    return last.num_features
