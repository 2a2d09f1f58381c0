"""The checkpoint layouts in the wild: how each is recognised, which branches it has.

A checkpoint is a nest of dictionaries around state dicts whose names wear prefixes. `find_layout`
flattens the nest, strips what wrappers add (`module.` of DistributedDataParallel, `_orig_mod.` of
torch.compile), finds every ResNet in it, and compares where they stand with the table below. Adding
a layout is adding an entry here and an origin in the tests.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert.errors import UserError
from convert.names import find_backbones, strays
from convert.pixels import IMAGENET_PIXELS, UNIT_PIXELS, Pixels
from convert.reading import PickledArray, Placeholder
from convert.resnets import CIFAR_PAD2_STEM, CIFAR_STEM

WRAPPERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_forward_module",
    "_checkpoint_wrapped_module",
)
# Containers whose name tells the branch; what they hold keeps the name before its own.
EMA_CONTAINERS = ("model_ema", "ema", "ema_state_dict", "state_dict_ema")
BRANCH_CONTAINERS = ("teacher", "student", *EMA_CONTAINERS)
NO_WEIGHTS = re.compile(
    r"(optim(izer)?(_\w+)?|opt|\w*schedulers?|\w*scaler|callbacks|loops|hyper_parameters|amp|args)$"
)
DEEPEST = 8  # containers; VISSL's files have five

Roots = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """One way of writing a checkpoint down.

    Attributes:
        name: what the layout is called.
        method: what made it, as far as the layout tells.
        branches: each branch's roots (one of them is there); the first branch is what the method's
            authors evaluate.
        signs: patterns, each of which some name or key beside the backbone must match.
        lacks: patterns that none may match.
        dialect: how the parameters are named, if only one will do.
        pixels: what it expects of an image, if its code fixes that.
        stride_in_1x1: where a bottleneck's stride is, if its code fixes that.
        cifar_stem: what a 3x3 stem is in its code.
    """

    name: str
    method: str
    branches: Mapping[str, Roots]
    signs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    dialect: str = ""
    pixels: Pixels | None = None
    stride_in_1x1: bool | None = None
    cifar_stem: str = CIFAR_STEM


def _fixed(
    name: str, method: str, branches: Mapping[str, Roots], *signs: str, **more: Any
) -> Layout:
    """Make an entry whose code fixes ImageNet's statistics and the stride in the 3x3."""
    facts: dict[str, Any] = {"pixels": IMAGENET_PIXELS, "stride_in_1x1": False}
    return Layout(name, method, branches, signs, **(facts | more))


_QK: Mapping[str, Roots] = {"query": ("encoder_q.",), "key": ("encoder_k.", "encoder_t.")}
_ENCODER: Mapping[str, Roots] = {"query": ("encoder.",), "key": ("encoder_k.",)}
_TEACHER: Mapping[str, Roots] = {
    "teacher": ("teacher/backbone.", "teacher/"),
    "student": ("student/backbone.", "student/"),
}
_BACKBONE: Mapping[str, Roots] = {"query": ("backbone.",)}

