"""Does a recipe's batch fit the memory at hand? Said before the first iteration, never by a kill.

An iteration of R-CNN on ResNet-50 C4 keeps activations for its backward pass: of the backbone, in
proportion to the pixels of the padded batch, and of res5, in proportion to the regions of interest
(R: regions an image, N: images a process). Measured on a CPU, float32, SyncBN, peak of the process
over two iterations less what it held before (GiB):

    side  N    R  masks  measured  estimated
     320  1   32    yes      0.50       0.52
     320  1  128    yes      1.05       1.13
     320  1  256    yes      1.98       1.94
     320  1  256     no      1.76       1.94
     320  2  128    yes      2.10       2.16
     640  1   32    yes      1.19       1.18
     640  1  256    yes      2.50       2.60
     320  1  256    yes      1.05       1.07  bf16 autocast

At the published size, 800 px and 512 regions, the sum is 5.5 GiB an image; 4.8 were measured.

FPN keeps more of a pixel and less of a region, of which few were positive, and had masks, in these
measurements of Mask R-CNN before training; so the estimate of a region is above what was measured:

     320  1  128    yes      0.80       0.91
     320  1  512    yes      0.84       1.05
     320  2  128    yes      1.25       1.39
     640  1  128    yes      2.10       2.20
     320  1  512    yes      0.71       0.77  bf16 autocast
     320  1  128    yes      0.81       1.00  4conv1fc

Dilated C5 (Faster R-CNN) keeps the pixels of its res5, and as little of a region as FPN:

     320  1  128     no      0.88       0.94
     320  1  512     no      0.88       1.08
     320  2  128     no      1.18       1.31
     640  1  128     no      1.82       1.91
     640  1  512     no      2.01       2.05

Keypoint R-CNN on FPN, with as many people as the sampler takes (a quarter of the regions):

     320  1  128     no      0.97       1.09
     320  1  512     no      1.44       1.45
     320  2  128     no      1.53       1.64
     640  1  128     no      2.20       2.38

These had at most 80 classes. Masks are predicted of every class for each positive region, which
counts with LVIS's 1230: Detectron2's model zoo has 7.1 GB where COCO's same network takes 3.4, two
images each, which is four float32 copies of them.

On a GPU none was measured: the same sums are taken there, without the libraries' workspace.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from convert.errors import UserError
from transfer.detection.recipes import images_at_once

GIB = 2**30
BYTES_A_PIXEL, BYTES_A_REGION = 2300.0, 6.8e6  # of C4, at a pooled side of 14
FPN_BYTES_A_PIXEL, FPN_BYTES_A_REGION = 4500.0, 0.4e6  # at a pooled side of 7
C5_BYTES_A_PIXEL = 3400.0  # a region's are FPN's
KEYPOINT_BYTES_A_REGION = 0.6e6  # beside its box's
BYTES_A_CONV = 0.15e6  # of the box head, a region
OVERHEAD = 0.1 * GIB
MASK_COPIES, FEW_CLASSES = 4, 80  # of a positive region's masks; what the above has in it
BF16_SHARE = 0.55  # of what float32 keeps

_CGROUPS = Path("/sys/fs/cgroup")
# (limit, use, statistics) of control groups version 2 and 1
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
_CACHE_WORD = {"memory.stat": "inactive_file", "memory/memory.stat": "total_inactive_file"}


def check(
    cfg: CfgNode,
    dicts: Sequence[Mapping[str, Any]],
    model: nn.Module,
    processes: int,
    local_processes: int,
) -> None:
    """Refuse a batch that does not fit.

    Args:
        cfg: the recipe.
        dicts: Detectron2's records of the training images.
        model: the detector, already in memory.
        processes: that share the batch, over all machines.
        local_processes: those on this machine.

    Raises:
        UserError: says needed, found, and which keys help.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    sharing = local_processes if device.type == "cpu" else 1  # each GPU has its own memory
    images = images_at_once(cfg, processes)
    need = sharing * needed_bytes(cfg, largest_image(cfg, dicts), images, model)
    found = available_bytes(device)
    if need > found:
        raise UserError(
            f"memory: an iteration needs about {need / GIB:.1f} GiB, {found / GIB:.1f} GiB are free"
            f" on {device}; take the batch in parts (MOCO.ACCUMULATE, now {cfg.MOCO.ACCUMULATE}),"
            f" lower SOLVER.IMS_PER_BATCH (now {cfg.SOLVER.IMS_PER_BATCH}; SOLVER.BASE_LR with it),"
            " INPUT.MIN_SIZE_TRAIN (now up to"
            f" {max(cfg.INPUT.MIN_SIZE_TRAIN)}) or MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE (now"
            f" {cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE})"
        )


def needed_bytes(cfg: CfgNode, pixels: int, images: int, model: nn.Module) -> float:
    """Estimate what one process allocates beyond its model: activations, gradients, momentum.

    Args:
        cfg: the recipe.
        pixels: of the largest image after resizing.
        images: of the batch, in this process.
        model: the detector.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    a_pixel, a_region, side = BYTES_A_PIXEL, BYTES_A_REGION, 14  # the published one
    if cfg.MODEL.ROI_HEADS.NAME == "StandardROIHeads":
        fpn = "fpn" in cfg.MODEL.BACKBONE.NAME
        a_pixel, side = FPN_BYTES_A_PIXEL if fpn else C5_BYTES_A_PIXEL, 7
        a_region = FPN_BYTES_A_REGION + BYTES_A_CONV * cfg.MODEL.ROI_BOX_HEAD.NUM_CONV
    if cfg.MODEL.KEYPOINT_ON:
        a_region += KEYPOINT_BYTES_A_REGION
    pooled = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION / side
    regions = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE * pooled**2
    activations: float = images * (pixels * a_pixel + regions * a_region)
    if cfg.MODEL.MASK_ON:
        heads, mask_side = cfg.MODEL.ROI_HEADS, 2 * cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        positives = heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION
        more_classes = max(0, heads.NUM_CLASSES - FEW_CLASSES)
        activations += 4 * MASK_COPIES * images * positives * more_classes * mask_side**2
    if cfg.MOCO.PRECISION == "bf16":
        activations *= BF16_SHARE
    return activations + 2 * trained + OVERHEAD


def largest_image(cfg: CfgNode, dicts: Sequence[Mapping[str, Any]]) -> int:
    """Return the pixels of the largest training image after Detectron2's resizing."""
    short, long = int(max(cfg.INPUT.MIN_SIZE_TRAIN)), int(cfg.INPUT.MAX_SIZE_TRAIN)
    shapes = {(int(image["height"]), int(image["width"])) for image in dicts}
    return max(round(h * w * min(short / min(h, w), long / max(h, w)) ** 2) for h, w in shapes)


def available_bytes(device: torch.device) -> float:
    """Return the free memory of a GPU, or of this machine and this container."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(_machine_bytes(), _container_bytes())


def _machine_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return float("inf")  # not Linux: nothing to ask without another library


def _container_bytes() -> float:
    """Return what control groups leave; page cache that would be given back counts as free."""
    left = [float("inf")]
    for limit, used, cache in _CGROUP_FILES:
        try:
            stat = _CGROUPS.joinpath(cache).read_text(encoding="ascii").split()
            free = float(stat[stat.index(_CACHE_WORD[cache]) + 1])
            most, now = (float(_CGROUPS.joinpath(f).read_text("ascii")) for f in (limit, used))
            left.append(most - now + free)
        except (OSError, ValueError):  # no such control group, or the word max
            continue
    return min(left)
