"""The Detectron2 settings that a backbone needs, and whether a recipe has them.

Pixels, stride and widths must be in training the detector what they were in training the backbone;
they are written as a small YAML to compose with a recipe, and checked before weights are loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from convert.errors import UserError
from convert.facts import Facts
from convert.resnets import ARCHS, detectron2_shape

# What must be the same in training the backbone and in training the detector.
PIXEL_KEYS = (
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.STRIDE_IN_1X1",
)
SHAPE_KEYS = ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP", "STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS")
HEADER = "# Part of recipes: what a backbone expects of Detectron2, written by MoCo Transfer."
_TOLERANCE = 0.01  # of 0..255: Detectron2's files round pixel statistics


def detectron2_settings(facts: Facts) -> dict[str, Any]:
    """Return every setting that the backbone fixes, dotted keys -> values."""
    shape = {f"MODEL.RESNETS.{key}": value for key, value in detectron2_shape(facts.arch).items()}
    stride = {"MODEL.RESNETS.STRIDE_IN_1X1": facts.stride_in_1x1}
    return facts.pixels.detectron2() | stride | shape


def check_recipe(recipe: Mapping[str, Any], facts: Facts, where: str) -> None:
    """Refuse a recipe that would feed a backbone other images, or build another network.

    Args:
        recipe: a Detectron2 config, dotted keys -> values.
        facts: the backbone's.
        where: its file, for the error line.

    Raises:
        UserError: names every key to set, with its value.
    """
    check_keys(recipe, detectron2_settings(facts), where)


def check_keys(recipe: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Refuse a recipe whose values differ from the wanted ones.

    Raises:
        UserError: names every key to set, with its value.
    """
    wrong = [key for key in wanted if not _same(recipe[key], wanted[key])]
    if wrong:
        found = ", ".join(f"{key} {recipe[key]}" for key in wrong)
        fix = " ".join(f'{key} "{wanted[key]}"' for key in wrong)
        raise UserError(f"{where}: was not trained with the recipe's {found}; set {fix}")


def settings_yaml(facts: Facts, weights: Path) -> str:
    """Write the settings as a Detectron2 YAML file to name in a recipe's list of `_BASE_`.

    Besides what the backbone fixes it has what a self-supervised one is fine-tuned with: nothing
    frozen, every norm trained and synchronised, its statistics recomputed (MoCo v1, Sec. 4.2).
    """
    nest: dict[str, Any] = {"VERSION": 2}
    own = {
        "MODEL.WEIGHTS": str(weights),
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.NORM": "SyncBN",
        "TEST.PRECISE_BN.ENABLED": True,
    }
    for key, value in (own | detectron2_settings(facts)).items():
        *path, last = key.split(".")
        node = nest
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    said = f"# {facts.name}: {facts.arch}, {facts.method}; " + ", ".join(
        f"{key} {source}" for key, source in facts.sources.items()
    )
    body = yaml.safe_dump(nest, sort_keys=False, default_flow_style=None)
    return f"{HEADER}\n{' '.join(said.split())}\n{body}"


def has_c4(arch: str) -> bool:
    """Tell whether Detectron2's C4 head, which is made of bottlenecks, fits a network."""
    return ARCHS[arch].bottleneck


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(
            abs(a - b) <= _TOLERANCE for a, b in zip(found, wanted, strict=True)
        )
    return bool(found == wanted)
