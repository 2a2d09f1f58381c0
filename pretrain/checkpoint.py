"""Checkpoints in the reference's layout, whole or absent, and what an exact resume needs.

A file is `checkpoint_0199.pth.tar`, its number the epoch's, from 0:
    epoch: epochs done; arch: the network's name
    state_dict: the model, every key below `module.` as DistributedDataParallel writes it
    optimizer: its state
    moco_transfer: method, step, images of the set, config; tensors, numbers and strings only
Everything random is drawn from the seed and the place in the run, and the generators of Python,
NumPy and torch are seeded anew at every step, so the step is the random state, of workers too.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convert.errors import UserError
from convert.facts import EXTRA_KEY
from convert.files import output_folder, write_json, write_torch
from pretrain import distributed
from pretrain.config import PretrainConfig, as_dict
from pretrain.contrast import Contrast

PREFIX = "module."
_NAME = re.compile(r"checkpoint_(\d{4,})\.pth\.tar")
# What may differ between a run and its continuation: none of it changes what is computed, though
# `accumulate`, as another number of processes, adds up in another order. `init_from` and
# `start_epoch` are where a run begins, which a continuation does not do.
FREE_KEYS = frozenset(
    {"workers", "print_freq", "checkpoint_every", "keep", "max_steps", "data", "accumulate"}
    | {"init_from", "start_epoch", "knn_dir", "knn_every", "leak_meter", "max_bad_share"}
)


def save(
    folder: Path,
    model: Contrast,
    optimizer: torch.optim.Optimizer,
    config: PretrainConfig,
    *,
    step: int,
    epochs_done: int,
    epoch: int,
) -> Path:
    """Write a checkpoint and forget the oldest beyond `config.keep`.

    Args:
        folder: the run's.
        model: what is trained.
        optimizer: its optimizer.
        config: of the run.
        step: steps done.
        epochs_done: whole epochs done.
        epoch: the number in the file's name: of the epoch done or under way.

    Raises:
        UserError: the weights are not finite, or the file cannot be written.
    """
    if not is_finite(model):
        raise UserError(
            f"weights are not finite after step {step}, though the loss was; the last good "
            f"checkpoint in {folder} stays; lower --lr"
        )
    path = path_of(folder, epoch)
    content = {
        "epoch": epochs_done,
        "arch": config.arch,
        "state_dict": {PREFIX + name: value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        EXTRA_KEY: {
            "method": config.method,
            "step": step,
            "images": model.images,
            "config": json.dumps(as_dict(config)),
        },
    }
    try:
        write_torch(path, content)
    except UserError as error:
        raise UserError(
            f"{error}; the checkpoints before it stay; make room, then go on with --resume auto"
        ) from error
    if config.keep:
        # A run that was resumed from an earlier file has later ones, which it will write again.
        listed = list_checkpoints(folder)
        for old in listed[: listed.index(path) + 1][: -config.keep]:
            old.unlink(missing_ok=True)
    return path


@torch.no_grad()
def is_finite(model: nn.Module) -> bool:
    """Say whether all that a model holds are numbers."""
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack(torch._foreach_norm(floats, torch.inf)).isfinite().all())


def path_of(folder: Path, epoch: int) -> Path:
    """Return where an epoch's checkpoint lies, numbered from 0."""
    return folder / f"checkpoint_{epoch:04d}.pth.tar"


def claim(folder: Path, config: PretrainConfig, *, resume: Path | None, asked: bool) -> None:
    """Make a run's folder and write its config there; refuse one that holds another run.

    Args:
        folder: the run's.
        config: as it will be used.
        resume: the checkpoint to go on from.
        asked: whether going on was asked for.

    Raises:
        UserError: it holds checkpoints and going on was not asked for, the config is not the one
            of the checkpoint, or the folder cannot be written.
    """
    if resume is not None:
        _compare(_stored_config(read_run(resume)), as_dict(config), resume)
    found = list_checkpoints(folder)
    if found and not asked:
        raise UserError(
            f"output folder {folder}: holds a run ({found[-1].name}); go on with --resume auto, or "
            "choose another with --output-dir"
        )
    output_folder(folder)
    if distributed.rank() == 0:
        for half in folder.glob(".checkpoint_*.pth.tar.*"):  # of a run killed while it wrote
            half.unlink(missing_ok=True)
        write_json(folder / "config.json", as_dict(config))


