"""What a suite would do: its graph with hours and memory, missing data, rows that stay open."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.jobs import Step, Suite
from benchmarks.runner import Place


def forecast(
    suite: Suite, steps: Sequence[Step], place: Place, rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Write it in lines; nothing is run or written."""
    lines = [f"suite {suite.name}: {suite.title}"]
    for step in steps:
        lines += [_line(step, place), f"    {' '.join(step.job.command)}"]
    lines += left_open(steps, rows)
    left = [step for step in steps if not step.finished() and step.state != "open"]
    total = f"to run: {_sum(left)}, {place.describe()}"
    if len(left) < len(steps):
        total = f"all of it: {_sum(steps)}; {total}"
    costs = [f"times and memory: {suite.costs}"] if suite.costs else []
    return [*lines, *costs, f"{total}; nothing was run or written"]


def left_open(steps: Sequence[Step], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what the data and the checkpoints at hand cannot serve, each reason once."""
    reasons: dict[str, list[str]] = {}
    for step in steps:
        if step.state == "open" and not step.reason.startswith("needs "):
            for reason in step.reason.split("; ") if step.lost_data() else [step.reason]:
                reasons.setdefault(reason, []).append(step.name)
    lost = dict.fromkeys(
        line for s in steps if s.state == "open" for p in s.sets for line in p.missing()
    )
    lines = [f"missing: {line}" for line in lost]
    for reason, names in reasons.items():
        if not any(reason in line for line in lost):
            lines.append(f"open: {', '.join(names)}: {reason}")
    closed = [step.name for step in steps if step.state == "open"]
    if closed:
        cells = ", ".join(name for name in closed if "/" in name) or ", ".join(closed)
        lines.append(f"{len(closed)} of {len(steps)} jobs stay open: {cells}")
    for row in rows:
        who = f"filled by {row['by']}" if row["by"] else f"stays open, wants {_facts(row['wants'])}"
        lines.append(f"row: {row['table']}, {row['row']} ({row['task']}): {who}")
    return lines


def _line(step: Step, place: Place) -> str:
    state = "open" if step.state == "open" else "would run"
    parts = [f"{'done before' if step.finished() else state}: {step.name}"]
    if step.job.minutes and not step.reduced:
        parts.append(f"about {_time(step.job.minutes)}")
    if step.job.gpu_gb:
        parts.append(f"{step.job.gpu_gb:g} GB a GPU")
    if step.job.processes > 1:
        parts.append(f"{place.processes(step)} of {step.job.processes} processes")
    if step.reduced:
        parts.append("reduced: " + " ".join(f"{k} {v}" for k, v in step.reduced.items()))
    if step.needs:
        parts.append(f"after {', '.join(step.needs)}")
    return ", ".join(parts)


def _sum(steps: Sequence[Step]) -> str:
    times = [None if step.reduced else step.job.minutes for step in steps]
    minutes, unknown = sum(time or 0 for time in times), times.count(None)
    beside = f" and {unknown} of unknown length" if unknown else ""
    return f"{len(steps)} jobs, about {_time(minutes)} one after the other{beside}"


def _time(minutes: float) -> str:
    return f"{minutes:.3g} min" if minutes < 60 else f"{minutes / 60:.1f} h"


def _facts(wants: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in wants.items())
