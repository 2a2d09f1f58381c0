"""The job graph of a suite: which commands, in which order, and which are already done.

A suite is a YAML file (`benchmarks/suites/*.yaml`):

    title:    one line for the page
    parallel: how many jobs run at once
    jobs:     NAME: {command, makes, stdout, minutes}, in the order in which they should start

`command` is what a user would type. Placeholders stand in it: `{output}` is the job's own folder;
any other name is a file that another job `makes` (a name and a pattern inside that job's folder) or
that was given on the command line. So the edges of the graph are never written down twice.

A job's key hashes everything that decides its outcome: its command, the contents of the files
named in it (recipes with their `_BASE_` chains), our code that it runs, the versions of the
libraries, and the keys of the jobs whose files it reads. A job that ended well under the same key
is never run again.
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

from convert.errors import UserError, nearest
from convert.files import ROOT, environment, sha256, write_json

SUITES = Path(__file__).resolve().parent / "suites"
FOLDERS = ("convert", "pretrain", "transfer", "benchmarks")  # a folder imports those to its left
RECORDS, REPLACED = "jobs", "replaced"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)*")


@dataclass(frozen=True)
class Job:
    """One command of a suite.

    Attributes:
        name: also its folder inside the suite's output folder, `coco/moco`.
        command: its words; the first is `python`, the second a script.
        makes: name of a file for other jobs -> its pattern inside the job's folder.
        stdout: the file that takes what the command prints; None: it goes to the log.
        minutes: what it took on two cores, for a forecast only.
    """

    name: str
    command: tuple[str, ...]
    makes: Mapping[str, str] = field(default_factory=dict)
    stdout: str | None = None
    minutes: float | None = None

    @property
    def reads(self) -> list[str]:
        """The names of the files that other jobs make for this one."""
        found = [name for word in self.command for name in _PLACEHOLDER.findall(word)]
        return [name for name in dict.fromkeys(found) if name != "output"]


@dataclass(frozen=True)
class Suite:
    """A suite as its file says it; `typed` is how its user named it."""

    name: str
    typed: str
    title: str
    parallel: int
    jobs: tuple[Job, ...]


@dataclass
class Step:
    """A job in one output folder, and how far it is.

    Attributes:
        job: what to run.
        key: hash of everything that decides the outcome.
        needs: names of the jobs that come first.
        root: the suite's output folder.
        state: waits, running, done, reused, failed, skipped or stopped.
        seconds: what it took, attempts that were cut included.
        status: exit status of the command.
        reason: why it failed or was skipped.
        argv: the command with its placeholders filled, once it has started.
    """

    job: Job
    key: str
    needs: tuple[str, ...]
    root: Path
    state: str = "waits"
    seconds: float = 0.0
    status: int | None = None
    reason: str = ""
    argv: tuple[str, ...] = ()

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
            "command": shlex.join(self.argv or self.job.command),
            "log": str(self.log.relative_to(self.root)),
            "key": self.key,
        }

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


def load_suite(word: str) -> Suite:
    """Read a suite by its name (`quick`) or from a YAML file.

    Raises:
        UserError: no such suite, not YAML, an unknown key, or a job that is not well formed.
    """
    file = Path(word) if Path(word).suffix in {".yaml", ".yml"} else SUITES / f"{word}.yaml"
    if not file.is_file():
        known = [path.stem for path in SUITES.glob("*.yaml")]
        raise UserError(f"suite '{word}': not found; suites near it: {nearest(word, known)}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"suite {file}: cannot be read as YAML ({error})") from error
    _known_keys(content, ("title", "parallel", "jobs"), f"suite {file}")
    jobs = content.get("jobs")
    if not isinstance(jobs, dict) or not jobs:
        raise UserError(f"suite {file}: found no jobs; want jobs: NAME: command: python script.py")
    parallel = content.get("parallel", 1)
    if not isinstance(parallel, int) or parallel < 1:
        raise UserError(f"suite {file}: parallel is {parallel!r}, want a whole number from 1")
    return Suite(
        name=file.stem,
        typed=word,
        title=str(content.get("title", file.stem)),
        parallel=parallel,
        jobs=tuple(_job(str(name), value, f"suite {file}") for name, value in jobs.items()),
    )


def plan(suite: Suite, given: Mapping[str, Path], root: Path) -> list[Step]:
    """Lay a suite out in an output folder, each job after the ones whose files it reads.

    Args:
        suite: what to run.
        given: files of the command line by name; a job that makes nothing else is left out.
        root: the suite's output folder.

    Raises:
        UserError: a file that no job makes, or jobs that wait for each other.
    """
    jobs = [job for job in suite.jobs if not job.makes or not set(job.makes) <= set(given)]
    makers = {name: job for job in jobs for name in job.makes if name not in given}
    for job in jobs:
        for name in job.reads:
            if name not in makers and name not in given:
                known = nearest(name, {*makers, *given, "output"})
                raise UserError(
                    f"suite {suite.name}: job {job.name} reads {{{name}}}, which no job makes; "
                    f"names near it: {known}"
                )
    hashes = {name: sha256(path) for name, path in given.items()}
    steps: dict[str, Step] = {}
    for job in _in_order(suite.name, jobs, makers):
        needs = tuple(dict.fromkeys(makers[name].name for name in job.reads if name in makers))
        inputs = {
            name: steps[makers[name].name].key if name in makers else hashes[name]
            for name in job.reads
        }
        steps[job.name] = Step(job, _key(job, inputs), needs, root)
    # The order of the file is the order of starting: a job goes as soon as its own needs are done.
    return [steps[job.name] for job in jobs]


def resolve(step: Step, steps: list[Step], given: Mapping[str, Path]) -> tuple[str, ...]:
    """Fill a command's placeholders with paths, relative to the repository where they lie in it."""
    files = dict(given) | {"output": step.folder}
    for other in steps:
        for name in other.job.makes:
            made = other.made(name) if name in step.job.reads and name not in given else None
            if made is not None:
                files[name] = made
    shown = {name: _shown(path) for name, path in files.items()}
    return tuple(_PLACEHOLDER.sub(lambda m: shown.get(m[1], m[0]), w) for w in step.job.command)


