"""What a suite's output folder says: its records, curves and pictures, beside published numbers.

Nothing here fails on a hole: a job that was not run, or a file that is broken, is named in
`Findings.holes` and left out. Jobs are known by what they wrote: `run.json` or `log.jsonl` is a
pretraining, `certificate.json` a conversion, `results.json` an evaluation, `metrics.json`
Detectron2's training curve, `detections.png` a picture.
"""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from convert.errors import UserError

PUBLISHED = Path(__file__).resolve().parent / "published"
ENDED_WELL = ("done", "reused")
LEARNED = 20.0  # percent under chance that the mean loss of the last tenth should reach
METHODS = {
    "random": "random init",
    "supervised": "supervised",
    "moco": "MoCo",
    "moco_v1": "MoCo v1",
    "moco_v2": "MoCo v2",
}

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Cell:
    """One number of the table: mean over seeds, its spread (None: one seed), how many seeds."""

    mean: float
    spread: float | None = None
    seeds: int = 1


@dataclass
class Row:
    """One row of the table.

    Attributes:
        label: what was evaluated.
        cells: metric -> number.
        comparable: False for published rows: other data, other budget.
        source: paper and tables of a published row.
        fingerprints: task -> hash of the protocol.
    """

    label: str
    cells: dict[str, Cell] = field(default_factory=dict)
    comparable: bool = True
    source: str = ""
    fingerprints: dict[str, str] = field(default_factory=dict)


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
    rows: list[Row] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)  # metric -> task
    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # job -> results.json
    certificate: dict[str, Any] | None = None
    pretraining: Pretraining | None = None
    curves: dict[str, Curve] = field(default_factory=dict)  # job -> (iteration, total loss)
    pictures: dict[str, Path] = field(default_factory=dict)
    holes: list[str] = field(default_factory=list)

    @property
    def measured(self) -> list[Row]:
        """Our own rows."""
        return [row for row in self.rows if row.comparable]

    @property
    def published(self) -> list[Row]:
        """The papers' rows."""
        return [row for row in self.rows if not row.comparable]

    def differences(self) -> dict[str, float]:
        """Metric -> the first measured row minus random init, in points."""
        if len(self.measured) < 2:
            return {}
        first, random = (row.cells for row in self.measured[:2])
        return {
            m: first[m].mean - random[m].mean for m in self.columns if m in first and m in random
        }

    def mixed_protocols(self) -> list[str]:
        """Tasks whose measured rows do not share one fingerprint; they must not be compared."""
        tasks = {task for row in self.measured for task in row.fingerprints}
        found = {
            t: {r.fingerprints[t] for r in self.measured if t in r.fingerprints} for t in tasks
        }
        return sorted(task for task, prints in found.items() if len(prints) > 1)


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
    _add_rows(findings)
    findings.rows += [row for row in published_rows() if set(row.cells) & set(findings.columns)]
    return findings


def published_rows(folder: Path = PUBLISHED) -> list[Row]:
    """Read `published/*.yaml` into one row for each initialisation, its sources joined.

    Numbers that others measured again (`rerun`) stay rows of their own.
    """
    rows: dict[str, Row] = {}
    places: dict[str, dict[str, list[str]]] = {}  # label -> paper -> tables
    for file in sorted(folder.glob("*.yaml")):
        paper = yaml.safe_load(file.read_text(encoding="utf-8"))
        for table in paper["tables"]:
            rerun = table.get("rerun", False)
            for entry in table["rows"]:
                label = _label(entry) + (", rerun by others" if rerun else "")
                row = rows.setdefault(label, Row(label, comparable=False))
                row.cells = _printed(table, entry) | row.cells
                place = str(table["table"]) + str(entry.get("row", ""))
                cite = "" if rerun else f"{paper['cite']}, "
                places.setdefault(label, {}).setdefault(cite, []).append(place)
    for label, row in rows.items():
        row.source = "; ".join(cite + ", ".join(at) for cite, at in places[label].items())
    order = list(METHODS.values())
    return sorted(rows.values(), key=lambda row: order.index(row.label.split(",")[0]))


def _printed(table: dict[str, Any], entry: dict[str, Any]) -> dict[str, Cell]:
    pairs = zip(table["metrics"], entry["values"], strict=True)
    return {metric: Cell(float(value), seeds=0) for metric, value in pairs}


def _label(entry: dict[str, Any]) -> str:
    name = METHODS[entry["init"]]
    data = f", {entry['pretrained_on']}" if "pretrained_on" in entry else ""
    epochs = f", {entry['epochs']} ep" if "epochs" in entry else ""
    return name + data + epochs


def _add_job(findings: Findings, job: dict[str, Any]) -> None:
    """Take in what one job wrote."""
    name, state = str(job.get("name")), job.get("state")
    folder = findings.root / name
    if state not in ENDED_WELL:
        reason = f" ({job['reason']})" if job.get("reason") else ""
        findings.holes.append(f"not run: {name}: {state}{reason}")
    if (folder / "log.jsonl").exists() or (folder / "run.json").exists():
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
    if (folder / "results.json").exists():
        record = _read_json(folder / "results.json")
        if record is None or not _is_record(record):
            findings.holes.append(f"unreadable: {name}/results.json")
        else:
            findings.records[name] = record


def _add_rows(findings: Findings) -> None:
    """Make a row of each initialisation, the last part of a job's name; random init comes last."""
    names = [str(job.get("name")) for job in findings.suite["jobs"]]
    inits = dict.fromkeys(name.rsplit("/", 1)[1] for name in names if "/" in name)
    rows = {init: Row(_measured_label(init, findings)) for init in inits}
    for name, record in findings.records.items():
        if "/" not in name:
            continue
        row = rows[name.rsplit("/", 1)[1]]
        task = str(record.get("task") or name.split("/")[0])
        row.fingerprints[task] = str(record.get("fingerprint", ""))
        for metric, value in record["metrics"].items():
            findings.columns.setdefault(metric, task)
            spread = record.get("spread", {}).get(metric)
            row.cells[metric] = Cell(float(value), spread, len(record.get("per_seed", [0])))
    findings.rows = [row for init, row in rows.items() if init != "random"]
    findings.rows += [rows["random"]] if "random" in rows else []


def _measured_label(init: str, findings: Findings) -> str:
    if init == "random":
        return METHODS["random"]
    certificate = findings.certificate or {}
    return str(certificate.get("method") or METHODS.get(init, init))


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


def _is_record(record: dict[str, Any]) -> bool:
    """Say whether a record's numbers are numbers."""
    parts = [record.get("metrics"), record.get("spread", {})]
    return all(
        isinstance(part, dict) and all(isinstance(value, int | float) for value in part.values())
        for part in parts
    )


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
