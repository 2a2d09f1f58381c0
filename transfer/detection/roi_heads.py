"""The extra-norm head of MoCo's C4 detectors.

Importing this file registers it, so that Detectron2's own predictor finds it too.

Legend: R: regions of interest of all images; C = 2048, the channels of res5; 7 its side.
"""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads

from convert.errors import UserError

HEAD_NAME = "Res5ROIHeadsExtraNorm"


class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """C4's head with a norm after res5 (MoCo v1, appendix, object detection backbones).

    Features learnt without labels are distributed otherwise than supervised ones; norms that are
    trained along adapt them (section 4.2). It is named `res5.norm`, stands behind the last block,
    and is shared by the box and the mask branch.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """Add the recipe's own norm behind res5: (R, C, 7, 7) -> the same.

        Raises:
            UserError: the recipe has no norm.
        """
        parts: dict[str, Any] = super().from_config(cfg, input_shape)
        res5 = parts["res5"]
        norm = get_norm(cfg.MODEL.RESNETS.NORM, res5[-1].out_channels)
        if norm is None:
            raise UserError(f"MODEL.RESNETS.NORM: is empty; {HEAD_NAME} wants one, as SyncBN")
        res5.add_module("norm", norm)
        return parts

    def forward_with_given_boxes(self, features: Any, instances: Any) -> Any:
        """Predict masks for given boxes, in float32.

        They are pasted into the image through a grid of their own type, whose coordinates bf16
        would round to whole pixels and more.
        """
        instances = super().forward_with_given_boxes(features, instances)
        for found in instances:
            if found.has("pred_masks"):
                found.pred_masks = found.pred_masks.float()
        return instances


if HEAD_NAME not in ROI_HEADS_REGISTRY:  # another project of the same user may have brought its own
    ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)
