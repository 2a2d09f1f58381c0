"""Write a backbone as torchvision and timm read it, or as safetensors, and prove that it is whole.

The proof: the file holds every tensor of the architecture and no other (a strict load), and what is
read back from it equals what was meant, tensors to the bit and facts to the word. The facts travel
where no loader looks: in a `.pth`, in the `_metadata` that PyTorch's state dicts carry beside their
tensors; in a `.safetensors`, in its metadata.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from convert.backbone import Backbone, load_backbone, weights_digest
from convert.certificate import NOTHING_SAID, facts_rows, stem_of, table
from convert.errors import UserError
from convert.facts import EXTRA_KEY, Facts, Options
from convert.files import atomic_write, sha256
from convert.reading import check_file, read_file
from convert.released import locate
from convert.resnets import IMAGENET_STEM, find_arch

RECORD_KEY = f"{EXTRA_KEY}_export"  # which file and options an output came from
PYTORCH, SAFETENSORS = (".pth", ".pt"), ".safetensors"


def export(
    source: str | Path,
    output: Path | None = None,
    *,
    options: Options = NOTHING_SAID,
    force: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint's backbone for torchvision and timm, and keep it only if it is proved.

    Args:
        source: a checkpoint of any supported layout, or a released one's name.
        output: the file to write; its suffix decides the format; default: beside the source.
        options: which branch, and what the file does not say of itself.
        force: overwrite an output that came from something else.
        quiet: show no progress of a download.

    Returns:
        The report: `facts`, `tensors` written, whether the stem was `flipped` from BGR, `output`,
        and whether it was there `already`.

    Raises:
        UserError: the source is refused, its stride is in the 1x1 convolutions, or the output
            exists and came from something else.
    """
    if output:
        _check_suffix(output)
    path = locate(source, quiet=quiet)
    check_file(path)
    output = output or Path(source).with_name(f"{stem_of(Path(source))}.torchvision.pth")
    if output.exists() and output.samefile(path):
        raise UserError(f"{output}: is the checkpoint itself; name another output")
    record: dict[str, Any] = {"source": sha256(path), "options": options.as_dict()}
    if output.exists() and not force:
        return _existing(output, record)
    loaded = load_backbone(source, options)
    backbone = _as_torchvision(loaded)
    record["flipped"] = backbone.facts.pixels != loaded.facts.pixels
    with atomic_write(output) as temporary:
        temporary.write_bytes(_serialised(backbone, record, output.suffix))
        _prove(temporary, backbone, output)
    return _report(backbone.facts, record, len(backbone.weights), output, already=False)


def describe(report: Mapping[str, Any]) -> str:
    """Say a report in lines for a terminal."""
    facts = Facts.from_dict(report["facts"])
    parts = ", ".join(f"{part} {count}" for part, count in facts.dropped_parts.items())
    written = f"all {report['tensors']} written and read back equal, {facts.dropped} dropped"
    rows = [*facts_rows(facts), ("tensors", f"{written} ({parts})" if parts else written)]
    if report["flipped"]:
        rows.append(("flipped", "the source's stem takes BGR; this one takes RGB"))
    if facts.stem != IMAGENET_STEM:
        rows.append(("stem", "a 3x3 convolution and no pool, for images of 32 px (CIFAR)"))
    rows.append(("output", report["output"]))
    return table("already converted" if report["already"] else "converted", rows)


def _check_suffix(output: Path) -> None:
    if output.suffix not in (*PYTORCH, SAFETENSORS):
        raise UserError(
            f"{output}: ends in '{output.suffix}'; want .pth for torchvision and timm, or "
            ".safetensors"
        )


def _as_torchvision(backbone: Backbone) -> Backbone:
    """Make of a backbone what torchvision's code computes the same with.

    Raises:
        UserError: no order of its channels could do that.
    """
    facts = backbone.facts
    if facts.stride_in_1x1 and find_arch(facts.arch).bottleneck:
        raise UserError(
            f"{facts.name}: has its stride in the 1x1 convolutions "
            f"({facts.sources['stride_in_1x1']}) and torchvision's networks have it in the 3x3: "
            "names and shapes would fit, and the features be wrong; use it in Detectron2 with "
            "STRIDE_IN_1X1 True (convert/to_detectron2.py), or in Python with "
            "convert.backbone.build_resnet"
        )
    if facts.pixels.channel_order == "RGB":
        return backbone
    # The first convolution sums over its input channels, so that their order may change with the
    # image's; mean and standard deviation are kept in RGB order whatever the channels' is.
    weights = backbone.weights | {"conv1.weight": backbone.weights["conv1.weight"][:, [2, 1, 0]]}
    pixels = replace(facts.pixels, channel_order="RGB")
    return Backbone(weights, replace(facts, pixels=pixels, digest=weights_digest(weights)))


def _serialised(backbone: Backbone, record: Mapping[str, Any], suffix: str) -> bytes | memoryview:
    """Return a file's bytes.

    They are made before the file, since a full disk is no `OSError` where torch writes by itself.
    """
    # The strict load that builds the network is the proof that no tensor is missing or too many.
    state: Any = backbone.build().state_dict()
    extra = {EXTRA_KEY: json.dumps(backbone.facts.as_dict()), RECORD_KEY: json.dumps(record)}
    if suffix == SAFETENSORS:
        from safetensors.torch import save

        data: bytes = save(dict(state), {"format": "pt"} | extra)
        return data
    # A state dict's `_metadata` has the version of each module by its name. Loaders look up the
    # modules that they have, and no ResNet has one of our names.
    state._metadata.update(extra)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def _prove(written: Path, backbone: Backbone, output: Path) -> None:
    found = load_backbone(written)
    same = found.facts == backbone.facts and found.weights.keys() == backbone.weights.keys()
    if not (same and all(torch.equal(v, found.weights[k]) for k, v in backbone.weights.items())):
        raise UserError(
            f"{output}: what was read back is not what was written; nothing was kept: try another "
            "disk"
        )


def _existing(output: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of an output that this very source and these options gave.

    Raises:
        UserError: it came from something else, or was changed since.
    """
    try:
        content = read_file(output)
        extra = content.metadata or getattr(content.values, "_metadata", {})
        made, facts = json.loads(extra[RECORD_KEY]), Facts.from_dict(json.loads(extra[EXTRA_KEY]))
        same = all(made[key] == value for key, value in record.items())
        if same and facts.digest == weights_digest(content.values):
            return _report(facts, made, len(content.values), output, already=True)
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        pass  # whatever it is, it is not ours
    raise UserError(
        f"{output}: exists and came from another source or other options; add --force to "
        "overwrite it"
    )


def _report(
    facts: Facts, record: Mapping[str, Any], tensors: int, output: Path, *, already: bool
) -> dict[str, Any]:
    return {
        "output": str(output),
        "already": already,
        "tensors": tensors,
        "flipped": record["flipped"],
        "facts": facts.as_dict(),
    }
