"""The proof that a converted backbone is the same network in Detectron2.

Every backbone tensor lands in Detectron2's C4 and FPN models, none of theirs stays unfilled, and on
a probe image the models' res2 to res5 equal the source network's.
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convert.backbone import Backbone
from convert.errors import UserError
from convert.facts import Facts
from convert.names import land
from convert.settings import detectron2_settings, has_c4

STAGES = ("res2", "res3", "res4", "res5")
# Two float32 libraries order their sums differently; a wrong tensor is off by the features' scale.
TOLERANCE = 1e-5


def can_prove() -> bool:
    """Tell whether Detectron2 is there to prove anything in."""
    return importlib.util.find_spec("detectron2") is not None


@torch.no_grad()
def prove(backbone: Backbone, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Compare the source network with Detectron2's on a probe image of (1, 3, 128, 160).

    Args:
        backbone: the source.
        arrays: what is to be written, Detectron2's names.

    Returns:
        For each target, `fpn` and `c4`, the largest difference of a feature, the features' scale,
        and the largest difference as a share of its stage's scale.

    Raises:
        UserError: a tensor does not land, or the features differ.
    """
    probe = torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(0))
    want = _stages(backbone.build(), probe)
    targets = {"fpn": _fpn_stages} | ({"c4": _c4_stages} if has_c4(backbone.facts.arch) else {})
    proof = {}
    with _quiet():
        for target, stages in targets.items():
            proof[target] = _compare(want, stages(backbone.facts, arrays, probe))
    for target, found in proof.items():
        if not found["relative"] <= TOLERANCE:
            raise UserError(
                f"{backbone.facts.name}: Detectron2's {target} features differ by "
                f"{found['relative']:.1e} of their scale, want at most {TOLERANCE:.0e}; "
                "nothing was written"
            )
    return proof


def _compare(want: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, float]:
    scales = {name: float(want[name].abs().max()) for name in STAGES}
    worst = {name: float((found[name] - want[name]).abs().max()) for name in STAGES}
    return {
        "largest_difference": max(worst.values()),
        "scale": max(scales.values()),
        "relative": max(worst[name] / max(scales[name], 1e-12) for name in STAGES),
    }


def _stages(network: Any, image: Tensor) -> dict[str, Tensor]:
    """Return what torchvision's four stages give, under Detectron2's names."""
    x = network.maxpool(network.relu(network.bn1(network.conv1(image))))
    found = {}
    for stage, layer in zip(STAGES, ("layer1", "layer2", "layer3", "layer4"), strict=True):
        x = found[stage] = getattr(network, layer)(x)
    return found


def _c4_stages(facts: Facts, arrays: Mapping[str, np.ndarray], image: Tensor) -> dict[str, Tensor]:
    from detectron2.modeling import build_model

    config = _detectron2_config(facts)
    config.MODEL.RESNETS.OUT_FEATURES = list(STAGES[:3])
    model = build_model(config).eval()
    _fill(model, arrays)
    found: dict[str, Tensor] = model.backbone(image)
    return found | {"res5": model.roi_heads.res5(found["res4"])}


def _fpn_stages(facts: Facts, arrays: Mapping[str, np.ndarray], image: Tensor) -> dict[str, Tensor]:
    from detectron2.modeling import build_backbone

    config = _detectron2_config(facts)
    config.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    config.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    config.MODEL.FPN.IN_FEATURES = list(STAGES)
    model = build_backbone(config).eval()
    _fill(model, arrays)
    return dict(model.bottom_up(image))


def _detectron2_config(facts: Facts) -> Any:
    from detectron2.config import get_cfg

    config = get_cfg()
    pairs = detectron2_settings(facts) | {
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.DEVICE": "cpu",
    }
    config.merge_from_list([item for pair in pairs.items() for item in pair])
    return config


def _fill(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy every backbone array to its one place, in a shape that must be equal."""
    state = model.state_dict()
    for name, key in land(arrays, state).items():
        if state[key].shape != arrays[name].shape:
            raise UserError(
                f"tensor '{name}': found shape {arrays[name].shape}, "
                f"want {tuple(state[key].shape)} at '{key}'"
            )
        state[key].copy_(torch.from_numpy(arrays[name]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings of Detectron2's own imports off the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