def _job(name: str, value: Any, where: str) -> Job:
    where = f"{where}: job {name}"
    if not _NAME.fullmatch(name) or name.split("/")[0] in {RECORDS, REPLACED}:
        raise UserError(f"{where}: a name is lower-case words, as in coco/moco, not '{name}'")
    _known_keys(value, ("command", "makes", "stdout", "minutes"), where)
    words = tuple(shlex.split(str(value.get("command", ""))))
    if len(words) < 2 or words[0] != "python":
        raise UserError(f"{where}: command is {' '.join(words)!r}, want: python script.py ...")
    makes = value.get("makes", {})
    if not isinstance(makes, dict) or "output" in makes:
        raise UserError(f"{where}: makes is {makes!r}, want NAME: file pattern, not named output")
    return Job(name, words, makes, value.get("stdout"), value.get("minutes"))


def _known_keys(content: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{where}: found {content!r}, want KEY: VALUE lines ({', '.join(known)})")
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'; known: {nearest(str(key), known)}")


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


def _key(job: Job, inputs: Mapping[str, str]) -> str:
    facts = {
        "command": job.command,
        "stdout": job.stdout,
        "makes": dict(job.makes),
        "files": {word: _content(ROOT / word) for word in job.command if _is_file(word)},
        "code": _code(job.command[1]),
        "versions": environment()["versions"],
        "inputs": dict(inputs),
    }
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _is_file(word: str) -> bool:
    return bool(word) and not _PLACEHOLDER.search(word) and (ROOT / word).is_file()


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
