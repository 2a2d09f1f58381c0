"""Write a backbone as Detectron2 reads it, and prove that it is the same network.

The proof: every backbone tensor lands in Detectron2's C4 and FPN models, none of theirs stays
unfilled, and on a probe image the models' res2 to res5 equal the source network's.
"""

import contextlib
import importlib.util
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convert.backbone import (
    EXTRA_KEY,
    Backbone,
    Facts,
    build_resnet,
    load_backbone,
    read_detectron2,
    read_pickle,
)
from convert.errors import UserError
from convert.files import atomic_write, detectron2_version, sha256
from convert.names import COUNTER, land, to_detectron2

WEIGHTS_LINK = Path("output/weights.pkl")  # what the *_moco.yaml recipes name as MODEL.WEIGHTS
STAGES = ("res2", "res3", "res4", "res5")
# Two float32 libraries order their sums differently; a wrong tensor is off by the features' scale.
TOLERANCE = 1e-5
AUTHOR = "MoCo Transfer"


def convert(checkpoint: Path, output: Path | None = None, *, force: bool = False) -> dict[str, Any]:
    """Convert a checkpoint, keep the result only if it is proved, and link it.

    Args:
        checkpoint: the source, of any supported layout.
        output: the pickle to write; default: beside the source.
        force: overwrite an output that came from something else.

    Returns:
        The certificate: source, tensors, pixels, proof.

    Raises:
        UserError: the source is refused, the proof fails, or the output exists and differs.
    """
    output = output or _beside(checkpoint)
    existing = _existing(checkpoint, output, force)
    if existing is not None:
        _link(output)
        return existing
    backbone = load_backbone(checkpoint)
    arrays = {to_detectron2(name): tensor.numpy() for name, tensor in backbone.weights.items()}
    certificate = _certify(backbone, arrays, output)
    content = {
        "model": arrays,
        "__author__": AUTHOR,
        "matching_heuristics": True,
        EXTRA_KEY: {"facts": backbone.facts.as_dict(), "certificate": certificate},
    }
    with atomic_write(output) as temporary:
        temporary.write_bytes(_pickle(content))
        written, _ = read_detectron2(temporary)
        if any(not np.array_equal(written[name], array) for name, array in arrays.items()):
            raise OSError(f"{output}: was not written as meant")
    _link(output)
    return certificate


def describe(certificate: Mapping[str, Any]) -> str:
    """Say a certificate in lines for a terminal."""
    tensors, proof, pixels = (certificate[key] for key in ("tensors", "proof", "pixels"))
    epoch = "" if certificate["epoch"] is None else f", epoch {certificate['epoch']}"
    rows = [
        ("source", f"{certificate['source']} (sha256 {certificate['sha256'][:12]})"),
        ("network", f"{certificate['arch']}, {certificate['method']}{epoch}"),
        ("layout", f"{certificate['layout']}, {certificate['branch']} encoder"),
        (
            "tensors",
            f"{tensors['landed']} of {tensors['expected']} landed, {tensors['counters']} counters, "
            f"{tensors['dropped']} dropped (heads, other encoders, queue)",
        ),
        (
            "pixels",
            f"{pixels['channel_order']}, mean {pixels['mean']}, std {pixels['std']} of 0..1",
        ),
    ]
    if proof["ran"]:
        for target in (name for name in ("c4", "fpn") if name in proof):
            found = proof[target]
            rows.append(
                (
                    f"proof {target}",
                    f"res2 to res5 differ by {found['largest_difference']:.1e} at most, "
                    f"of features up to {found['scale']:.3g} ({proof['detectron2']})",
                )
            )
    else:
        rows.append(("proof", f"names and shapes only: {proof['reason']}"))
    rows.append(("output", f"{certificate['output']}, linked from {WEIGHTS_LINK}"))
    title = "already converted" if certificate.get("already") else "converted"
    return "\n".join([title, *(f"  {name:10} {text}" for name, text in rows)])


def _beside(checkpoint: Path) -> Path:
    stem = checkpoint.name
    for suffix in (".tar", ".pth", ".pt", ".pkl"):
        stem = stem.removesuffix(suffix)
    output = checkpoint.with_name(f"{stem}.pkl")
    return output if output != checkpoint else checkpoint.with_name(f"{stem}.detectron2.pkl")


