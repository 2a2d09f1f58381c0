"""What a suite would do: its graph with hours and memory, missing data, rows that stay open."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.jobs import Step, Suite
from benchmarks.runner import Place
from convert import released

_SEED = re.compile(r"\.seed\d+(?![\w.])")
_PLAIN = re.compile(r"[\w@%+=:,./*{}-]+")


def forecast(
    suite: Suite, steps: Sequence[Step], place: Place, rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Write it in lines; nothing is run or written."""
    lines = [f"suite {suite.name}: {suite.title}"]
    for trials in _trials(steps):
        lines += [_line(trials, place), f"    {_command(trials)}"]
    lines += left_open(steps)
    lines += to_fetch(steps)
    lines += [_row(row) for row in rows]
    left = [step for step in steps if not step.finished() and step.state != "open"]
    total = f"to run: {_sum(left)}, {place.describe()}"
    if len(left) < len(steps):
        total = f"all of it: {_sum(steps)}; {total}"
    costs = [f"times and memory: {suite.costs}"] if suite.costs else []
    return [*lines, *costs, f"{total}; nothing was run or written"]


def beforehand(steps: Sequence[Step], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what a reader should know before a run starts: what it cannot fill."""
    lines = left_open(steps) + to_fetch(steps) + [_row(row) for row in rows if row["by"]]
    still = sum(not row["by"] for row in rows)
    if still:
        of = f"{still} of {len(rows)} rows of the papers' tables"
        lines.append(f"open: {of} are of other checkpoints (--dry-run lists them)")
    return lines


def left_open(steps: Sequence[Step]) -> list[str]:
    """Say what the data and the checkpoints at hand cannot serve, each reason once."""
    reasons: dict[str, list[str]] = {}
    for step in steps:
        if step.state == "open" and not step.reason.startswith("needs ") and not step.lost_data():
            reasons.setdefault(step.reason, []).append(step.name)
    lost = dict.fromkeys(
        line for s in steps if s.state == "open" for p in s.sets for line in p.missing()
    )
    lines = [f"missing: {line}" for line in lost]
    lines += [f"open: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    closed = [step.name for step in steps if step.state == "open"]
    if closed:
        cells = ", ".join(name for name in closed if "/" in name) or ", ".join(closed)
        lines.append(f"{len(closed)} of {len(steps)} jobs stay open: {cells}")
    return lines


def to_fetch(steps: Sequence[Step]) -> list[str]:
    """Name the released weights that jobs start from and that are not here yet."""
    words = dict.fromkeys(word for s in steps if not s.finished() for word in s.job.command)
    found = [release for word in words if (release := released.find(word))]
    return [
        f"fetched first: {release.name}, from {release.address}, into {released.place(release)}, "
        "where a file put by hand serves too"
        for release in found
        if not released.place(release).is_file()
    ]


def _trials(steps: Sequence[Step]) -> list[list[Step]]:
    """Put the trials of an evaluation that are alike but for their seed together."""
    groups: dict[tuple[str, str, bool], list[Step]] = {}
    for step in steps:
        name = _SEED.sub("", step.name)
        groups.setdefault((name, step.state, step.finished()), []).append(step)
    return list(groups.values())


def _line(trials: Sequence[Step], place: Place) -> str:
    step = trials[0]
    state = "open" if step.state == "open" else "would run"
    name = step.name
    if len(trials) > 1:
        name += f" to {trials[-1].name.rpartition('.')[2]} (each)"
    parts = [f"{'done before' if step.finished() else state}: {name}"]
    if step.job.minutes and not step.reduced:
        parts.append(f"about {_time(step.job.minutes)}")
    if step.job.gpu_gb:
        parts.append(f"{step.job.gpu_gb:g} GB a GPU")
    if step.job.processes > 1:
        parts.append(f"{place.processes(step)} of {step.job.processes} processes")
    if step.reduced:
        parts.append("reduced: " + " ".join(f"{k} {v}" for k, v in step.reduced.items()))
    if step.needs:
        needs = dict.fromkeys(_SEED.sub(".seed*", need) for need in step.needs)
        parts.append(f"after {', '.join(needs)}")
    return ", ".join(parts)


def _command(trials: Sequence[Step]) -> str:
    """Write a command as it would be typed, what differs between trials as a star."""
    words = [_SEED.sub(".seed*", word) for word in trials[0].job.command]
    if len(trials) > 1:
        pairs = zip(trials[0].job.command, trials[1].job.command, strict=True)
        words = [word if word == other else "*" for word, other in pairs]
    return " ".join(word if _PLAIN.fullmatch(word) else shlex.quote(word) for word in _once(words))


def _once(words: Sequence[str]) -> list[str]:
    """Drop a word that only repeats the one before it: the records of many trials are one."""
    return [
        word for at, word in enumerate(words) if not (at and "*" in word and word == words[at - 1])
    ]


def _row(row: Mapping[str, Any]) -> str:
    who = f"filled by {row['by']}" if row["by"] else f"stays open, wants {_facts(row['wants'])}"
    return f"row: {row['table']}, {row['row']} ({row['task']}): {who}"


def _sum(steps: Sequence[Step]) -> str:
    times = [None if step.reduced else step.job.minutes for step in steps]
    known, unknown = [time for time in times if time], times.count(None)
    jobs = f"{len(steps)} job{'s' * (len(steps) != 1)}"
    if not known:
        return f"{jobs} of unknown length" if steps else jobs
    beside = f" and {unknown} of unknown length" if unknown else ""
    return f"{jobs}, about {_time(sum(known))} one after the other{beside}"


def _time(minutes: float) -> str:
    return f"{minutes:.3g} min" if minutes < 60 else f"{minutes / 60:.1f} h"


def _facts(wants: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in wants.items())
