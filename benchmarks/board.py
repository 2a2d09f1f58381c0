"""How a running suite shows itself: a table that lives on a terminal, plain lines in a file."""

import re
import shutil
import sys
import time

from benchmarks.jobs import Step
from benchmarks.runner import Board, last_line, last_lines

REDRAW_S = 0.5
HEARTBEAT_S = 60.0
TAIL = 15  # lines of a failed job's log
BAR = 12
_OF = re.compile(r"(?<![\d./-])(\d+) ?/ ?(\d+)(?![\d./-])")
_COLOURS = {
    "done": 32,
    "reused": 32,
    "running": 36,
    "failed": 31,
    "skipped": 33,
    "stopped": 33,
    "open": 33,
}


def make_board(quiet: bool) -> Board:
    """Choose how to show a suite on this standard output."""
    if quiet:
        return Quiet()
    return Table() if sys.stdout.isatty() else Lines()


class Quiet:
    """Shows failures only."""

    def say(self, text: str) -> None:
        """Show nothing: not an error."""

    def changed(self, step: Step) -> None:
        """Show the end of a failed job's log."""
        if step.state == "failed":
            print(failure(step), file=sys.stderr, flush=True)

    def draw(self, steps: list[Step]) -> None:
        """Show nothing: not an error."""


class Lines:
    """A line when a job starts, ends, and once a minute between."""

    def __init__(self) -> None:
        self.beat = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    def changed(self, step: Step) -> None:
        """Print what became of a job."""
        if step.state == "running":
            self.say(f"start   {step.name}: {step.summary()['command']}")
        elif step.state == "failed":
            self.say(failure(step))
        else:
            self.say(f"{step.state:<7} {step.name}{_clock(step)} {remark(step)}".rstrip())

    def draw(self, steps: list[Step]) -> None:
        """Print, once a minute, the last line of each running job."""
        if time.monotonic() - self.beat < HEARTBEAT_S:
            return
        self.beat = time.monotonic()
        for step in steps:
            if step.state == "running":
                self.say(f"running {step.name}{_clock(step)} {remark(step)}".rstrip())


class Table:
    """One line a job, redrawn in place on a terminal."""

    def __init__(self) -> None:
        self.height = 0
        self.drawn = 0.0
        self.steps: list[Step] = []

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self._erase()
        print(text, flush=True)
        self.drawn = 0.0

    def changed(self, step: Step) -> None:
        """Show a failure above the table; everything else shows in the table itself."""
        if step.state == "failed":
            self.say(failure(step))
        self.drawn = 0.0

    def draw(self, steps: list[Step]) -> None:
        """Redraw the table, twice a second; what does not fit the terminal's height is left out."""
        busy = any(step.state in ("running", "waits") for step in steps)
        if busy and time.monotonic() - self.drawn < REDRAW_S:
            return
        size = shutil.get_terminal_size()
        lines = table(steps, size.columns - 1)[-(size.lines - 2) :]
        self._erase()
        print("\n".join(lines), flush=True)
        self.height, self.drawn = len(lines), time.monotonic()

    def _erase(self) -> None:
        if self.height:
            print(f"\x1b[{self.height}F\x1b[J", end="")
        self.height = 0


def table(steps: list[Step], columns: int) -> list[str]:
    """Write one line a job, cut to a width; colours do not count."""
    width = max(len(step.name) for step in steps)
    lines = []
    for step in steps:
        bar = _bar(step) if step.state == "running" else ""
        line = f" {step.name:<{width}}  {step.state:<8}{_clock(step):>7}  {bar}{remark(step)}"
        shown = line[:columns].rstrip()
        colour = _COLOURS.get(step.state)
        lines.append(f"\x1b[{colour}m{shown}\x1b[0m" if colour else shown)
    return lines


def remark(step: Step) -> str:
    """Say about a job what its state does not: its last line, its reason, what it waits for."""
    if step.state == "waits":
        return f"for {', '.join(step.needs)}" if step.needs else ""
    return step.reason or last_line(step.log)


def failure(step: Step) -> str:
    """Say that a job failed, with the end of its log."""
    tail = "\n".join(f"    {line}" for line in last_lines(step.log, TAIL))
    return f"failed  {step.name}{_clock(step)} {step.reason}\n{tail}\n    log: {step.log}"


def _clock(step: Step) -> str:
    if not step.seconds:
        return ""
    minutes, seconds = divmod(round(step.seconds), 60)
    return f" {minutes}:{seconds:02d}"


def _bar(step: Step) -> str:
    """Draw a bar where a job's last line says how far it is, `step 12/400`."""
    for done, whole in _OF.findall(last_line(step.log)):
        if 0 <= int(done) <= int(whole) > 0:
            full = BAR * int(done) // int(whole)
            return f"{'█' * full}{'░' * (BAR - full)} "
    return ""