def _existing(checkpoint: Path, output: Path, force: bool) -> dict[str, Any] | None:
    """Return the certificate of an output that this very source gave, if there is one."""
    if force or not output.exists() or not checkpoint.is_file():
        return None
    with contextlib.suppress(UserError):
        certificate: dict[str, Any] = read_pickle(output)[EXTRA_KEY]["certificate"]
        same_source = certificate["sha256"] == sha256(checkpoint)
        # A conversion made without Detectron2 is made again once it can be proved.
        if same_source and certificate["proof"]["ran"] == _can_prove():
            return certificate | {"output": str(output), "already": True}
    raise UserError(f"{output}: exists and came from something else; add --force to overwrite it")


def _link(output: Path) -> None:
    """Point output/weights.pkl of the current folder at a conversion."""
    temporary = WEIGHTS_LINK.with_name(f".{WEIGHTS_LINK.name}.{output.stat().st_ino}")
    try:
        WEIGHTS_LINK.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(output.resolve())
        temporary.replace(WEIGHTS_LINK)
    except OSError as error:
        raise UserError(
            f"{WEIGHTS_LINK}: cannot be linked to {output} ({error.strerror}); the conversion is "
            "whole: name it as MODEL.WEIGHTS"
        ) from error


def _pickle(content: Mapping[str, Any]) -> bytes:
    """Pickle arrays so that NumPy 1.24 and 2 both read them.

    NumPy 2 names its own module `numpy._core` in a pickle, which NumPy 1 lacks; both know the old
    name. Protocol 3 spells it out once, at the first array.
    """
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    return pickle.dumps(dict(content), protocol=3).replace(new, old, 1)


def _certify(backbone: Backbone, arrays: Mapping[str, np.ndarray], output: Path) -> dict[str, Any]:
    """Prove a conversion and say what was found.

    Raises:
        UserError: a tensor does not land, or the features differ.
    """
    facts = backbone.facts
    counters = sum(name.endswith(COUNTER) for name in arrays)
    expected = len(arrays) - counters
    proof: dict[str, Any] = {"ran": _can_prove(), "detectron2": detectron2_version()}
    proof["reason"] = None if proof["ran"] else "Detectron2 is not installed (see README, Install)"
    if proof["ran"]:
        with _quiet():
            proof |= _prove(backbone, arrays)
    return {
        "source": facts.name,
        "sha256": facts.sha256,
        "layout": facts.layout,
        "branch": facts.branch,
        "arch": facts.arch,
        "method": facts.method,
        "epoch": facts.epoch,
        "output": str(output),
        "tensors": {
            "landed": expected,
            "expected": expected,
            "counters": counters,
            "dropped": facts.dropped,
        },
        "proof": proof,
        "pixels": {
            "channel_order": facts.pixels.channel_order,
            "mean": list(facts.pixels.mean),
            "std": list(facts.pixels.std),
        },
        "stride_in_1x1": facts.stride_in_1x1,
    }


def _can_prove() -> bool:
    return importlib.util.find_spec("detectron2") is not None


@torch.no_grad()
def _prove(backbone: Backbone, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Compare the source network with Detectron2's on a probe image of (1, 3, 128, 160)."""
    probe = torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(0))
    want = _stages(build_resnet(backbone.facts.arch, backbone.weights), probe)
    found = {"fpn": _fpn_stages(backbone.facts, arrays, probe)}
    if "layer1.0.conv3.weight" in backbone.weights:  # Detectron2's C4 head is made of bottlenecks
        found["c4"] = _c4_stages(backbone.facts, arrays, probe)
    proof = {}
    for target, stages in found.items():
        scale = max(float(want[name].abs().max()) for name in STAGES)
        worst = max(float((stages[name] - want[name]).abs().max()) for name in STAGES)
        relative = max(
            float((stages[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=1e-12))
            for name in STAGES
        )
        if not relative <= TOLERANCE:
            raise UserError(
                f"{backbone.facts.name}: Detectron2's {target} features differ by {relative:.1e} "
                f"of their scale, want at most {TOLERANCE:.0e}; nothing was written"
            )
        proof[target] = {"largest_difference": worst, "scale": scale, "relative": relative}
    return proof


def _stages(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Return what torchvision's four stages give, under Detectron2's names."""
    x = network.maxpool(network.relu(network.bn1(network.conv1(image))))  # type: ignore[operator]
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
    resnets = config.MODEL.RESNETS
    resnets.DEPTH = int(facts.arch.removeprefix("resnet"))
    resnets.NORM = "BN"
    resnets.STRIDE_IN_1X1 = facts.stride_in_1x1
    if resnets.DEPTH < 50:
        resnets.RES2_OUT_CHANNELS = 64
    config.MODEL.BACKBONE.FREEZE_AT = 0
    config.MODEL.DEVICE = "cpu"
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