LAYOUTS = (
    # --- encoder_q: the family of MoCo's builder
    _fixed("msf", "MSF", _QK, r"^predict_q\."),
    _fixed("resim", "ReSim", _QK, r"^encoder_q\.fpn_"),
    Layout("bolts-moco", "MoCo of Lightning Bolts", _QK, (r"^(val_queue|queue\.repr)",)),
    Layout("bolts-moco", "MoCo of Lightning Bolts", _QK, ("^pytorch-lightning_version$",)),
    Layout(
        "moco-cifar",
        "MoCo, the CIFAR-10 notebook's",
        {"query": ("encoder_q.net.",), "key": ("encoder_k.net.",)},
        pixels=Pixels("RGB", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        stride_in_1x1=False,
    ),
    _fixed("moco", "MoCo v1", _QK),  # PCL and CLSA look the same
    _fixed("moco-v3", "MoCo v3", {"query": ("base_encoder.",), "key": ("momentum_encoder.",)}),
    # --- encoder
    _fixed("pixpro", "PixPro", _ENCODER, r"^value_transform\."),
    _fixed("soco", "SoCo", _ENCODER, r"^(neck|predictor)\.", r"^(projector|encoder)_k\."),
    _fixed("pixpro", "PixPro", _ENCODER, r"^(projector|encoder)_k\."),
    Layout(
        "solo-learn",
        "a method of solo-learn",
        {"query": ("encoder.",), "key": ("momentum_encoder.",)},
        (r"^(classifier|projector)\.", "^pytorch-lightning_version$"),
        cifar_stem=CIFAR_PAD2_STEM,
    ),
    _fixed("simsiam", "SimSiam", {"query": ("encoder.",)}, r"^predictor\.", r"^encoder\.fc\.\d"),
    Layout(
        "pycontrast",
        "InsDis, PIRL, InfoMin or MoCo of PyContrast, or SupCon",
        {"query": ("encoder.",)},
        (r"^head(_jig)?\.",),
    ),
    # --- DINO
    _fixed(
        "dino",
        "DINO",
        {
            "teacher": ("teacher/backbone.", "teacher/"),
            "student": ("student/backbone.", "student/"),
        },
    ),
    # --- OpenMMLab
    Layout(
        "openselfsup",
        "a method of OpenSelfSup or MMSelfSup 0.x",
        {
            "query": ("backbone.", "encoder_q.0.", "online_net.0.", "base_encoder.0."),
            "key": ("encoder_k.0.", "target_net.0.", "momentum_encoder.0."),
        },
        (r"^(encoder_q|online_net|base_encoder)\.0\.",),
    ),
    Layout(
        "openselfsup",
        "a method of OpenSelfSup or MMSelfSup 0.x",
        _BACKBONE,
        (r"^(neck|head)\.", r"^meta\.mmcv_version$"),
        (r"^(rpn|roi|bbox|mask|query)_head\.",),
    ),
    Layout(
        "mmdet", "a detector of MMDetection", _BACKBONE, (r"^(rpn|roi|bbox|mask|query)_head\.",)
    ),
    Layout(
        "mmselfsup",
        "a method of MMSelfSup 1.x or MMPretrain",
        {
            "query": ("backbone.",),
            "key": ("encoder_k.0.", "target_net.0.", "momentum_encoder.0.", "momentum_encoder."),
        },
        (r"^(neck|head|encoder_k|target_net|momentum_encoder)\.",),
    ),
    # --- backbone
    Layout(
        "lightly",
        "a method of lightly",
        {"query": ("query_backbone.",), "key": ("backbone.",)},
        (r"^query_backbone\.",),
    ),
    Layout(
        "lightly",
        "a method of lightly",
        {"query": ("backbone.",), "key": ("key_backbone.", "backbone_momentum.")},
        (r"^(key_backbone|backbone_momentum)\.",),
    ),
    Layout(
        "lightly",
        "a method of lightly",
        {"teacher": ("teacher_backbone.", "backbone."), "student": ("student_backbone.",)},
        (r"^student_backbone\.",),
    ),
    Layout(
        "lightly",
        "a method of lightly",
        {"query": ("backbone.",), "teacher": ("teacher_backbone.",)},
        (r"^(teacher_backbone|projection_head|prediction_head|online_classifier|criterion)\.",),
    ),
    _fixed("barlow-vicreg", "VICRegL", _BACKBONE, r"^maps_projector\."),
    Layout(
        "barlow-vicreg",
        "Barlow Twins, VICReg or one named like them",
        _BACKBONE,
        (r"^projector\.",),
        ("^class", "^predictor", "^pytorch-lightning_version$"),
    ),
    Layout(
        "solo-learn",
        "a method of solo-learn",
        {"query": ("backbone.",), "key": ("momentum_backbone.",)},
        (r"^(classifier|projector|momentum_\w+)\.", "^pytorch-lightning_version$"),
        cifar_stem=CIFAR_PAD2_STEM,
    ),
    # --- flat, or in a dialect of its own
    Layout(
        "vissl",
        "a method of VISSL",
        {
            "query": ("_feature_blocks.", "trunk._feature_blocks.", "base_model._feature_blocks."),
            "key": ("moco_encoder.trunk._feature_blocks.",),
        },
    ),
    _fixed(
        "swav",
        "SwAV, DeepCluster v2 or SeLa v2",
        {"query": ("",)},
        r"^prototypes\.(prototypes\d+\.)?weight$",
        r"^projection_head\.",
    ),
    Layout(
        "huggingface",
        "a ResNet of transformers",
        {"query": ("", "resnet.")},
        dialect="huggingface",
    ),
    Layout(
        "simclr-v2",
        "SimCLR v2",
        {"query": ("",)},
        dialect="simclr-v2",
        pixels=UNIT_PIXELS,
        stride_in_1x1=False,
    ),
    Layout(
        "detectron2",
        "a model of Detectron2",
        {"query": ("backbone.bottom_up.", "backbone.", "bottom_up.", "")},
        dialect="detectron2",
    ),
    Layout("caffe2", "a Caffe2 model", {"query": ("",)}, dialect="caffe2"),
    # Also timm, DINO's, Barlow Twins' and VICReg's released backbones, SimCLR v1 ports and what
    # OpenMMLab extracts: alike to the byte.
    Layout("torchvision", "unknown", {"query": ("",)}, dialect="torchvision"),
    Layout("torchvision", "unknown", {"query": ("",)}, dialect="sequential"),
)


@dataclass(frozen=True)
class Candidate:
    """A ResNet found in a file.

    Attributes:
        dialect: how its parameters are named.
        root: where it stands, wrappers and neutral containers stripped.
        weights: torchvision's names -> tensors.
        names: where each stands in the flattened file.
        where: its containers and its root, for error lines.
    """

    dialect: str
    root: str
    where: str
    weights: dict[str, Tensor]
    names: dict[str, str]

    def equals(self, other: "Candidate") -> bool:
        """Tell whether two hold the same tensors."""
        return self.weights.keys() == other.weights.keys() and all(
            torch.equal(tensor, other.weights[name]) for name, tensor in self.weights.items()
        )


@dataclass(frozen=True)
class Recognised:
    """A layout found in a file.

    Attributes:
        layout: the entry that fits.
        branch: the name of the branch taken; branches: all that the file has.
        dialect: how the parameters are named.
        root: where the backbone stands.
        weights: the backbone, torchvision's names.
        dropped: parts left behind -> their tensors, as `{"encoder_k": 320, "queue": 1}`.
        head: names below the root that are not the backbone, without the root.
        head_weights: the tensors of `head`.
    """

    layout: Layout
    branch: str
    branches: tuple[str, ...]
    dialect: str
    root: str
    weights: dict[str, Tensor]
    dropped: dict[str, int]
    head: list[str]
    head_weights: dict[str, Tensor]


def find_layout(values: Any, where: str, branch: str | None = None) -> Recognised:
    """Recognise a checkpoint's layout and take its backbone.

    Args:
        values: what the file holds.
        where: the file, for the error line.
        branch: which backbone to take; default: what the method's authors evaluate.

    Raises:
        UserError: there is no ResNet, or several that no entry of the table explains.
    """
    states = _flatten(values, where)
    candidates = _candidates(states, where)
    keys = _keys(values)
    tensors = {f"{_place(path)}{name}": t for path, s in states.items() for name, t in s.items()}
    names = [f"{_place(path)}{name}" for path, state in states.items() for name in state]
    if not candidates:
        raise UserError(_no_backbone(names or keys, where))
    for common in _common_roots(candidates):
        near = [name.removeprefix(common) for name in (*names, *keys)]
        for layout in LAYOUTS:
            found = _fit(layout, candidates, common, "\n".join(near))
            if found:
                _refuse_ambiguity(layout, found, where)
                chosen = _choose(found, branch, layout, where)
                return _recognised(layout, chosen, found, names, tensors)
    raise UserError(
        f"{where}: holds {len(candidates)} backbones that differ, at {_listed(candidates)}, and no "
        "layout that is known here has both; save the one that you mean in a file of its own"
    )


# --- what is in the file --------------------------------------------------------------------------


def _flatten(values: Any, where: str) -> dict[tuple[str, ...], dict[str, Tensor]]:
    """Return every state dict in the nest: the containers' names -> names -> tensors."""
    if isinstance(values, Placeholder):
        raise UserError(
            f"{where}: holds a whole pickled object ({values.origin}), whose class is not imported "
            "here; save its weights: torch.save(model.state_dict(), ...)"
        )
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: holds a {type(values).__name__}, want a dictionary of tensors")
    states: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for path, name, tensor in _leaves(values, ()):
        state = states.setdefault(path, {})
        short = _unwrap(name)
        if short in state and not torch.equal(state[short], tensor):
            raise UserError(f"{where}: two different tensors are called '{short}' in it")
        state[short] = tensor
    return states


def _leaves(
    values: Mapping[Any, Any], path: tuple[str, ...], seen: set[int] | None = None
) -> Iterator[tuple[tuple[str, ...], str, Tensor]]:
    """Yield every tensor in a nest, each container once however often it is referred to."""
    seen = set() if seen is None else seen
    if id(values) in seen:
        return
    seen.add(id(values))
    for key, value in values.items():
        name = key if isinstance(key, str) else _word(key)
        if isinstance(value, Tensor):
            yield path, name, value
        elif isinstance(value, np.ndarray | PickledArray):
            array = np.asarray(value)
            if array.dtype.kind in "fiu" and array.dtype.itemsize <= 8:
                yield path, name, _from_numpy(array)
        elif isinstance(value, Mapping) and len(path) < DEEPEST and not NO_WEIGHTS.match(name):
            yield from _leaves(value, (*path, name), seen)


def _word(key: Any) -> str:
    """Return a name for a key that is no string; Python refuses to write very long numbers."""
    try:
        return repr(key)
    except ValueError:
        return f"a {type(key).__name__}"


def _from_numpy(array: np.ndarray) -> Tensor:
    """Wrap an array without copying it; it is only read, so that it need not be writable."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _keys(values: Mapping[Any, Any]) -> list[str]:
    """Return what else may tell a layout: the file's own keys, and those of its `meta`."""
    meta = values.get("meta")
    below = (
        [f"meta.{key}" for key in meta if isinstance(key, str)] if isinstance(meta, Mapping) else []
    )
    return [*(key for key in values if isinstance(key, str)), *below]


def _unwrap(name: str) -> str:
    """Strip wrappers' prefixes, wherever in a name they stand."""
    *above, last = name.split(".")
    return ".".join([*(part for part in above if part not in WRAPPERS), last])


def _place(path: tuple[str, ...]) -> str:
    return "".join(f"{name}/" for name in path if name in BRANCH_CONTAINERS)


def _candidates(states: Mapping[tuple[str, ...], dict[str, Tensor]], where: str) -> list[Candidate]:
    found = []
    for path, state in states.items():
        for dialect, root, names in find_backbones(state):
            if "conv1.weight" not in names:
                deep = [
                    name for name in state if re.match(rf"{re.escape(root)}(conv1|stem)\.\d", name)
                ]
                if deep:
                    raise UserError(
                        f"{where}: its stem is of several convolutions ('{deep[0]}'), as ResNet-C "
                        "and -D have; want a single one, as torchvision's and Detectron2's ResNets"
                    )
                continue
            if "layer1.0.conv2.weight" not in names:
                first = next(name for name in state if name.startswith(root))
                raise UserError(
                    f"{where}: has blocks with other parts than a ResNet's, such as selective "
                    f"kernels, at '{root}' (first '{first}'); want a plain ResNet"
                )
            stray = next(strays(state, root, dialect), None)
            if stray is not None:
                raise UserError(
                    f"{where}: has a part in its blocks that a ResNet has not, '{stray}' "
                    "(squeeze-and-excitation, a deformable convolution); want a plain ResNet"
                )
            weights = {short: state[name] for short, name in names.items()}
            place = _place(path) + root
            found.append(
                Candidate(
                    dialect,
                    place,
                    "".join(f"{part}/" for part in path) + root,
                    weights,
                    {k: _place(path) + v for k, v in names.items()},
                )
            )
    return found


def _no_backbone(names: list[str], where: str) -> str:
    vit = next((n for n in names if re.search(r"patch_embed|cls_token|patch_embeddings", n)), None)
    if vit:
        return f"{where}: holds a vision transformer ('{vit}'); want a ResNet"
    known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
    first = ", ".join(f"'{name}'" for name in names[:3]) or "none"
    return (
        f"{where}: holds no ResNet backbone that is known here; first keys are {first}; "
        f"want a checkpoint of {known}"
    )


# --- which layout it is ---------------------------------------------------------------------------


def _common_roots(candidates: list[Candidate]) -> Iterator[str]:
    """Yield what all roots begin with, part by part: a file may hold a model within a model."""
    common = ""
    yield common
    parts = [re.findall(r"[^./]+[./]", candidate.root) for candidate in candidates]
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            return
        common += level[0]
        yield common


def _fit(
    layout: Layout, candidates: list[Candidate], common: str, names: str
) -> dict[str, list[Candidate]] | None:
    """Return each branch's backbones if a layout fits the file, else nothing."""
    if any(layout.dialect not in ("", candidate.dialect) for candidate in candidates):
        return None
    if not all(re.search(sign, names, re.MULTILINE) for sign in layout.signs):
        return None
    if any(re.search(sign, names, re.MULTILINE) for sign in layout.lacks):
        return None
    found: dict[str, list[Candidate]] = {}
    for branch, roots in layout.branches.items():
        for candidate in candidates:
            if candidate.root.removeprefix(common) in roots:
                found.setdefault(branch, []).append(candidate)
    default = next(iter(layout.branches.values()))
    averaged = {f"{container}/{root}" for container in EMA_CONTAINERS for root in default}
    for candidate in candidates:
        if candidate.root.removeprefix(common) in averaged:
            found.setdefault("ema", []).append(candidate)
    if next(iter(layout.branches)) not in found:
        return None
    explained = [candidate for branch in found.values() for candidate in branch]
    rest = [c for c in candidates if not any(c is one or c.equals(one) for one in explained)]
    return None if rest else found


def _refuse_ambiguity(layout: Layout, found: Mapping[str, list[Candidate]], where: str) -> None:
    for branch, same in found.items():
        if any(not one.equals(same[0]) for one in same[1:]):
            raise UserError(
                f"{where}: holds {len(same)} backbones that differ, at {_listed(same)}, which all "
                f"may be the {branch} branch of {layout.name}; save one in a file of its own"
            )


def _choose(
    found: Mapping[str, list[Candidate]], branch: str | None, layout: Layout, where: str
) -> str:
    if branch is None:
        return next(iter(found))
    if branch not in found:
        raise UserError(
            f"{where}: has no branch '{branch}'; this file of {layout.name} has {', '.join(found)}"
        )
    return branch


def _recognised(
    layout: Layout,
    branch: str,
    found: Mapping[str, list[Candidate]],
    names: list[str],
    tensors: Mapping[str, Tensor],
) -> Recognised:
    chosen = found[branch][0]
    taken = set(chosen.names.values())
    left = [name for name in names if name not in taken]
    head = [name for name in left if name.startswith(chosen.root)]
    return Recognised(
        layout=layout,
        branch=branch,
        branches=tuple(found),
        dialect=chosen.dialect,
        root=chosen.root,
        weights=chosen.weights,
        dropped=dict(Counter(re.split(r"[./]", name)[0] for name in left)),
        head=[name.removeprefix(chosen.root) for name in head],
        head_weights={name.removeprefix(chosen.root): tensors[name] for name in head},
    )


def _listed(candidates: list[Candidate]) -> str:
    return " and ".join(f"'{candidate.where or 'the top'}'" for candidate in candidates)
