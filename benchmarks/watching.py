"""Measures each new checkpoint of a running pretraining, until that has ended."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evaluation import Evaluation
from benchmarks.rows import PATTERN, Row, find_rows
from benchmarks.runner import Board
from convert.errors import UserError
from convert.files import output_folder

POLL_S = 5.0
KEPT = "checkpoints"  # below the output folder: a pretraining keeps only its last ones
RUN_FILE = "run.json"  # what a pretraining writes when it ends


def watch(evaluation: Evaluation, paths: Sequence[Path], board: Board) -> int:
    """Measure a run's checkpoints as they come; return the last call's exit status.

    The table grows by a row a checkpoint. Ended by the pretraining's end, or by Ctrl-C.

    Args:
        evaluation: the suite in its output folder.
        paths: one folder that a pretraining writes to.
        board: what shows the jobs.

    Raises:
        UserError: that is no folder.
        Stopped: a signal ended it; the same command goes on.
    """
    if len(paths) != 1 or not paths[0].is_dir():
        found = ", ".join(map(str, paths)) or "nothing"
        raise UserError(f"--watch: found {found}, want the one folder that a pretraining writes to")
    kept = output_folder(evaluation.root) / KEPT
    measured: list[tuple[Row, int]] = []
    status, last = 0, True
    board.say(f"watching {paths[0]}, into {evaluation.root}; Ctrl-C ends it")
    while True:
        last = _ended(paths[0])  # asked first: what is written after that is the next round's
        _keep(paths[0], kept)
        rows = find_rows([kept]) if kept.is_dir() else []
        now = [(row, row.path.stat().st_ino) for row in rows]
        if now != measured:
            status = evaluation.run(evaluation.lay_out(rows), board)
            measured = now
        elif last:
            return status
        else:
            time.sleep(POLL_S)


def _keep(folder: Path, kept: Path) -> None:
    """Keep each checkpoint of a run, by a link where the disk allows one."""
    for file in sorted(folder.glob(PATTERN)):
        mine = kept / file.name
        try:
            if mine.exists() and (mine.samefile(file) or _same_time(mine, file)):
                continue
            kept.mkdir(exist_ok=True)
            fresh = kept / f".{file.name}"
            fresh.unlink(missing_ok=True)
            try:
                os.link(file, fresh)
            except FileNotFoundError:
                continue  # the pretraining has just removed it
            except OSError:  # another disk, or one without links
                shutil.copy2(file, fresh)
            fresh.replace(mine)
        except FileNotFoundError:
            continue


def _same_time(mine: Path, file: Path) -> bool:
    return mine.stat().st_mtime_ns == file.stat().st_mtime_ns


def _ended(folder: Path) -> bool:
    """Say whether the pretraining has ended: its record is newer than its last checkpoint."""
    try:
        ended = (folder / RUN_FILE).stat().st_mtime_ns
        last = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["checkpoint"]
        return bool(ended >= (folder / last).stat().st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError):
        return False
