"""What a suite's output folder says: its records, curves and pictures.

Nothing here fails on a hole: a job that was not run, or a file that is broken, is named in
`Findings.holes` and left out. Jobs are known by what they wrote: `run.json` or `log.jsonl` is a
pretraining (unless it is an evaluation, TASK/INIT), `certificate.json` a conversion, `results.json`
an evaluation, `metrics.json` Detectron2's training curve, `detections.png` a picture.
"""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.records import Record, read_record
from benchmarks.standings import Standings, stand
from convert.errors import UserError
from transfer.results import FILE_NAME

ENDED_WELL = ("done", "reused")
LEARNED = 20.0  # percent under chance that the mean loss of the last tenth should reach
Curve = list[tuple[float, float]]


@dataclass
class Pretraining:
    """A pretraining's curves and whether it learned.

    Attributes:
        facts: `run.json`.
        loss: (step, loss).
        knn: (epoch, kNN top-1 in percent).
        chance: log(K + 1), the loss of a guess among K negatives and the positive.
        last_tenth: mean loss of the last tenth of the steps.
    """

    facts: dict[str, Any]
    loss: Curve
    knn: Curve
    chance: float | None
    last_tenth: float | None

    @property
    def under_chance(self) -> float | None:
        """How far the mean loss of the last tenth is under chance, in percent of chance."""
        if self.chance is None or self.last_tenth is None:
            return None
        return 100.0 * (1.0 - self.last_tenth / self.chance)


@dataclass
class Findings:
    """Everything the page shows."""

    root: Path
    suite: dict[str, Any]
    records: dict[str, Record] = field(default_factory=dict)  # by job
    certificate: dict[str, Any] | None = None
    pretraining: Pretraining | None = None
    curves: dict[str, Curve] = field(default_factory=dict)  # job -> (iteration, total loss)
    pictures: dict[str, Path] = field(default_factory=dict)
    holes: list[str] = field(default_factory=list)

    def place(self, name: str) -> tuple[str, str, int]:
        """Take a job's name apart: its task, its row (INIT), and which trial it is."""
        stem, _, seed = name.partition(".seed")
        if not seed.isdigit():
            task, _, init = name.partition("/")
            return task, init, 0
        known = ("moco", "random", "supervised", *self.suite.get("checkpoints", {}))
        inits = [init for init in known if stem.endswith(f".{init}")]
        init = max(inits, key=len, default=stem.rpartition(".")[2])
        return stem.removesuffix(f".{init}"), init, int(seed)

    @cached_property
    def standings(self) -> Standings:
        """The records as a table."""
        return stand(self.records.values())


def gather(root: Path) -> Findings:
    """Read a suite's output folder.

    Raises:
        UserError: it is not one.
    """
    suite = _read_json(root / "suite.json")
    if suite is None or not isinstance(suite.get("jobs"), list):
        raise UserError(
            f"{root}: found no readable suite.json, want a suite's output folder; "
            "make one with python benchmarks/suite.py"
        )
    findings = Findings(root, suite)
    for job in suite["jobs"]:
        _add_job(findings, job)
    return findings


def _add_job(findings: Findings, job: dict[str, Any]) -> None:
    """Take in what one job wrote."""
    name, state = str(job.get("name")), job.get("state")
    folder = findings.root / name
    if state not in ENDED_WELL:
        reason = f" ({job['reason']})" if job.get("reason") else ""
        findings.holes.append(f"not run: {name}: {state}{reason}")
    # An evaluation, TASK/INIT, may log its training too.
    logged = (folder / "log.jsonl").exists() or (folder / "run.json").exists()
    if logged and "/" not in name:
        findings.pretraining = _pretraining(folder)
    if (folder / "metrics.json").exists():
        findings.curves[name] = _curve(folder / "metrics.json", "iteration", "total_loss")
    if state not in ENDED_WELL:
        return  # a curve may be shown half-way, a number may not
    if (folder / "certificate.json").exists():
        findings.certificate = _read_json(folder / "certificate.json")
        if findings.certificate is None:
            findings.holes.append(f"unreadable: {name}/certificate.json")
    if (folder / "detections.png").exists():
        findings.pictures[name] = folder / "detections.png"
    if (folder / FILE_NAME).exists():
        try:
            record = read_record(folder / FILE_NAME)
            findings.records[name] = replace(record, overridden=job.get("reduced") or {})
        except ValueError as error:
            findings.holes.append(f"unreadable: {name}/{FILE_NAME}: {error}")


def _pretraining(folder: Path) -> Pretraining:
    facts = _read_json(folder / "run.json") or {}
    log = folder / "log.jsonl"
    loss, knn = _curve(log, "step", "loss"), _curve(log, "epoch", "knn_top1")
    chance = facts.get("chance_loss")
    if chance is None and isinstance(facts.get("K"), int):
        chance = math.log(facts["K"] + 1)
    last = facts.get("loss_last_tenth")
    if last is None and loss:
        last = statistics.fmean(y for _, y in loss[-max(1, len(loss) // 10) :])
    return Pretraining(facts, loss, knn, chance, last)


def _curve(file: Path, x: str, y: str) -> Curve:
    """Read a curve from JSON lines; where a resumed run wrote an x twice, the later one holds."""
    points: dict[float, float] = {}
    for line in _json_lines(file):
        if isinstance(line.get(x), int | float) and isinstance(line.get(y), int | float):
            points[float(line[x])] = float(line[y])
    return sorted((x, y) for x, y in points.items() if math.isfinite(y))


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run may be cut
        if isinstance(value, dict):
            yield value


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
