"""The job graph of a suite: which commands, in which order, and which are already done.

A job's command is what a user would type. Placeholders stand in it: `{output}` is the job's own
folder, `{processes}` how many processes it gets; any other name is a file that another job `makes`
(a name and a pattern inside that job's folder), one that was given on the command line, or a
folder of data (benchmarks/needs.py). So the edges of the graph are never written down twice.

A job's key hashes everything that decides its outcome: its command, the contents of the files
named in it (recipes with their `_BASE_` chains), our code that it runs, the versions of the
libraries, the data that it declares, and the keys of the jobs whose files it reads. A job that
ended well under the same key is never run again.
"""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks.needs import DataSet, Placed
from convert.errors import UserError, nearest
from convert.files import ROOT, environment, sha256, write_json

SUITES = Path(__file__).resolve().parent / "suites"
FOLDERS = ("convert", "pretrain", "transfer", "benchmarks")  # a folder imports those to its left
RECORDS, REPLACED = "jobs", "replaced"
CHECKPOINT = "checkpoint"  # the file of the command line; for several, checkpoint.ROW
_PLACEHOLDER = re.compile(r"\{([\w./-]+)\}")
_OURS = ("output", "processes")


@dataclass(frozen=True)
class Job:
    """One command of a suite.

    Attributes:
        name: also its folder inside the suite's output folder, `coco/moco`.
        command: its words; the first is `python`, the second a script.
        makes: name of a file for other jobs -> its pattern inside the job's folder.
        stdout: the file that takes what the command prints; None: it goes to the log.
        minutes: how long it takes, for a forecast only; on what, the suite's `costs` says.
        gpu_gb: memory on each GPU, for the forecast.
        processes: how many train together at most; gpu: whether they want a GPU each.
        data: names of the sets that it reads, see needs.py.
        wants: fact of a checkpoint -> values that it may have, `arch: [resnet50]`.
        reduced: settings that were overridden on the command line.
    """

    name: str
    command: tuple[str, ...]
    makes: Mapping[str, str] = field(default_factory=dict)
    stdout: str | None = None
    minutes: float | None = None
    gpu_gb: float | None = None
    processes: int = 1
    gpu: bool = True
    data: tuple[str, ...] = ()
    wants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reduced: Mapping[str, str] = field(default_factory=dict)

    @property
    def reads(self) -> list[str]:
        """The names of the files that other jobs make for this one."""
        found = [name for word in self.command for name in _PLACEHOLDER.findall(word)]
        return [name for name in dict.fromkeys(found) if name not in _OURS]

    @property
    def launches_itself(self) -> bool:
        """Whether the script starts its processes itself, told how many, and not torchrun."""
        return any("{processes}" in word for word in self.command)


@dataclass(frozen=True)
class Suite:
    """A suite as its file says it.

    Attributes:
        name: its file's; typed: how its user named it; title: for the page.
        parallel: how many jobs run at once.
        jobs: what to run.
        costs: where minutes and gpu_gb come from.
        sets: the data that its jobs read, by name.
        tables: table of a paper -> rows, each with the task and the facts that fill it.
    """

    name: str
    typed: str
    title: str
    parallel: int
    jobs: tuple[Job, ...]
    costs: str = ""
    sets: Mapping[str, DataSet] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)


