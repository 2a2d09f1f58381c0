"""A suite's file: read, checked, its templates turned into jobs.

A suite is a YAML file (`benchmarks/suites/*.yaml`):

    _BASE_:   suites beside it whose tables and jobs it takes over, before its own
    title:    one line for the page
    parallel: how many jobs run at once
    costs:    where minutes and gpu_gb come from
    data:     sets of its own, beside benchmarks/data.yaml; see benchmarks/needs.py
    tables:   TABLE: {ROW: {task, FACT: value}}, the rows of a paper that a checkpoint can fill
    jobs:     NAME: {command, makes, stdout, data, wants, inits, seeds, minutes, gpu_gb, processes,
              gpu}, in the order in which they should start; see benchmarks/jobs.py

A job with `inits: {moco: WORD, random: WORD}` stands for one job for each, named NAME/INIT, with
INIT for {init} and WORD for {start} in its command. One with `seeds: N` and {seed} in its command
stands for a job a seed, and one that joins their results; with {seeds} the script repeats itself.
"""

import fnmatch
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from re import compile as pattern
from typing import Any

import yaml

from benchmarks.jobs import RECORDS, REPLACED, SUITES, Job, Suite
from benchmarks.needs import read_sets
from convert.errors import UserError, nearest

DATA = Path(__file__).resolve().parent / "data.yaml"
BASE = "_BASE_"
KEYS = ("title", "parallel", "costs", "data", "tables", "jobs")
JOB_KEYS = (
    *("command", "makes", "stdout", "data", "wants", "inits", "seeds"),
    *("minutes", "gpu_gb", "processes", "gpu"),
)
_NAME = pattern(r"[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)*")


@dataclass(frozen=True)
class Override:
    """A setting of the command line: jobs whose name fits the pattern get KEY VALUE."""

    jobs: str
    key: str
    value: str


def load_suite(word: str, overrides: Sequence[Override] = (), seeds: int | None = None) -> Suite:
    """Read a suite by its name (`quick`) or from a YAML file.

    Args:
        word: its name or file.
        overrides: settings that replace those of its recipes.
        seeds: how many trials, instead of the suite's own numbers.

    Raises:
        UserError: no such suite, not YAML, an unknown key, a job that is not well formed, or an
            override that fits no job.
    """
    file = Path(word) if Path(word).suffix in {".yaml", ".yml"} else SUITES / f"{word}.yaml"
    if not file.is_file():
        known = [path.stem for path in SUITES.glob("*.yaml")]
        raise UserError(f"suite '{word}': not found; suites near it: {nearest(word, known)}")
    where = f"suite {file}"
    content = _with_bases(file)
    templates = content.get("jobs")
    if not isinstance(templates, dict) or not templates:
        raise UserError(f"{where}: found no jobs; want jobs: NAME: command: python script.py")
    jobs = [
        job
        for name, value in templates.items()
        for job in _expand(str(name), value, f"{where}: job {name}", overrides, seeds)
    ]
    _all_used(overrides, jobs)
    sets = read_sets(_read(DATA), str(DATA)) | read_sets(content.get("data", {}), where)
    for job in jobs:
        for name in job.data:
            if name not in sets:
                raise UserError(
                    f"{where}: job {job.name}: unknown data '{name}'; known: {nearest(name, sets)}"
                )
    return Suite(
        name=file.stem,
        typed=word,
        title=str(content.get("title", file.stem)),
        parallel=_whole(content.get("parallel", 1), f"{where}: parallel"),
        jobs=tuple(jobs),
        costs=str(content.get("costs", "")),
        sets={name: sets[name] for name in dict.fromkeys(n for job in jobs for n in job.data)},
        tables=_tables(content.get("tables", {}), where),
    )


