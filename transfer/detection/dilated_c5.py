"""The dilated-C5 backbone of MoCo's VOC detectors.

Importing this file registers it, so that Detectron2's own predictor finds it too.

Legend: N: images; C = 2048, the channels of res5; H, W: the sides of an image in pixels.
"""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import build_resnet_backbone
from fvcore.nn import weight_init
from torch import Tensor

from convert.errors import UserError

BACKBONE_NAME = "build_resnet_dilated_c5_backbone"
FEATURE = "c5"
CHANNELS = 512


class DilatedC5(Backbone):
    """A ResNet whose res5 keeps the stride of res4, and a convolution that narrows it.

    MoCo v1, appendix, object detection backbones: "R50-dilated-C5" is conv5 with a dilation of 2
    and a stride of 1, followed by a 3x3 convolution with BN to 512 channels. Detectron2's own DC5
    has the first and not the second. The paper names no activation behind that norm: there is none.
    """

    def __init__(self, bottom_up: Backbone, norm: str) -> None:
        """Put the convolution behind a ResNet's res5.

        Args:
            bottom_up: the ResNet; it returns res5.
            norm: the recipe's own, as SyncBN.
        """
        super().__init__()
        res5 = bottom_up.output_shape()["res5"]
        self.bottom_up = bottom_up
        self.narrow = Conv2d(
            res5.channels, CHANNELS, 3, padding=1, bias=False, norm=get_norm(norm, CHANNELS)
        )
        weight_init.c2_msra_fill(self.narrow)
        self._stride = res5.stride

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the one feature: (N, 3, H, W) -> (N, 512, H / 16, W / 16)."""
        return {FEATURE: self.narrow(self.bottom_up(images)["res5"])}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of the feature, as Detectron2 asks for them."""
        return {FEATURE: ShapeSpec(channels=CHANNELS, stride=self._stride)}


def build_resnet_dilated_c5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Any:
    """Build a recipe's backbone.

    Raises:
        UserError: the recipe has no norm, or a ResNet that cannot be dilated.
    """
    resnets = cfg.MODEL.RESNETS
    if not resnets.NORM:
        raise UserError(f"MODEL.RESNETS.NORM: is empty; {BACKBONE_NAME} wants one, as SyncBN")
    if resnets.RES5_DILATION != 2 or list(resnets.OUT_FEATURES) != ["res5"] or resnets.DEPTH < 50:
        raise UserError(
            f"MODEL.RESNETS: found DEPTH {resnets.DEPTH}, RES5_DILATION {resnets.RES5_DILATION}, "
            f"OUT_FEATURES {list(resnets.OUT_FEATURES)}; {BACKBONE_NAME} wants 50 or more, 2 and "
            "['res5']"
        )
    return DilatedC5(build_resnet_backbone(cfg, input_shape), resnets.NORM)


if BACKBONE_NAME not in BACKBONE_REGISTRY:  # another project may have brought its own
    BACKBONE_REGISTRY.register(build_resnet_dilated_c5_backbone)