@dataclass
class Step:
    """A job in one output folder, and how far it is.

    Attributes:
        job: what to run.
        key: hash of everything that decides the outcome.
        needs: names of the jobs that come first.
        root: the suite's output folder.
        sets: the data that it reads.
        reduced: what was overridden, here or in a job that it needs.
        state: waits, running, done, reused, failed, skipped, stopped, or open: the data or the
            checkpoint at hand cannot serve it.
        seconds: what it took, attempts that were cut included.
        status: exit status of the command.
        reason: why it failed or was skipped.
        argv: the command with its placeholders filled, once it has started.
        attempts: how often this call has started it.
        data: what shows that its data was exchanged.
    """

    job: Job
    key: str
    needs: tuple[str, ...]
    root: Path
    sets: tuple[Placed, ...] = ()
    reduced: Mapping[str, str] = field(default_factory=dict)
    state: str = "waits"
    seconds: float = 0.0
    status: int | None = None
    reason: str = ""
    argv: tuple[str, ...] = ()
    attempts: int = 0
    data: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The job's name."""
        return self.job.name

    @property
    def folder(self) -> Path:
        """Where the job writes."""
        return self.root / self.name

    @property
    def log(self) -> Path:
        """Where what it prints goes; outside its own folder, where Detectron2 has a `log.txt`."""
        return self.root / RECORDS / f"{self.name}.log"

    @property
    def record(self) -> Path:
        """Where the suite remembers how the job ended."""
        return self.root / RECORDS / f"{self.name}.json"

    @property
    def stdout(self) -> Path | None:
        """Where what it prints goes first, if that is to be a file of its own."""
        return self.record.with_suffix(".stdout") if self.job.stdout else None

    @property
    def resumes(self) -> bool:
        """Whether the script itself goes on with a folder that an earlier attempt left."""
        return any(word == "--resume" or word.startswith("--resume=") for word in self.job.command)

    def made(self, name: str) -> Path | None:
        """Return the newest file that this job made under a name; None while there is none."""
        return max(self.folder.glob(self.job.makes[name]), default=None)

    def remembered(self) -> dict[str, Any]:
        """Read how the job ended last time; empty where that is unknown or unreadable."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def finished(self) -> bool:
        """Say whether this very job ended well before, and what it made is still there."""
        record = self.remembered()
        return (
            record.get("key") == self.key
            and record.get("state") == "done"
            and self.folder.is_dir()
            and all(self.made(name) for name in self.job.makes)
        )

    def remember(self) -> None:
        """Write down how far the job is."""
        write_json(self.record, self.summary())

    def summary(self) -> dict[str, Any]:
        """Return what a record says about this job; paths are relative to the suite's folder."""
        return {
            "name": self.name,
            "state": self.state,
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "attempts": self.attempts,
            "command": shlex.join(self.argv or self.job.command),
            "log": str(self.log.relative_to(self.root)),
            "key": self.key,
            "data": self.data,
        } | ({"reduced": dict(self.reduced)} if self.reduced else {})

    def lost_data(self) -> str:
        """Say what is missing of the data that it reads; empty where all is there."""
        return "; ".join(line for placed in self.sets for line in placed.missing())

    def prepare(self) -> str:
        """Make the job's folder ready for another attempt and say in a line what was done to it.

        A folder of another key is moved aside (one such is kept), one of a cut attempt is kept only
        if the script can resume it.
        """
        line = ""
        record = self.remembered()
        if self.folder.exists() and record.get("key") != self.key:
            aside = self.root / REPLACED / self.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            self.folder.rename(aside)
            self.log.unlink(missing_ok=True)
            line = f"{self.name}: its inputs changed; the old results are now in {aside}"
        elif self.folder.exists() and not self.resumes:
            shutil.rmtree(self.folder)
        elif self.folder.exists():
            self.seconds = float(record.get("seconds") or 0.0)
            line = f"{self.name}: goes on where it was"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return line


def plan(
    suite: Suite, given: Mapping[str, Path], root: Path, roots: Mapping[str, Path] | None = None
) -> list[Step]:
    """Lay a suite out in an output folder, each job after the ones whose files it reads.

    Args:
        suite: what to run.
        given: files of the command line by name; a job that makes nothing else is left out.
        root: the suite's output folder.
        roots: folders of data by name.

    Raises:
        UserError: a file that no job makes, or jobs that wait for each other.
    """
    roots = roots or {}
    jobs = [job for job in suite.jobs if not job.makes or not set(job.makes) <= set(given)]
    makers = {name: job for job in jobs for name in job.makes if name not in given}
    folders = {name for found in suite.sets.values() for name in found.roots}
    for job in jobs:
        for name in job.reads:
            if name not in makers and name not in given and name not in {*folders, CHECKPOINT}:
                known = nearest(name, {*makers, *given, *folders, *_OURS})
                raise UserError(
                    f"suite {suite.name}: job {job.name} reads {{{name}}}, which no job makes; "
                    f"names near it: {known}"
                )
    hashes = {name: _hash(path) for name, path in given.items()}
    steps: dict[str, Step] = {}
    for job in _in_order(suite.name, jobs, makers):
        needs = tuple(dict.fromkeys(makers[name].name for name in job.reads if name in makers))
        inputs = {
            name: steps[makers[name].name].key if name in makers else hashes[name]
            for name in job.reads
            if name in makers or name in hashes
        }
        sets = tuple(suite.sets[name].placed(roots) for name in job.data)
        reduced = {k: v for name in needs for k, v in steps[name].reduced.items()}
        step = Step(job, "", needs, root, sets, reduced | dict(job.reduced))
        lost = step.lost_data()
        # What was measured stays so when the data is taken away.
        step.data = step.remembered().get("data", []) if lost else [p.fingerprint() for p in sets]
        step.key = _key(job, inputs, step.data)
        if step.finished():
            pass
        elif CHECKPOINT in job.reads and CHECKPOINT not in {*makers, *given}:
            step.state, step.reason = "open", "wants a checkpoint on the command line"
        elif lost:
            step.state, step.reason = "open", lost
        elif closed := [name for name in needs if steps[name].state == "open"]:
            step.state, step.reason = "open", f"needs {closed[0]}: {steps[closed[0]].reason}"
        steps[job.name] = step
    # The order of the file is the order of starting: a job goes as soon as its own needs are done.
    return [steps[job.name] for job in jobs]


