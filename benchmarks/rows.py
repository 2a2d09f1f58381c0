"""Which checkpoints a suite measures, a row each, and which rows of a paper they fill."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.jobs import CHECKPOINT, Job, Step, Suite
from convert.errors import UserError
from convert.files import ROOT

PATTERN = "checkpoint_*.pth.tar"  # what a pretraining writes
OWN = "moco"  # the INIT that stands for the checkpoint measured
_READS = re.compile(r"\{([\w./-]+)\}")


@dataclass(frozen=True)
class Row:
    """A checkpoint that is measured.

    Attributes:
        name: of its row: the last part of its jobs' names.
        path: the file.
    """

    name: str
    path: Path


def find_rows(paths: Sequence[Path]) -> list[Row]:
    """List the checkpoints that the command line names; a folder stands for those in it.

    Raises:
        UserError: no such file, a folder without checkpoints, or one file named twice.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob(PATTERN)) if path.is_dir() else [path]
        if not found:
            raise UserError(f"folder {path}: holds no {PATTERN}; name a run's folder, or files")
        for file in found:
            if not file.is_file():
                raise UserError(
                    f"checkpoint {file}: no such file; name one, or none to pretrain first"
                )
        files += [file.absolute() for file in found]
    if len(set(files)) < len(files):
        raise UserError(f"checkpoint {max(files, key=files.count)}: is named twice")
    if not files:
        return []
    if len(files) == 1 and not paths[0].is_dir():
        return [Row(OWN, files[0])]
    return [Row(name, file) for name, file in zip(_names(files), files, strict=True)]


def _names(files: Sequence[Path]) -> list[str]:
    """Name files by their stems, with as many folders before them as keeps them apart."""
    stems = [(*file.parts[1:-1], file.name.split(".")[0]) for file in files]
    for length in range(1, max(map(len, stems)) + 1):
        names = [_word("-".join(stem[-length:])) for stem in stems]
        if len(set(names)) == len(names):
            break
    taken = [name if name not in ("random", "supervised") else f"{name}-file" for name in names]
    return taken if len(set(taken)) == len(taken) else [f"{n}-{i}" for i, n in enumerate(taken)]


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-_.") or "checkpoint"


def spread(suite: Suite, rows: Sequence[Row]) -> tuple[Suite, dict[str, Path]]:
    """Repeat what is measured from a checkpoint for each of several; baselines stay single.

    Returns:
        The suite, and the files of its command line by name.
    """
    if not rows:
        return suite, {}
    if [row.name for row in rows] == [OWN]:
        return suite, {CHECKPOINT: rows[0].path}
    makers = {made: job for job in suite.jobs for made in job.makes if CHECKPOINT not in job.makes}
    of_checkpoint: set[str] = set()
    for _ in suite.jobs:  # as often as a chain of needs can be long
        for job in suite.jobs:
            if CHECKPOINT in job.reads or any(
                name in makers and makers[name].name in of_checkpoint for name in job.reads
            ):
                of_checkpoint.add(job.name)
    names = {made for made, job in makers.items() if job.name in of_checkpoint} | {CHECKPOINT}
    jobs: list[Job] = []
    for job in suite.jobs:
        if job.name in of_checkpoint:
            jobs += [_of_row(job, row.name, names) for row in rows]
        elif CHECKPOINT not in job.makes:
            jobs.append(job)
    given = {f"{CHECKPOINT}.{row.name}": row.path for row in rows}
    return replace(suite, jobs=tuple(jobs)), given


def _of_row(job: Job, row: str, names: set[str]) -> Job:
    def renamed(match: re.Match[str]) -> str:
        return f"{{{match[1]}.{row}}}" if match[1] in names else match[0]

    name, count = re.subn(rf"(?<![\w-]){OWN}(?![\w-])", row, job.name)
    return replace(
        job,
        name=name if count else f"{job.name}/{row}",
        command=tuple(_READS.sub(renamed, word) for word in job.command),
        makes={f"{made}.{row}": file for made, file in job.makes.items()},
    )


def row_of(step: Step, rows: Sequence[Row]) -> Row | None:
    """Say whose job this is; None for a baseline's."""
    parts = re.split(r"/|\.seed\d+$", step.name)
    for row in rows:
        reads = {CHECKPOINT, f"{CHECKPOINT}.{row.name}"} & set(step.job.reads)
        if reads or any(part == row.name or part.endswith(f".{row.name}") for part in parts):
            return row
    return None


def describe(path: Path) -> dict[str, Any]:
    """Return a checkpoint's facts, as the converter tells them.

    Raises:
        UserError: it is none that the converter knows.
    """
    words = [sys.executable, "convert/to_detectron2.py", str(path), "--describe", "--json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no facts"])[-1]
        raise UserError(said.removeprefix("to_detectron2.py: "))
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def close(
    steps: Sequence[Step], rows: Sequence[Row], facts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Leave open, in place, what a checkpoint does not fit, and what needs that.

    Args:
        steps: laid out, each after its needs or not.
        rows: the checkpoints.
        facts: those of each, by its row.
    """
    for step in steps:
        row = row_of(step, rows)
        if row is None or step.state != "waits":
            continue
        for fact, known in step.job.wants.items():
            found = str(facts.get(row.name, {}).get(fact))
            if found not in known:
                step.state = "open"
                step.reason = f"wants {fact} {' or '.join(known)}; {row.path.name} is {found}"
    by_name = {step.name: step for step in steps}
    for _ in steps:
        for step in steps:
            closed = [name for name in step.needs if by_name[name].state == "open"]
            if step.state == "waits" and closed:
                step.state, step.reason = "open", f"needs {closed[0]}: {by_name[closed[0]].reason}"


def filled(suite: Suite, facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Say of each row of the suite's tables who fills it.

    Args:
        suite: declares tables, with the facts of a checkpoint that each row is about.
        facts: of each checkpoint, by its row.

    Returns:
        For each row: table, row, task, by (a row's name; None: it stays open), wants.
    """
    told = {row: {**has, **_batch(has)} for row, has in facts.items()}
    found = []
    for table, entries in suite.tables.items():
        for entry, values in entries.items():
            wants = {key: value for key, value in values.items() if key not in ("task", "init")}
            by = values.get("init") or next(
                (r for r, has in told.items() if all(has.get(k) == v for k, v in wants.items())),
                None,
            )
            found.append(
                {"table": table, "row": entry, "task": values["task"], "by": by, "wants": wants}
            )
    return found


def _batch(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch that only checkpoints of our own pretraining tell."""
    training = facts.get("training") or {}
    return {"batch": training["batch_size"]} if "batch_size" in training else {}
