"""Runs the jobs of a suite: each once, as soon as its needs are done, wherever `place` puts them.

A job that fails is tried once more, unless it says that its user can mend it (status 2); then it
is reported with its log's end, and the others go on.
"""

import contextlib
import errno
import fcntl
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.jobs import Step, Suite, resolve
from benchmarks.local import Local, cores
from convert.errors import Stopped, UserError
from convert.files import environment, write_json

SCHEMA = 1
SUMMARY = "suite.json"
TICK_S = 0.2
GRACE_S = 60.0  # for a child to save after a signal
ORPHAN_S = 30.0  # for the children of a killed suite to end
ATTEMPTS = 2
MENDABLE = 2  # exit status: the user can mend it, another attempt cannot
GOOD = ("done", "reused")
BAD = ("failed", "skipped", "open")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Board(Protocol):
    """What shows a suite to its user."""

    def say(self, text: str) -> None:
        """Show a line that stays."""

    def changed(self, step: Step) -> None:
        """Show that a job's state changed."""

    def draw(self, steps: list[Step]) -> None:
        """Show where everything stands; called several times a second."""


class Work(Protocol):
    """A job on its way.

    Attributes:
        why: what is known of its end beside the status.
    """

    why: str

    def status(self) -> int | None:
        """Return the exit status, negative where a signal ended it; None while it goes on."""

    def stop(self, signum: int) -> None:
        """Pass a signal on."""

    def wait(self, seconds: float) -> None:
        """Wait until it has ended; what has not by then is killed."""


class Place(Protocol):
    """Where jobs run.

    Attributes:
        stays: whether jobs go on when the suite is stopped.
        lock: file descriptor of the suite's lock.
    """

    stays: bool
    lock: int

    def describe(self) -> str:
        """Say where jobs run."""

    def processes(self, step: Step) -> int:
        """Say how many processes a job gets."""

    def room(self, step: Step) -> bool:
        """Say whether a job can start now."""

    def start(self, steps: Sequence[Step]) -> Sequence[Work]:
        """Start jobs that can."""

    def find(self, step: Step) -> Work | None:
        """Return a job's work that an earlier call has left."""