def resolve(
    step: Step, steps: list[Step], given: Mapping[str, Path], processes: int = 1
) -> tuple[str, ...]:
    """Fill a command's placeholders with paths, relative to the repository where they lie in it."""
    files = dict(given) | {"output": step.folder}
    for placed in step.sets:
        files |= placed.roots
    for other in steps:
        for name in other.job.makes:
            made = other.made(name) if name in step.job.reads and name not in given else None
            if made is not None:
                files[name] = made
    shown = {name: _shown(path) for name, path in files.items()} | {"processes": str(processes)}
    return tuple(_PLACEHOLDER.sub(lambda m: shown.get(m[1], m[0]), w) for w in step.job.command)


def _in_order(suite: str, jobs: list[Job], makers: Mapping[str, Job]) -> Iterator[Job]:
    """Yield jobs after the ones they need, otherwise in their own order."""
    waiting = list(jobs)
    done: set[str] = set()
    while waiting:
        ready = [
            job
            for job in waiting
            if all(makers[name].name in done for name in job.reads if name in makers)
        ]
        if not ready:
            names = ", ".join(job.name for job in waiting)
            raise UserError(f"suite {suite}: these jobs wait for each other: {names}")
        yield from ready
        done |= {job.name for job in ready}
        waiting = [job for job in waiting if job.name not in done]


def _key(job: Job, inputs: Mapping[str, str], data: list[Any]) -> str:
    facts = {
        "command": job.command,
        "stdout": job.stdout,
        "makes": dict(job.makes),
        "files": {word: _content(ROOT / word) for word in job.command if _is_file(word)},
        "code": _code(job.command[1]),
        "versions": environment()["versions"],
        "inputs": dict(inputs),
        "data": data,
    }
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _is_file(word: str) -> bool:
    return bool(word) and not _PLACEHOLDER.search(word) and (ROOT / word).is_file()


def _hash(path: Path) -> str:
    """Hash a file; once, as long as it stays as it is."""
    found = path.stat()
    return _hash_of(path, found.st_size, found.st_mtime_ns)


@cache
def _hash_of(path: Path, size: int, changed_ns: int) -> str:
    return sha256(path)


@cache
def _content(file: Path) -> str:
    """Hash a file; a recipe together with the recipes that its `_BASE_` names."""
    chain: dict[Path, str] = {}
    waiting = [file]
    while waiting:
        recipe = waiting.pop(0)
        if recipe not in chain:  # a chain that bites its tail is for its reader to refuse
            chain[recipe] = sha256(recipe) if recipe.is_file() else "missing"
            waiting += _bases(recipe)
    return hashlib.sha256(" ".join(chain.values()).encode()).hexdigest()


def _bases(file: Path) -> list[Path]:
    if file.suffix not in {".yaml", ".yml"}:
        return []
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []  # the script that reads it says what is wrong
    bases = content.get("_BASE_", []) if isinstance(content, dict) else []
    return [
        (file.parent / base).resolve() for base in ([bases] if isinstance(bases, str) else bases)
    ]


@cache
def _code(script: str) -> str:
    """Hash the code of ours that a script can import: its own folder and those to its left."""
    folder = Path(script).parts[0]
    if folder not in FOLDERS:
        return ""  # a script from elsewhere is one of the files of its command
    digest = hashlib.sha256()
    for name in FOLDERS[: FOLDERS.index(folder) + 1]:
        for file in sorted((ROOT / name).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _shown(path: Path) -> str:
    """Write a path as a user in the repository would type it."""
    path = Path(path).absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
