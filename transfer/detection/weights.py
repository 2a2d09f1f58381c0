"""Weights that land in a detector whole, or not at all."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling import build_model
from torch import Tensor, nn

from convert.backbone import load_backbone
from convert.errors import UserError
from convert.facts import EXTRA_KEY, Facts
from convert.files import sha256
from convert.names import COUNTER, land, to_detectron2
from convert.reading import PickledArray, read_file
from convert.settings import check_keys, check_recipe
from transfer.detection import dilated_c5, recipes, roi_heads  # noqa: F401 (registers them)

FINAL_FILE = "model_final.pth"  # the trained detector, without what only training needs
# Made anew from the recipe; old files of Detectron2 hold them all the same.
_REBUILT = re.compile(r"(^|\.)(cell_anchors\.\d+|pixel_mean|pixel_std)$")


def build_detector(cfg: CfgNode) -> nn.Module:
    """Build a recipe's model; under bf16 its forward pass, and nothing else, is autocast."""
    model: nn.Module = build_model(cfg)
    if cfg.MOCO.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if cfg.MOCO.PRECISION == "bf16":
        for norm in (m for m in model.modules() if isinstance(m, NaiveSyncBatchNorm)):
            # Its variance is a difference of means, which bf16 would lose.
            norm.register_forward_pre_hook(lambda _, given: (given[0].float(),))
            norm.register_forward_hook(lambda _, given, out: out.bfloat16())
        for name in ("mask_head", "keypoint_head"):
            if cfg.MODEL.ROI_HEADS.NAME == "StandardROIHeads" and hasattr(model.roi_heads, name):
                _leave_in_float32(getattr(model.roi_heads, name))
        cast = torch.autocast(torch.device(cfg.MODEL.DEVICE).type, dtype=torch.bfloat16)
        model.forward = cast(model.forward)
    return model


def _leave_in_float32(head: Any) -> None:
    """Let a mask or keypoint head give float32, whatever its layers compute in.

    What it gives becomes places in the image in its own type: bf16 would round those to whole
    pixels and more. C4's head does it where it pastes (`roi_heads.py`).
    """
    layers = head.layers
    head.layers = lambda features: layers(features).float()


def fill_backbone(model: nn.Module, cfg: CfgNode) -> dict[str, Any]:
    """Put the recipe's MODEL.WEIGHTS into a detector's backbone, whole.

    Returns:
        The facts of what was loaded, as a result's `checkpoint` has them.

    Raises:
        UserError: the file is no backbone, expects other pixels or another stride than the recipe,
            or a tensor is missing, left over, or of another shape.
    """
    if not cfg.MODEL.WEIGHTS:
        return start_facts(cfg)
    tensors, facts = _read_backbone(Path(cfg.MODEL.WEIGHTS))
    check_recipe(recipes.flatten(cfg), facts, cfg.MODEL.WEIGHTS)
    places = land(tensors, model.state_dict())
    _copy(model, {key: tensors[name] for name, key in places.items()}, cfg.MODEL.WEIGHTS)
    landed = sum(not name.endswith(COUNTER) for name in places)
    return facts.as_dict() | {"file": cfg.MODEL.WEIGHTS, "tensors_landed": landed}


def start_facts(cfg: CfgNode) -> dict[str, Any]:
    """Say what a recipe's MODEL.WEIGHTS is, without a detector.

    Raises:
        UserError: the file is no backbone.
    """
    if cfg.MODEL.WEIGHTS:
        return _read_backbone(Path(cfg.MODEL.WEIGHTS))[1].as_dict()
    return {"name": "random", "sha256": None, "method": "random init", "seed": cfg.SEED}


def _read_backbone(path: Path) -> tuple[dict[str, Tensor], Facts]:
    """Return a backbone under Detectron2's names."""
    backbone = load_backbone(path)
    return {to_detectron2(name): t for name, t in backbone.weights.items()}, backbone.facts


def load_detector(model: nn.Module, path: Path, cfg: CfgNode) -> dict[str, Any]:
    """Put a trained detector's weights into a model, every one of them.

    Args:
        model: built from the recipe that the detector was trained with.
        path: `model_final.pth` of a run here or of Detectron2, or a file of its model zoo (.pkl).
        cfg: the recipe.

    Returns:
        The facts of its backbone, where the file carries them, else its name and hash.

    Raises:
        UserError: the file is no detector, was trained on other pixels, or a tensor is missing,
            left over, or of another shape.
    """
    content = read_file(path).values
    weights = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not any("proposal_generator" in str(k) for k in weights):
        raise UserError(f"{path}: holds no trained detector; want a run's {FINAL_FILE}")
    weights = {key: _as_tensor(value) for key, value in weights.items()}
    ours = content.get(EXTRA_KEY)
    known = _kept_pixels(weights) if ours is None else ours["pixels"]
    check_keys(recipes.flatten(cfg), known, str(path))
    fill_all(model, weights, str(path))
    facts = {"name": path.name, "method": "unknown"} if ours is None else dict(ours["facts"])
    return facts | {"detector": str(path), "detector_sha256": sha256(path)}


def _as_tensor(value: Any) -> Any:
    """Turn the arrays of a model zoo's pickle into tensors."""
    return (
        torch.tensor(np.asarray(value)) if isinstance(value, np.ndarray | PickledArray) else value
    )


def _kept_pixels(weights: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the pixel statistics that old files of Detectron2 hold among their weights."""
    names = {"MODEL.PIXEL_MEAN": "pixel_mean", "MODEL.PIXEL_STD": "pixel_std"}
    return {
        key: [round(float(value), 3) for value in weights[name].flatten()]
        for key, name in names.items()
        if name in weights
    }


def read_torch(path: Path) -> dict[str, Any]:
    """Read a file of torch.save that holds tensors, numbers and strings only.

    Raises:
        UserError: it is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no closed list of what a damaged file raises
        reason = str(error).split("\n", 1)[0][:160]
        raise UserError(f"checkpoint {path}: is damaged or no checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path}: holds a {type(content).__name__}, want a dictionary")
    return content


def fill_all(model: nn.Module, weights: Mapping[str, Any], where: str) -> None:
    """Copy a whole detector's tensors.

    Raises:
        UserError: one is missing, left over, or of another shape.
    """
    state = model.state_dict()
    missing = [key for key in state if key not in weights]
    extra = [key for key in weights if key not in state and not _REBUILT.search(key)]
    for fault, keys in (("missing", missing), ("left over", extra)):
        if keys:
            raise UserError(
                f"{where}: {len(keys)} of {len(state)} tensors are {fault}, first '{keys[0]}'; "
                "is it of another recipe?"
            )
    _copy(model, {key: weights[key] for key in state}, where)


def _copy(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    state = model.state_dict()
    for key, tensor in tensors.items():
        if state[key].shape != tensor.shape:
            raise UserError(
                f"{where}: '{key}' has shape {tuple(tensor.shape)}, "
                f"the model wants {tuple(state[key].shape)}"
            )
    with torch.no_grad():
        for key, tensor in tensors.items():
            state[key].copy_(tensor)
