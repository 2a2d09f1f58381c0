"""Write a backbone as Detectron2 reads it, with a certificate of what it is and what was proved."""

import contextlib
import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convert.backbone import Backbone, load_backbone
from convert.errors import UserError, printable
from convert.facts import EXTRA_KEY, Facts, Options, sidecars
from convert.files import atomic_write, detectron2_version, sha256, write_text
from convert.names import COUNTER, to_detectron2
from convert.proof import can_prove, prove
from convert.reading import check_file, read_file
from convert.released import locate
from convert.resnets import IMAGENET_STEM
from convert.settings import HEADER, detectron2_settings, settings_yaml

WEIGHTS_LINK = Path("output/weights.pkl")  # what the *_moco.yaml recipes name as MODEL.WEIGHTS
AUTHOR = "MoCo Transfer"
NOTHING_SAID = Options()
SUFFIXES = (".gz", ".tar", ".pth", ".pt", ".pyth", ".ckpt", ".safetensors", ".bin", ".pkl")


def convert(
    checkpoint: str | Path,
    output: Path | None = None,
    *,
    options: Options = NOTHING_SAID,
    force: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint, keep the result only if it is proved, and link it.

    Beside the pickle stands a YAML of the same name with the settings that fit, to compose with a
    recipe.

    Args:
        checkpoint: the source, of any supported layout, or a released one's name.
        output: the pickle to write; default: beside the source.
        options: which branch, and what the file does not say of itself.
        force: overwrite an output that came from something else.

    Returns:
        The certificate: source, tensors, pixels, proof.

    Raises:
        UserError: the source is refused, the proof fails, or the output exists and differs.
    """
    file = locate(checkpoint)
    check_file(file)
    output = output or _beside(Path(checkpoint))
    _check_output(output, file)
    existing = None if force else _existing(file, output, options)
    if existing is not None:
        _link(output)
        return existing
    backbone = load_backbone(checkpoint, options)
    _refuse_stem(backbone.facts)
    arrays = {to_detectron2(name): tensor.numpy() for name, tensor in backbone.weights.items()}
    certificate = _certify(backbone, arrays, output)
    certificate |= {"options": options.as_dict(), "file_sha256": sha256(file)}
    certificate["beside"] = sidecars(backbone.facts.layout, file)
    content = {
        "model": arrays,
        "__author__": AUTHOR,
        "matching_heuristics": True,
        EXTRA_KEY: {"facts": backbone.facts.as_dict(), "certificate": certificate},
    }
    with atomic_write(settings_path(output)) as settings, atomic_write(output) as temporary:
        settings.write_text(settings_yaml(backbone.facts, output.resolve()), encoding="utf-8")
        _write_pickle(temporary, content)
    _link(output)
    return certificate


def settings_path(output: Path) -> Path:
    """Return where the settings that fit a converted file stand."""
    return output.with_suffix(".yaml")


def describe(certificate: Mapping[str, Any]) -> str:
    """Say a certificate in lines for a terminal."""
    tensors, proof = certificate["tensors"], certificate["proof"]
    parts = ", ".join(f"{part} {count}" for part, count in certificate["dropped_parts"].items())
    rows = [
        *facts_rows(Facts.from_dict(certificate["facts"])),
        (
            "tensors",
            f"{tensors['landed']} of {tensors['expected']} landed, {tensors['counters']} counters, "
            f"{tensors['dropped']} dropped{f' ({parts})' if parts else ''}",
        ),
    ]
    for target in ("c4", "fpn"):
        rows.append((f"proof {target}", _proof_line(proof, target)))
    rows.append(("output", f"{certificate['output']}, linked from {WEIGHTS_LINK}"))
    rows.append(
        ("settings", f"{settings_path(Path(certificate['output']))}, to compose with a recipe")
    )
    title = "already converted" if certificate.get("already") else "converted"
    return table(title, rows)


def _proof_line(proof: Mapping[str, Any], target: str) -> str:
    if not proof["ran"]:
        return f"names and shapes only: {proof['reason']}"
    if target not in proof:
        return "no such target: Detectron2's C4 head is made of bottlenecks, this network is not"
    found = proof[target]
    return (
        f"res2 to res5 differ by {found['largest_difference']:.1e} at most, "
        f"of features up to {found['scale']:.3g} ({proof['detectron2']})"
    )


def facts_rows(facts: Facts) -> list[tuple[str, str]]:
    """Say what is known of a backbone, as rows of a table."""
    epoch = "" if facts.epoch is None else f", epoch {facts.epoch}"
    stem = "" if facts.stem == IMAGENET_STEM else f", stem {facts.stem}"
    where = "1x1" if facts.stride_in_1x1 else "3x3"
    dtype = "" if facts.dtype == "float32" else f", stored as {facts.dtype}"
    dtype += "" if facts.splits == 1 else f", statistics of {facts.splits} splits averaged"
    return [
        ("source", f"{facts.name} (sha256 {facts.sha256[:12]})"),
        ("network", f"{facts.arch}{stem}, {facts.method}{epoch}{dtype}"),
        ("layout", f"{facts.layout}, {facts.branch} encoder"),
        ("pixels", f"{facts.pixels}: {facts.sources['pixels']}"),
        ("stride", f"in the {where} convolution: {facts.sources['stride_in_1x1']}"),
    ]


def describe_source(checkpoint: Path, options: Options, *, as_json: bool) -> str:
    """Say what a file is, without converting it.

    Raises:
        UserError: it is no checkpoint, or holds no backbone.
    """
    facts = load_backbone(checkpoint, replace(options, unknown_too=True)).facts
    if as_json:
        return json.dumps(facts.as_dict())
    parts = [f"{part} {count}" for part, count in facts.dropped_parts.items()]
    rows = facts_rows(facts)
    rows.append(("branches", ", ".join(facts.branches)))
    rows.append(("beside it", ", ".join(parts) or "nothing"))
    if facts.stem == IMAGENET_STEM:
        fit = detectron2_settings(facts)
        rows += [("Detectron2", f"{key} {value}") for key, value in fit.items()]
    return table(str(checkpoint), rows)


def table(title: str, rows: list[tuple[str, str]]) -> str:
    """Set a title above rows of a name and a text."""
    lines = (f"  {name:10} {printable(text)}" for name, text in rows)
    return "\n".join([printable(title), *lines])


def stem_of(checkpoint: Path) -> str:
    """Return a checkpoint's name without what says that it is one."""
    name = checkpoint.name
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _beside(checkpoint: Path) -> Path:
    stem = stem_of(checkpoint)
    output = checkpoint.with_name(f"{stem}.pkl")
    return output if output != checkpoint else checkpoint.with_name(f"{stem}.detectron2.pkl")


def _refuse_stem(facts: Facts) -> None:
    if facts.stem != IMAGENET_STEM:
        raise UserError(
            f"{facts.name}: has the 3x3 stem of CIFAR networks, and Detectron2's ResNets begin "
            "with a 7x7 convolution of stride 2; transfer/knn.py and main_lincls.py take it"
        )


def _check_output(output: Path, checkpoint: Path) -> None:
    """Refuse an output that would destroy something, before anything is read."""
    if output.suffix != ".pkl":
        raise UserError(f"{output}: Detectron2 reads such a file only if its name ends in .pkl")
    if output.exists() and output.samefile(checkpoint):
        raise UserError(f"{output}: is the checkpoint itself; name another output")
    for file in (output, settings_path(output)):
        if file.exists() and not file.is_file():
            raise UserError(f"{file}: is no file that could be replaced; name another output")


def _existing(checkpoint: Path, output: Path, options: Options) -> dict[str, Any] | None:
    """Return the certificate of an output that this very source gave, if there is one."""
    settings = settings_path(output)
    if settings.exists() and not settings.read_bytes().startswith(HEADER.encode()):
        raise UserError(f"{settings}: exists and is not ours; add --force to overwrite it")
    if not output.exists():
        return None
    with contextlib.suppress(UserError, AttributeError, KeyError, TypeError):
        certificate: dict[str, Any] = read_file(output).values[EXTRA_KEY]["certificate"]
        same_source = certificate["file_sha256"] == sha256(checkpoint)
        same = same_source and certificate["options"] == options.as_dict()
        # A conversion made without Detectron2 is made again once it can be proved.
        same = same and certificate["beside"] == sidecars(certificate["layout"], checkpoint)
        if same and certificate["proof"]["ran"] == can_prove():
            facts = Facts.from_dict(certificate["facts"])
            write_text(settings, settings_yaml(facts, output.resolve()))  # it may have been moved
            return certificate | {"output": str(output), "already": True}
    raise UserError(f"{output}: exists and came from something else; add --force to overwrite it")


def _link(output: Path) -> None:
    """Point output/weights.pkl of the current folder at a conversion."""
    if WEIGHTS_LINK.exists() and not WEIGHTS_LINK.is_symlink():
        raise UserError(
            f"{WEIGHTS_LINK}: is a file of its own and was left alone; the conversion is whole: "
            f"take that file away, or name {output} as MODEL.WEIGHTS"
        )
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


def _certify(backbone: Backbone, arrays: Mapping[str, np.ndarray], output: Path) -> dict[str, Any]:
    """Prove a conversion and say what was found.

    Raises:
        UserError: a tensor does not land, or the features differ.
    """
    facts = backbone.facts
    counters = sum(name.endswith(COUNTER) for name in arrays)
    expected = len(arrays) - counters
    proof: dict[str, Any] = {"ran": can_prove(), "detectron2": detectron2_version()}
    proof["reason"] = None if proof["ran"] else "Detectron2 is not installed (see README, Install)"
    if proof["ran"]:
        proof |= prove(backbone, arrays)
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
        "dropped_parts": dict(facts.dropped_parts),
        "proof": proof,
        "pixels": {
            "channel_order": facts.pixels.channel_order,
            "mean": list(facts.pixels.mean),
            "std": list(facts.pixels.std),
        },
        "stride_in_1x1": facts.stride_in_1x1,
        "facts": facts.as_dict(),
    }


# --- the pickle -----------------------------------------------------------------------------------


_PurePickler: Any = pickle._Pickler  # the C one cannot be told what to keep


class _ArrayPickler(_PurePickler):
    """Pickles arrays so that NumPy 1.24 and 2 both read them, without keeping their bytes.

    NumPy 2 names its own module `numpy._core` in a pickle, which NumPy 1 lacks; both know the old
    name. A pickler keeps what it wrote, to refer to it again; of weights that is a second copy.
    """

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj is np._core.multiarray._reconstruct:  # type: ignore[attr-defined]
            self.write(pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    def memoize(self, obj: Any) -> None:
        if not isinstance(obj, bytes):
            super().memoize(obj)


class _Hashed:
    """A file that remembers the hash of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self._file.write(data)


def _write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    """Write a pickle, and read its bytes back to see that the disk has them."""
    with path.open("wb") as file:
        hashed = _Hashed(file)
        _ArrayPickler(hashed, protocol=3).dump(dict(content))
    if sha256(path) != hashed.hash.hexdigest():
        raise OSError(f"{path}: was not written as meant")
