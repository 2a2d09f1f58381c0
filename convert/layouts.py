"""The checkpoint layouts in the wild: how each is recognised, which branches it has.

A checkpoint is a nest of dictionaries around a state dict whose keys wear prefixes. `find_layout`
unwraps the nest, strips what wrappers add (`module.` of DistributedDataParallel, `_orig_mod.` of
torch.compile) and compares what is left with the table. Adding a layout is adding an entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from convert.errors import UserError
from convert.names import is_backbone_name
from convert.pixels import IMAGENET_PIXELS, Pixels

WRAPPERS = ("module.", "_orig_mod.")
CONTAINERS = ("state_dict", "model")


@dataclass(frozen=True)
class Layout:
    """One way of writing a checkpoint down.

    Attributes:
        name: what the layout is called.
        branches: each branch's prefix; the first one is what the method's authors evaluate.
        signs: keys of which at least one must be there besides the backbone, if any are named.
        method: what made it, where the layout alone says so.
        pixels: what it expects of an image.
    """

    name: str
    branches: Mapping[str, str]
    signs: tuple[str, ...] = ()
    method: str = "unknown"
    pixels: Pixels = IMAGENET_PIXELS


LAYOUTS = (
    # moco/builder.py of the reference: encoder_q, encoder_k, queue; also PCL and CLSA.
    Layout("moco", {"query": "encoder_q.", "key": "encoder_k."}, ("queue",), "MoCo v1"),
    # The same after a cleaning that kept the query encoder only.
    Layout("moco", {"query": "encoder_q."}, (), "MoCo v1"),
    Layout("moco-v3", {"query": "base_encoder.", "key": "momentum_encoder."}, (), "MoCo v3"),
    Layout("torchvision", {"query": ""}),
)


@dataclass(frozen=True)
class Recognised:
    """A layout found in a file.

    Attributes:
        layout: the entry that fits.
        branch: the name of the branch taken.
        weights: that branch's backbone, torchvision names.
        dropped: the names left behind, as they stand in the unwrapped state dict.
        head: names of the branch that are not its backbone, without the prefix.
    """

    layout: Layout
    branch: str
    weights: dict[str, Tensor]
    dropped: list[str]
    head: list[str]


def find_layout(checkpoint: Mapping[str, Any], where: str) -> Recognised:
    """Recognise a checkpoint's layout and take its backbone.

    Args:
        checkpoint: what the file holds.
        where: the file's name, for the error line.

    Raises:
        UserError: no layout of the table fits.
    """
    state = _unwrap(checkpoint)
    for layout in LAYOUTS:
        branch, prefix = next(iter(layout.branches.items()))
        if f"{prefix}conv1.weight" not in state or not set(layout.signs) <= state.keys():
            continue
        own = {name.removeprefix(prefix): name for name in state if name.startswith(prefix)}
        weights = {short: state[name] for short, name in own.items() if is_backbone_name(short)}
        taken = {own[short] for short in weights}
        return Recognised(
            layout=layout,
            branch=branch,
            weights=weights,
            dropped=[name for name in state if name not in taken],
            head=[short for short in own if short not in weights],
        )
    known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
    first = ", ".join(f"'{key}'" for key in list(state or checkpoint)[:3]) or "none"
    raise UserError(
        f"{where}: holds no ResNet backbone that is known here; first keys are {first}; "
        f"want a checkpoint of {known}"
    )


def _unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict inside a checkpoint, names without their wrappers' prefixes."""
    for key in CONTAINERS:
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping):
            checkpoint = inner
            break
    state = {str(name): value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    stripped = True
    while stripped:
        stripped = False
        for wrapper in WRAPPERS:
            if state and all(name.startswith(wrapper) for name in state):
                state = {name.removeprefix(wrapper): value for name, value in state.items()}
                stripped = True
    return state
