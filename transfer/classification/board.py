"""TensorBoard, where it is asked for: imported no sooner, missed no sooner."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import UserError

FOLDER = "tensorboard"


class Board:
    """Writes numbers by epoch for TensorBoard.

    Args:
        folder: of the run; the events go into `tensorboard` in it.
        done: epochs that an earlier run has written; later ones of it are struck out.

    Raises:
        UserError: the package is not there.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "--tensorboard: the package is not installed; pip install tensorboard"
            ) from error
        writer: Any = SummaryWriter
        self.writer = writer(str(folder / FOLDER), purge_step=done + 1)

    def add(self, task: str, entry: Mapping[str, float]) -> None:
        """Write an epoch's entry of a history."""
        for name, value in entry.items():
            if name != "epoch":
                self.writer.add_scalar(f"{task}/{name}", value, int(entry["epoch"]))

    def close(self) -> None:
        """Write what is not yet written."""
        self.writer.close()
