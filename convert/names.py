"""Parameter names: torchvision <-> everybody else's, one table of rules a dialect.

All of these networks are the same ResNet, and only words differ: Detectron2 puts the first
convolution into a `stem`, counts stages from 2, hangs a norm below its convolution and calls a
projection `shortcut`; Caffe2 numbers branches; an `nn.Sequential` numbers everything.
A backbone's name is one without a place in a larger model: `layer1.0.conv1.weight`, or
`res5.0.conv1.weight` in Detectron2. In a model it stands below a root: `encoder_q.`, `backbone.`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from convert.errors import UserError

Rule = tuple[str, str | Callable[[re.Match[str]], str]]

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


# --- dialects -------------------------------------------------------------------------------------


def _plus_one(template: str) -> Callable[[re.Match[str]], str]:
    """Fill a template with a match's numbers, each counted from 1 and not from 0."""
    return lambda match: template.format(*(int(group) + 1 for group in match.groups()))


def _half_plus_one(template: str) -> Callable[[re.Match[str]], str]:
    """The same for places in a Sequential where convolutions and norms alternate: 0, 2, 4."""
    return lambda match: template.format(int(match[1]) // 2 + 1)


_LETTERS = {"a": "1", "b": "2", "c": "3"}
_CAFFE2_PARTS = {
    "s": "weight",
    "b": "bias",
    "rm": "running_mean",
    "riv": "running_var",
    "gamma": "weight",
    "beta": "bias",  # as Detectron2's model zoo spells them
}


@dataclass(frozen=True)
class Dialect:
    """One way of naming a ResNet's parameters.

    Attributes:
        name: what it is called.
        anchor: a name that every backbone in this dialect has; what stands before it is the root.
        rules: patterns that make a name below the root torchvision's, applied in this order.
        elsewhere: where, beside the root, detectors keep the last stage.
    """

    name: str
    anchor: str
    rules: tuple[Rule, ...] = ()
    elsewhere: str = ""

    def roots(self, names: Iterable[str]) -> list[str]:
        """Return the roots at which a backbone stands, in the order of the names."""
        pattern = re.compile(rf"((?:.*\.)?){self.anchor}")
        found = (pattern.fullmatch(name) for name in names)
        return list(dict.fromkeys(match[1] for match in found if match))

    def translate(self, names: Iterable[str], root: str) -> dict[str, str]:
        """Return torchvision's name -> the model's, for every backbone tensor below a root."""
        above = root[: root.rstrip(".").rfind(".") + 1]
        found = {}
        for name in names:
            for start in (root, above + self.elsewhere if self.elsewhere else root):
                if name.startswith(start):
                    short = self.rename(name.removeprefix(start))
                    if is_backbone_name(short):
                        found[short] = name
        return found

    def rename(self, name: str) -> str:
        """Apply the rules to a name below the root."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


def _sequential(first: int) -> Dialect:
    """Make the dialect of `nn.Sequential(*resnet.children())`: 0 is conv1, 1 is bn1.

    Activations and pools have no parameters and yet a number, so that the first stage is at 2 (no
    module for the activation), 3 (no max pool, as for CIFAR) or 4.
    """
    return Dialect(
        "sequential",
        rf"{first}\.0\.conv1\.weight",
        (
            (r"^0\.(?=weight|bias)", "conv1."),
            (rf"^1\.(?={_PARTS})", "bn1."),
            (r"^(\d)\.(\d+)\.", lambda m: f"layer{int(m[1]) - first + 1}.{m[2]}."),
            (r"\.shortcut\.([01])\.", r".downsample.\1."),
        ),
    )


_STAGE = r"^encoder\.stages\.(\d+)\.layers\."
DIALECTS = (
    # CIFAR networks in torchvision's names often say `shortcut`.
    Dialect(
        "torchvision",
        r"layer1\.0\.conv1\.weight",
        ((r"\.shortcut\.([01])\.", r".downsample.\1."),),
        elsewhere="roi_head.shared_head.",
    ),
    Dialect(
        "detectron2",
        r"stem\.conv1\.weight",
        (
            (r"^stem\.conv1\.norm\.", "bn1."),
            (r"^stem\.conv1\.", "conv1."),
            (r"^res([2-5])\.", lambda match: f"layer{int(match[1]) - 1}."),
            (r"\.conv(\d)\.norm\.", r".bn\1."),
            (r"\.shortcut\.norm\.", ".downsample.1."),
            (r"\.shortcut\.", ".downsample.0."),
        ),
        elsewhere="roi_heads.",
    ),
    Dialect(
        "huggingface",
        r"embedder\.embedder\.convolution\.weight",
        (
            (r"^embedder\.embedder\.convolution\.", "conv1."),
            (r"^embedder\.embedder\.normalization\.", "bn1."),
            (_STAGE, _plus_one("layer{}.")),
            (r"\.layer\.(\d)\.convolution\.", _plus_one(".conv{}.")),
            (r"\.layer\.(\d)\.normalization\.", _plus_one(".bn{}.")),
            (r"\.shortcut\.convolution\.", ".downsample.0."),
            (r"\.shortcut\.normalization\.", ".downsample.1."),
        ),
    ),
    Dialect(
        "simclr-v2",
        r"net\.1\.blocks\.0\.net\.0\.weight",
        (
            (r"^net\.0\.0\.", "conv1."),
            (r"^net\.0\.1\.0\.", "bn1."),
            (r"^net\.([1-4])\.blocks\.", r"layer\1."),
            (r"\.net\.([024])\.(?=weight)", _half_plus_one(".conv{}.")),
            (r"\.net\.([135])\.0\.", _half_plus_one(".bn{}.")),
            (r"\.projection\.shortcut\.", ".downsample.0."),
            (r"\.projection\.bn\.0\.", ".downsample.1."),
        ),
    ),
    Dialect(
        "caffe2",
        r"conv1_w",
        (
            (r"^conv1_w$", "conv1.weight"),
            (r"^conv1_b$", "conv1.bias"),
            (r"^res_conv1_bn_(\w+)$", lambda m: f"bn1.{_CAFFE2_PARTS.get(m[1], m[1])}"),
            (r"^res([2-5])_(\d+)_", lambda m: f"layer{int(m[1]) - 1}.{m[2]}."),
            (r"\.branch2([abc])_w$", lambda m: f".conv{_LETTERS[m[1]]}.weight"),
            (r"\.branch1_w$", ".downsample.0.weight"),
            (
                r"\.branch2([abc])_bn_(\w+)$",
                lambda m: f".bn{_LETTERS[m[1]]}.{_CAFFE2_PARTS.get(m[2], m[2])}",
            ),
            (r"\.branch1_bn_(\w+)$", lambda m: f".downsample.1.{_CAFFE2_PARTS.get(m[1], m[1])}"),
        ),
    ),
    *(_sequential(first) for first in (2, 3, 4)),
)


def find_backbones(names: Iterable[str]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Find every ResNet among a model's names, whatever the dialect.

    Yields:
        The dialect's name; the root; torchvision's name -> the model's.
    """
    names = list(names)
    seen = set()
    for dialect in DIALECTS:
        for root in dialect.roots(names):
            if (dialect.name, root) not in seen:  # a Sequential's second stage is not its first
                seen.add((dialect.name, root))
                yield dialect.name, root, dialect.translate(names, root)