def list_checkpoints(folder: Path) -> list[Path]:
    """List a run's checkpoints, the newest last."""
    numbered = [(int(m[1]), path) for path in folder.glob("*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def choose_resume(word: str, folder: Path, *, restarted: bool) -> str:
    """Say what `--resume` means for this start of a run.

    Args:
        word: the flag's, or nothing.
        folder: the run's.
        restarted: torchrun started the processes again: they go on with what there is.
    """
    return "auto" if restarted and list_checkpoints(folder) else word


def find_resume(word: str, folder: Path) -> Path | None:
    """Say which checkpoint `--resume` means: `auto` is the folder's newest whole one, if any.

    Raises:
        UserError: a named file that does not exist, or a folder whose files are all damaged.
    """
    if not word:
        return None
    if word == "auto":
        found = list_checkpoints(folder)
        for path in reversed(found):
            if _is_whole(path):
                return path
            distributed.say(f"{path}: cannot be read; looking for one before it")
        if found:
            raise UserError(f"output folder {folder}: none of its checkpoints can be read")
        return None
    if not Path(word).is_file():
        raise UserError(f"--resume {word}: no such file; name a checkpoint of this run, or auto")
    return Path(word)


def _is_whole(path: Path) -> bool:
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load has no closed list of what a damaged file raises
        return False
    return True


def settled_keys(path: Path | None) -> dict[str, Any] | None:
    """Return the config that a checkpoint's run was started with; None without a checkpoint."""
    return None if path is None else _stored_config(read_run(path))


def resume(
    path: Path, model: Contrast, optimizer: torch.optim.Optimizer, config: PretrainConfig
) -> int:
    """Put a run back to where a checkpoint was written.

    Returns:
        The steps done.

    Raises:
        UserError: the file is damaged, not a run's of ours, its config differs, or its set had
            another number of images.
    """
    content = read_run(path)
    _compare(_stored_config(content), as_dict(config), path)
    before = content[EXTRA_KEY].get("images", model.images)
    if before != model.images:
        raise UserError(
            f"--resume {path}: this run was started on {before} images, the set has "
            f"{model.images} now; bring the set back, or start a run of its own with --output-dir"
        )
    try:
        state = {name.removeprefix(PREFIX): v for name, v in content["state_dict"].items()}
        model.load_state_dict(state, strict=True)
        optimizer.load_state_dict(content["optimizer"])
        return int(content[EXTRA_KEY]["step"])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"--resume {path}: is not as this run would have written it "
            f"({str(error).splitlines()[0][:120]}); name an earlier checkpoint"
        ) from error


def read_run(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run of ours.

    Raises:
        UserError: it is damaged, or lacks what a resume needs.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no closed list of what a damaged file raises
        raise UserError(f"--resume {path}: cannot be read; name an earlier checkpoint") from error
    try:
        extra = dict(content)[EXTRA_KEY]
        whole = isinstance(json.loads(extra["config"]), dict)
    except (TypeError, KeyError, IndexError, ValueError, RuntimeError):
        whole = False
    if not whole:
        raise UserError(
            f"--resume {path}: holds weights, and not the state of a run of ours; "
            "the released checkpoints of the papers are of this kind, and --init-from takes them"
        )
    return dict(content)


def _stored_config(content: dict[str, Any]) -> dict[str, Any]:
    """Return a run's config; keys that its version did not have were as their defaults are."""
    return as_dict(PretrainConfig()) | dict(json.loads(content[EXTRA_KEY]["config"]))


def _compare(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    changed = [
        f"{key} {before.get(key)!r} -> {value!r}"
        for key, value in now.items()
        if key not in FREE_KEYS and before.get(key) != value
    ]
    if changed:
        raise UserError(
            f"--resume {path}: this run was started with another config: {'; '.join(changed)}; "
            "take it back, or start a run of its own with --output-dir"
        )
