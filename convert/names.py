"""Parameter names: torchvision <-> Detectron2, one table of rules.

Both networks are the same ResNet, and only words differ: Detectron2 puts the first convolution
into a `stem`, counts stages from 2, hangs a norm below its convolution and calls a projection
`shortcut`.
A backbone's name is one without a place in a detector: `res5.0.conv1.weight`. In a model it stands
below a prefix: `roi_heads.res5.0...` (C4) or `backbone.bottom_up.res5.0...` (FPN).
"""

import re
from collections.abc import Iterable

from convert.errors import UserError

# (torchvision, Detectron2): patterns of the parts that differ, applied in this order.
_RULES: tuple[tuple[str, str], ...] = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer1\.", "res2."),
    (r"^layer2\.", "res3."),
    (r"^layer3\.", "res4."),
    (r"^layer4\.", "res5."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)
_PARTS = "weight|bias|running_mean|running_var|num_batches_tracked"
_BACKBONE_NAME = re.compile(
    rf"(conv1|bn1|layer[1-4]\.\d+\.(conv\d|bn\d|downsample\.[01]))\.({_PARTS})"
)
COUNTER = "num_batches_tracked"


def is_backbone_name(name: str) -> bool:
    """Tell whether a torchvision name belongs to a ResNet without its head."""
    return _BACKBONE_NAME.fullmatch(name) is not None


def to_detectron2(name: str) -> str:
    """Return the Detectron2 name of a torchvision one: layer1.0.bn1.bias -> res2.0.conv1.norm.bias.

    Raises:
        UserError: it is not a name of a ResNet backbone.
    """
    if not is_backbone_name(name):
        raise UserError(
            f"parameter '{name}': want a torchvision ResNet's, as layer1.0.conv1.weight"
        )
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def land(names: Iterable[str], model_keys: Iterable[str]) -> dict[str, str]:
    """Find each backbone tensor's one place in a Detectron2 model.

    Args:
        names: backbone names in Detectron2's spelling.
        model_keys: every key of the model's state dict.

    Returns:
        The model's key for each name.

    Raises:
        UserError: a name has no place or several, or a backbone key of the model stays without one.
    """
    names = list(names)
    places: dict[str, list[str]] = {name: [] for name in names}
    unfilled = []
    for key in model_keys:
        match = re.search(r"(?:^|\.)((?:stem|res[2-5]\.\d+)\..+)$", key)
        if match is None:
            continue
        if match[1] in places:
            places[match[1]].append(key)
        elif not key.endswith(COUNTER):  # counters are not in every checkpoint; BN works without
            unfilled.append(key)
    wrong = [
        name for name, found in places.items() if len(found) != 1 and not name.endswith(COUNTER)
    ]
    if wrong or unfilled:
        raise UserError(
            f"{len(wrong)} of {len(names)} backbone tensors have no single place in the model"
            f"{_first(wrong)}, and {len(unfilled)} of the model's get none{_first(unfilled)}; "
            "was the checkpoint made for another depth?"
        )
    return {name: found[0] for name, found in places.items() if found}


def _first(names: list[str]) -> str:
    return f" (first '{names[0]}')" if names else ""