@dataclass
class Child:
    """A job on its way, and since when."""

    step: Step
    work: Work
    before_s: float  # what earlier attempts took
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Return what the job took until now, earlier attempts included."""
        return self.before_s + time.monotonic() - self.started


@dataclass
class Runner:
    """One call of a suite in one output folder.

    Attributes:
        suite: what to run.
        steps: its jobs, laid out by `benchmarks.jobs.plan`.
        given: files of the command line by name.
        root: the output folder.
        board: what shows it.
        place: where the jobs run.
        notes: what else suite.json shall say.
    """

    suite: Suite
    steps: list[Step]
    given: Mapping[str, Path]
    root: Path
    board: Board
    place: Place = field(default_factory=lambda: Local(1))
    notes: Mapping[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    children: list[Child] = field(default_factory=list)
    written: list[str] = field(default_factory=list)  # the states that suite.json has

    def run(self) -> int:
        """Run what is not done yet and return the exit status that the outcome deserves.

        Raises:
            Stopped: a signal ended it, after the children had saved.
            UserError: another suite is at work in the output folder, or the disk is full.
        """
        with locked(self.root) as lock:
            self.place.lock = lock
            try:
                self._reuse()
                while self._advance():
                    self.board.draw(self.steps)
                    time.sleep(TICK_S)
            except BaseException as error:
                self._stop(error.signum if isinstance(error, Stopped) else signal.SIGTERM)
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise UserError(
                        f"{self.root}: the disk is full; make room, and the same command goes on"
                    ) from error
                raise
            self.board.draw(self.steps)
        return self._status()

    def _reuse(self) -> None:
        """Take what is finished as it is, and what an earlier call left running."""
        for step in self.steps:
            if step.finished():
                step.state, step.status, step.reason = "reused", 0, ""
                step.seconds = float(step.remembered().get("seconds") or 0.0)
                step.argv = resolve(step, self.steps, self.given)
                self.board.changed(step)
            elif step.state == "waits" and (work := self.place.find(step)) is not None:
                step.attempts = 1
                step.argv = resolve(step, self.steps, self.given)
                step.state = "running"
                self.children.append(Child(step, work, float(step.remembered()["seconds"])))
                self.board.say(f"{step.name}: is running since an earlier call")

    def _advance(self) -> bool:
        """Settle what ended, start what can start; False when nothing is left to do."""
        for child in list(self.children):
            status = child.work.status()
            child.step.seconds = child.seconds()
            if status is not None:
                self.children.remove(child)
                self._settle(child, status)
        states = {step.name: step.state for step in self.steps}
        ready: list[Step] = []
        for step in self.steps:
            if step.state != "waits":
                continue
            if bad := [name for name in step.needs if states[name] in BAD]:
                self._give_up(step, "skipped", f"needs {bad[0]}, which {_verb(states[bad[0]])}")
            elif all(states[name] in GOOD for name in step.needs) and self.place.room(step):
                if lost := step.lost_data():
                    self._give_up(step, "failed", lost)
                    step.status = MENDABLE
                elif self.place.stays:  # a queue takes them together
                    ready.append(step)
                else:
                    self._start([step])
            states[step.name] = step.state
        if ready:
            self._start(ready)
        self._write_summary()
        return bool(self.children) or any(step.state == "waits" for step in self.steps)

    def _give_up(self, step: Step, state: str, reason: str) -> None:
        step.state, step.reason = state, reason
        self.board.changed(step)

    def _start(self, steps: list[Step]) -> None:
        for step in steps:
            if line := step.prepare():
                self.board.say(line)
            step.argv = resolve(step, self.steps, self.given, self.place.processes(step))
            step.state, step.reason, step.attempts = "running", "", step.attempts + 1
            step.remember()
            self.board.changed(step)
        for step, work in zip(steps, self.place.start(steps), strict=True):
            self.children.append(Child(step, work, step.seconds))

    def _settle(self, child: Child, status: int) -> None:
        """Record how a child ended; a failure that another attempt may mend waits again."""
        step = child.step
        step.seconds, step.status = child.seconds(), status if status >= 0 else 128 - status
        if step.stdout is not None and status == 0 and step.job.stdout:
            step.stdout.replace(step.folder / step.job.stdout)
        lacking = [p for name, p in step.job.makes.items() if status == 0 and not step.made(name)]
        step.state = "failed" if status or lacking else "done"
        step.reason = ""
        if child.work.why:
            step.reason = child.work.why
        elif status < 0:
            name = signal.Signals(-status).name
            step.reason = f"ended by {name}" + (", out of memory?" if name == "SIGKILL" else "")
        elif status:
            step.reason = f"status {status}: {last_line(step.log)}"
        elif lacking:
            step.reason = f"ended well but left no {lacking[0]} in {step.folder}"
        if step.stdout is not None:
            step.stdout.unlink(missing_ok=True)
        if step.state == "failed" and status != MENDABLE and step.attempts < ATTEMPTS:
            self.board.say(f"retry   {step.name}: {step.reason}; it is tried once more")
            step.remember()
            step.state = "waits"
            return
        step.remember()
        self.board.changed(step)

    def _stop(self, signum: int) -> None:
        """Pass a signal to the children and wait until they have saved."""
        names = ", ".join(child.step.name for child in self.children)
        if names and self.place.stays:
            self.board.say(f"left running: {names}")
            return
        for child in self.children:
            child.work.stop(signum)
        if names:
            self.board.say(f"stopping: waiting for {names} to save")
        deadline = time.monotonic() + GRACE_S
        with contextlib.suppress(UserError, OSError):  # a full disk must not hide why we stop
            for child in self.children:
                child.work.wait(deadline - time.monotonic())
                child.step.attempts = ATTEMPTS
                if child.work.status() == 0:  # it was as good as done
                    self._settle(child, 0)
                    continue
                child.step.state, child.step.seconds = "stopped", child.seconds()
                child.step.remember()
                self.board.changed(child.step)
            self._write_summary()
        self.board.say("the same command goes on from here")

    def _write_summary(self) -> None:
        """Write `suite.json`, which is what the report reads, when a job's state changed."""
        states = [step.state for step in self.steps]
        if states == self.written:
            return
        summary = {
            "schema": SCHEMA,
            "suite": self.suite.name,
            "typed": self.suite.typed,
            "title": self.suite.title,
            "given": {name: str(path) for name, path in self.given.items()},
            "parallel": self.suite.parallel,
            "cores": cores(),
            "started": round(self.started, 1),
            "seconds": round(time.time() - self.started, 1),
            "environment": environment(),
            **self.notes,
            "jobs": [step.summary() for step in self.steps],
        }
        write_json(self.root / SUMMARY, summary)
        self.written = states

    def _status(self) -> int:
        failed = [step.status for step in self.steps if step.state == "failed"]
        if not failed:
            return 0
        return 2 if all(status == MENDABLE for status in failed) else 1


@contextlib.contextmanager
def locked(root: Path) -> Iterator[int]:
    """Hold the output folder for one suite and its children; yields the lock's file descriptor.

    Raises:
        UserError: a living suite, or children of a dead one that do not end, hold it.
    """
    path = root / ".lock"
    with path.open("a+") as file:
        deadline = time.monotonic() + ORPHAN_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                owner = path.read_text(encoding="utf-8").strip()
                if alive(owner) or time.monotonic() > deadline:
                    raise UserError(
                        f"{root}: a suite is at work here (process {owner}); "
                        "wait for it, or choose another folder with --output-dir"
                    ) from error
                time.sleep(TICK_S)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def alive(process: str) -> bool:
    """Say whether a process lives, which a zombie does not; False where there is no /proc."""
    try:
        stat = Path(f"/proc/{int(process)}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def last_lines(log: Path, count: int) -> list[str]:
    """Return the last lines of a log, the final state of a progress bar as one line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = [_ANSI.sub("", line).rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-count:]


def last_line(log: Path) -> str:
    """Return the last line of a log; empty while only the command stands there."""
    lines = last_lines(log, 1)
    return "" if not lines or lines[0].startswith("$ ") else lines[0].strip()


def _verb(state: str) -> str:
    return "is open" if state == "open" else state
