"""Checkpoints in the reference's layout, whole or absent, and what an exact resume needs.

A file is `checkpoint_0199.pth.tar`, its number the epoch's, from 0:
    epoch: epochs done; arch: the network's name
    state_dict: the model, every key below `module.` as DistributedDataParallel writes it
    optimizer: its state
    moco_transfer: method, step, config; tensors, numbers and strings only
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
from convert.files import atomic_write, output_folder
from pretrain import distributed
from pretrain.config import PretrainConfig, as_dict

PREFIX = "module."
_NAME = re.compile(r"checkpoint_(\d{4,})\.pth\.tar")
# What may differ between a run and its continuation: none of it changes what is computed, though
# `accumulate`, as another number of processes, adds up in another order. The last two are where a
# run begins, which a continuation does not do.
FREE_KEYS = frozenset(
    {"workers", "print_freq", "checkpoint_every", "keep", "max_steps", "data", "accumulate"}
    | {"max_bad_share", "init_from", "start_epoch"}
)


def save(
    folder: Path,
    model: nn.Module,
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
        model: a `Contrast`.
        optimizer: its optimizer.
        config: of the run.
        step: steps done.
        epochs_done: whole epochs done.
        epoch: the number in the file's name: of the epoch done or under way.
    """
    path = path_of(folder, epoch)
    content = {
        "epoch": epochs_done,
        "arch": config.arch,
        "state_dict": {PREFIX + name: value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        EXTRA_KEY: {"method": config.method, "step": step, "config": json.dumps(as_dict(config))},
    }
    with atomic_write(path) as temporary:
        torch.save(content, temporary)
    if config.keep:
        for old in list_checkpoints(folder)[: -config.keep]:
            old.unlink(missing_ok=True)
    return path


def path_of(folder: Path, epoch: int) -> Path:
    """Return where an epoch's checkpoint lies, numbered from 0."""
    return folder / f"checkpoint_{epoch:04d}.pth.tar"


def claim(folder: Path, *, resume: bool) -> None:
    """Make a run's folder, and refuse one that holds another run.

    Raises:
        UserError: it holds checkpoints and `resume` was not asked for, or cannot be written.
    """
    found = list_checkpoints(folder)
    if found and not resume:
        raise UserError(
            f"output folder {folder}: holds a run ({found[-1].name}); go on with --resume auto, or "
            "choose another with --output-dir"
        )
    output_folder(folder)


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
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: PretrainConfig
) -> int:
    """Put a run back to where a checkpoint was written.

    Returns:
        The steps done.

    Raises:
        UserError: the file is damaged, not a run's of ours, or its config differs.
    """
    content = read_run(path)
    _compare(_stored_config(content), as_dict(config), path)
    state = {name.removeprefix(PREFIX): v for name, v in content["state_dict"].items()}
    model.load_state_dict(state, strict=True)
    optimizer.load_state_dict(content["optimizer"])
    return int(content[EXTRA_KEY]["step"])


def read_run(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run of ours.

    Raises:
        UserError: it is damaged, or lacks what a resume needs.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no closed list of what a damaged file raises
        raise UserError(f"--resume {path}: cannot be read; name an earlier checkpoint") from error
    if not isinstance(content, dict) or EXTRA_KEY not in content:
        raise UserError(
            f"--resume {path}: holds weights, and not the state of a run of ours; "
            "the released checkpoints of the papers are of this kind"
        )
    return content


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