def _with_bases(file: Path) -> dict[str, Any]:
    """Read a suite's file; jobs, tables and data of its bases come before its own."""
    own = _known_keys(_read(file), (*KEYS, BASE), f"suite {file}")
    bases = own.pop(BASE, [])
    content: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        found = _known_keys(_read(file.parent / str(base)), KEYS, f"suite {file.parent / base}")
        content = _joined(content, found)
    return _joined(content, own)


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Put two files together: mappings entry by entry, all else as the second has it."""
    both = {**first, **second}
    for key in ("data", "tables", "jobs"):
        if isinstance(first.get(key), dict) and isinstance(second.get(key), dict):
            both[key] = {**first[key], **second[key]}
    return both


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"suite {file}: cannot be read as YAML ({error})") from error


def _expand(
    name: str, value: Any, where: str, overrides: Sequence[Override], seeds: int | None
) -> Iterator[Job]:
    """Yield the jobs that a template stands for."""
    _known_keys(value, JOB_KEYS, where)
    inits = value.get("inits")
    if inits is None:
        yield from _of_seeds(_job(name, value, where, {}), value, where, overrides, seeds)
        return
    if not isinstance(inits, dict) or not inits:
        raise UserError(f"{where}: inits is {inits!r}, want INIT: what it starts from")
    for init, start in inits.items():
        words = {"init": str(init), "start": str(start)}
        job = _job(f"{name}/{init}", value, where, words)
        yield from _of_seeds(job, value, where, overrides, seeds)


def _of_seeds(
    job: Job, value: Mapping[str, Any], where: str, overrides: Sequence[Override], seeds: int | None
) -> Iterator[Job]:
    """Yield a job, or one for each of its seeds and the one that joins them."""
    count = _whole(value.get("seeds", 1), f"{where}: seeds")
    count = seeds if seeds is not None and "seeds" in value else count
    job = _overridden(_filled(job, {"seeds": str(count)}), overrides)
    if not any("{seed}" in word for word in job.command):
        yield job
        return
    if count == 1:
        yield _filled(job, {"seed": "0"})
        return
    # No slash in its name: a single seed is no row of the table.
    names = [f"{job.name.replace('/', '.')}.seed{seed}" for seed in range(count)]
    for seed, name in enumerate(names):
        yield replace(_filled(job, {"seed": str(seed)}), name=name, makes={name: "results.json"})
    words = ("python", "benchmarks/seeds.py", "{output}", *(f"{{{name}}}" for name in names))
    yield Job(job.name, words, gpu=False, reduced=job.reduced)


def _overridden(job: Job, overrides: Sequence[Override]) -> Job:
    chosen = [o for o in overrides if fnmatch.fnmatchcase(job.name, o.jobs)]
    words = [word for override in chosen for word in (override.key, override.value)]
    reduced = {override.key: override.value for override in chosen}
    return replace(job, command=(*job.command, *words), reduced=reduced)


def _all_used(overrides: Sequence[Override], jobs: Sequence[Job]) -> None:
    for override in overrides:
        if not any(override.key in job.reduced for job in jobs):
            names = ", ".join(dict.fromkeys(job.name for job in jobs if "/" in job.name))
            raise UserError(f"--override {override.jobs}: fits no job; jobs are {names}")


def _job(name: str, value: Mapping[str, Any], where: str, words: Mapping[str, str]) -> Job:
    if not _NAME.fullmatch(name) or name.split("/")[0] in {RECORDS, REPLACED}:
        raise UserError(f"{where}: a name is lower-case words, as in coco/moco, not '{name}'")
    command = tuple(shlex.split(_fill(str(value.get("command", "")), words)))
    if len(command) < 2 or command[0] != "python":
        raise UserError(f"{where}: command is {' '.join(command)!r}, want: python script.py ...")
    makes = value.get("makes", {})
    if not isinstance(makes, dict) or "output" in makes:
        raise UserError(f"{where}: makes is {makes!r}, want NAME: file pattern, not named output")
    wants = value.get("wants", {})
    if not isinstance(wants, dict):
        raise UserError(f"{where}: wants is {wants!r}, want FACT: value of the checkpoint")
    return Job(
        name=name,
        command=command,
        makes=makes,
        stdout=value.get("stdout"),
        minutes=value.get("minutes"),
        gpu_gb=value.get("gpu_gb"),
        processes=_whole(value.get("processes", 1), f"{where}: processes"),
        gpu=bool(value.get("gpu", True)),
        data=tuple(_list(value.get("data", []))),
        wants={str(fact): tuple(_list(known)) for fact, known in wants.items()},
    )


def _fill(text: str, words: Mapping[str, str]) -> str:
    for name, word in words.items():
        text = text.replace(f"{{{name}}}", word)
    return text


def _filled(job: Job, words: Mapping[str, str]) -> Job:
    return replace(job, command=tuple(_fill(word, words) for word in job.command))


def _tables(content: Any, where: str) -> dict[str, dict[str, dict[str, Any]]]:
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for table, rows in content.items():
        for row, facts in rows.items() if isinstance(rows, dict) else [("", rows)]:
            if not isinstance(facts, dict) or "task" not in facts:
                raise UserError(f"{where}: table {table}: row {row}: want task and facts")
            tables.setdefault(str(table), {})[str(row)] = facts
    return tables


def _list(value: Any) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def _whole(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{what} is {value!r}, want a whole number from 1")
    return value


def _known_keys(content: Any, known: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where}: found {content!r}, want KEY: VALUE lines ({', '.join(known)})")
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'; known: {nearest(str(key), known)}")
    return content
