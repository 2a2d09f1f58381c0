"""A published FPN recipe at a size that a CPU trains in seconds: an eighth of the width, 64 px."""

from pathlib import Path

from tests.detectors import load

NARROW = (
    *("MODEL.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "5"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("TEST.PRECISE_BN.NUM_ITER", "1", "DATALOADER.NUM_WORKERS", "0"),
)


def narrow(file: Path, *pairs: str):
    """Load a recipe of such a network."""
    return load(file, *NARROW, *pairs)
