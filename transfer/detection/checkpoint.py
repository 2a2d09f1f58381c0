"""The states of a running training: written whole, the newest few kept, read to go on.

`checkpoint_0005000.pth`, its number the iterations done, holds:
    model: the detector
    trainer: the optimizer and what the hooks keep
    next_iteration, streams: the place in the run
    moco_transfer: facts of what it began from, and the recipe's pixels
Everything random is drawn from the seed and the place (`batches.py`), so no generator's state is
needed.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert.errors import UserError
from convert.facts import EXTRA_KEY
from convert.files import write_torch
from transfer.detection.weights import read_torch

AUTO = "auto"
_NAME = re.compile(r"checkpoint_(\d{7,})\.pth")
_KEYS = {"model", "trainer", "next_iteration", "streams", EXTRA_KEY}


def path_of(folder: Path, done: int) -> Path:
    """Return where the state after so many iterations lies."""
    return folder / f"checkpoint_{done:07d}.pth"


def list_states(folder: Path) -> list[Path]:
    """List a run's states, the newest last."""
    found = [(int(m[1]), path) for path in folder.glob("*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_state(folder: Path, content: Mapping[str, Any], keep: int) -> None:
    """Write a state and forget the oldest beyond `keep`; 0: none.

    Raises:
        UserError: it cannot be written; those before it stay as they are.
    """
    write_torch(path_of(folder, content["next_iteration"]), dict(content))
    if keep:
        forget_states(folder, keep)


def forget_states(folder: Path, keep: int = 0) -> None:
    """Remove all states but the newest few."""
    found = list_states(folder)
    for old in found[: max(0, len(found) - keep)]:
        old.unlink(missing_ok=True)


def read_state(word: str, folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Read the state to go on from: `auto` is the newest of the folder that is whole, if any.

    Args:
        word: `auto`, or a file.
        folder: the run's.
        say: is told of a state that cannot be read.

    Raises:
        UserError: the file is none of a run, or all of the folder's are damaged.
    """
    if word != AUTO:
        return _read(Path(word))
    found = list_states(folder)
    for path in reversed(found):
        try:
            return _read(path)
        except UserError as error:
            say(f"{error}; looking for one before it")
    if found:
        raise UserError(f"output folder {folder}: none of its checkpoints can be read")
    return None


def _read(path: Path) -> dict[str, Any]:
    state = read_torch(path)
    if not _KEYS <= state.keys():
        raise UserError(f"{path}: is no checkpoint of a run under way; --resume wants one")
    return state
