"""The file of a linear classifier, in the reference's layout, and going on from it exactly.

Keys: `epoch` (done), `arch`, `state_dict` (torchvision's names, the frozen backbone and `fc.*`),
`best_acc1`, `optimizer`; under our own extra key what the reference has no place for: which run it
belongs to, the history, and the classifier as it is trained (that in `state_dict` takes the
features as the backbone gives them, whether or not they were standardised in training).
"""

import json
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from convert.backbone import Backbone, weights_digest
from convert.errors import UserError
from convert.facts import EXTRA_KEY
from convert.files import write_text, write_torch
from pretrain import distributed
from transfer.classification.grid import Grid
from transfer.classification.heads import Head, Standardizer
from transfer.classification.request import refuse_other_run

FILE_NAME = "checkpoint.pth.tar"
LOG_NAME = "log.jsonl"
SECONDS_BETWEEN = 30.0  # an epoch on cached features takes milliseconds, writing this file longer
DDP_PREFIX = "module."
FC_PREFIX = "fc."


class HeadFile:
    """Writes a classifier's file, at most every half minute, and reads it back.

    Args:
        folder: where `checkpoint.pth.tar` and `log.jsonl` go.
        backbone: the frozen part.
        identity: what makes a run the same run; see `Probe.identity`.

    Attributes:
        standardizer: of the features in training, if any; to be set before the first write.
    """

    def __init__(self, folder: Path, backbone: Backbone, identity: Mapping[str, Any]) -> None:
        self.path = folder / FILE_NAME
        self.backbone, self.identity = backbone, dict(identity)
        self.standardizer: Standardizer | None = None
        self.latest: dict[str, Any] | None = None
        self.written = time.monotonic()

    def keep(self, head: Head, grid: Grid | None = None) -> None:
        """Remember the classifiers after an epoch, and write them if the last time was long ago."""
        self.latest = head.snapshot() | ({} if grid is None else {"grid": grid.snapshot()})
        if time.monotonic() - self.written > SECONDS_BETWEEN:
            self.write()

    def write(self) -> None:
        """Write what was last remembered, if it is not yet written."""
        if self.latest is None or distributed.rank() > 0:
            return
        latest, self.latest = self.latest, None
        raw = latest["fc"]
        fc = raw if self.standardizer is None else self.standardizer.fold(raw)
        method = self.backbone.facts.method
        ours = {
            "fc": raw,
            "history": latest["history"],
            "identity": self.identity,
            "method": method,
            "steps": latest["steps"],
        }
        if "grid" in latest:
            ours["grid"] = latest["grid"]
        content = {
            "epoch": latest["epoch"],
            "arch": self.backbone.facts.arch,
            "state_dict": self.backbone.weights | {FC_PREFIX + k: v for k, v in fc.items()},
            "best_acc1": latest["best_acc1"],
            "optimizer": latest["optimizer"],
            EXTRA_KEY: ours,
        }
        write_torch(self.path, content)
        log = "".join(json.dumps(entry) + "\n" for entry in latest["history"])
        write_text(self.path.with_name(LOG_NAME), log)
        self.written = time.monotonic()

    def read(self, path: Path, may_change: str = "epochs") -> dict[str, Any]:
        """Read a classifier's file, ours or the reference's own, as `Head.restore` takes it.

        Args:
            path: the file.
            may_change: the one key of the identity that may differ.

        Raises:
            UserError: the file is missing, damaged, of another backbone, set or protocol.
        """
        content = _read(path)
        state = {k.removeprefix(DDP_PREFIX): v for k, v in content["state_dict"].items()}
        fc = {
            k.removeprefix(FC_PREFIX): state.pop(k) for k in list(state) if k.startswith(FC_PREFIX)
        }
        if weights_digest(state) != weights_digest(self.backbone.weights):
            raise UserError(f"{path}: its backbone is not that of {self.backbone.facts.name}")
        ours = content.get(EXTRA_KEY)
        if ours is not None:
            wanted = {k: v for k, v in self.identity.items() if k != may_change}
            refuse_other_run(path, ours["identity"], wanted)
            return content | {k: v for k, v in ours.items() if k not in ("identity", "method")}
        if "grid_lr" in self.identity:
            raise UserError(f"{path}: another tool's classifier, without a grid; leave --grid out")
        if self.identity["standardize"]:
            raise UserError(f"{path}: another tool's classifier; use it with standardize false")
        return content | {"fc": fc, "best_acc1": float(content["best_acc1"]), "history": []}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"--resume {path}: no such file")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"--resume {path}: cannot be read; it is cut short or no checkpoint"
        ) from error
    wanted = ("epoch", "state_dict", "best_acc1", "optimizer")
    missing = [k for k in wanted if k not in content] if isinstance(content, dict) else [*wanted]
    if missing:
        raise UserError(
            f"--resume {path}: has no {', '.join(missing)}: no file of a linear classifier; "
            "to evaluate it, name it with --pretrained"
        )
    return content
