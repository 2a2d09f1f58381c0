"""Runs the jobs of a suite as processes on this machine: at most so many at once, none twice.

Every child is a session of its own, so that a Ctrl-C on the terminal reaches it once, from us, and
its save is waited for. All of them hold the suite's lock, so that no second suite writes beside a
child that outlived a killed one; on Linux such a child is asked to save and end as well.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from benchmarks.jobs import Step, Suite, resolve
from convert.errors import Stopped, UserError
from convert.files import ROOT, environment, write_json

SCHEMA = 1
SUMMARY = "suite.json"
TICK_S = 0.2
GRACE_S = 60.0  # for a child to save after a signal
ORPHAN_S = 30.0  # for the children of a killed suite to end
GOOD = ("done", "reused")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Board(Protocol):
    """What shows a suite to its user."""

    def say(self, text: str) -> None:
        """Show a line that stays."""

    def changed(self, step: Step) -> None:
        """Show that a job's state changed."""

    def draw(self, steps: list[Step]) -> None:
        """Show where everything stands; called several times a second."""


@dataclass
class Child:
    """A job's process."""

    step: Step
    process: subprocess.Popen[bytes]
    stdout: Path | None
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
    """

    suite: Suite
    steps: list[Step]
    given: Mapping[str, Path]
    root: Path
    board: Board
    started: float = field(default_factory=time.time)
    children: list[Child] = field(default_factory=list)
    written: list[str] = field(default_factory=list)  # the states that suite.json has

    def run(self) -> int:
        """Run what is not done yet and return the exit status that the outcome deserves.

        Raises:
            Stopped: a signal ended it, after the children had saved.
            UserError: another suite is at work in the output folder.
        """
        with locked(self.root) as lock:
            for step in self.steps:
                if step.finished():
                    step.state, step.status = "reused", 0
                    step.seconds = float(step.remembered().get("seconds") or 0.0)
                    step.argv = resolve(step, self.steps, self.given)
                    self.board.changed(step)
            try:
                while self._advance(lock):
                    self.board.draw(self.steps)
                    time.sleep(TICK_S)
            except BaseException as error:
                self._stop(error.signum if isinstance(error, Stopped) else signal.SIGTERM)
                raise
            self.board.draw(self.steps)
        return self._status()

    def _advance(self, lock: int) -> bool:
        """Settle what ended, start what can start; False when nothing is left to do."""
        changed = [child for child in self.children if child.process.poll() is not None]
        for child in changed:
            self.children.remove(child)
            self._settle(child)
        for child in self.children:
            child.step.seconds = child.seconds()
        states = {step.name: step.state for step in self.steps}
        for step in self.steps:
            if step.state != "waits":
                continue
            if bad := [name for name in step.needs if states[name] in ("failed", "skipped")]:
                step.state, step.reason = "skipped", f"needs {bad[0]}, which {states[bad[0]]}"
                states[step.name] = step.state
                self.board.changed(step)
            elif len(self.children) < self.suite.parallel and all(
                states[name] in GOOD for name in step.needs
            ):
                self.children.append(self._start(step, lock))
        self._write_summary()
        return bool(self.children) or any(step.state == "waits" for step in self.steps)

    def _start(self, step: Step, lock: int) -> Child:
        if line := step.prepare():
            self.board.say(line)
        step.argv = resolve(step, self.steps, self.given)
        step.state = "running"
        step.remember()
        self.board.changed(step)
        stdout = step.record.with_suffix(".stdout") if step.job.stdout else None
        with contextlib.ExitStack() as files:
            log: IO[bytes] = files.enter_context(step.log.open("ab"))
            log.write(f"$ {step.summary()['command']}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, *step.argv[1:]],
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=files.enter_context(stdout.open("wb")) if stdout else log,
                stderr=log,
                start_new_session=True,
                pass_fds=(lock,),
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        return Child(step, process, stdout, step.seconds)

    def _environment(self) -> dict[str, str]:
        # The same number whether or not a core is idle: sums in another order are other numbers.
        threads = str(max(1, cores() // self.suite.parallel))
        ours = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        return ours | dict(os.environ)  # what the user has set stays

    def _settle(self, child: Child) -> None:
        """Record how a child ended."""
        step, status = child.step, child.process.returncode
        step.seconds, step.status = child.seconds(), status if status >= 0 else 128 - status
        if status == 0 and child.stdout is not None and step.job.stdout:
            child.stdout.replace(step.folder / step.job.stdout)
        lacking = [p for name, p in step.job.makes.items() if status == 0 and not step.made(name)]
        step.state = "failed" if status or lacking else "done"
        if status < 0:
            name = signal.Signals(-status).name
            step.reason = f"ended by {name}" + (", out of memory?" if name == "SIGKILL" else "")
        elif status:
            step.reason = f"status {status}: {last_line(step.log)}"
        elif lacking:
            step.reason = f"ended well but left no {lacking[0]} in {step.folder}"
        if child.stdout is not None:
            child.stdout.unlink(missing_ok=True)
        step.remember()
        self.board.changed(step)

    def _stop(self, signum: int) -> None:
        """Pass a signal to the children and wait until they have saved."""
        for child in self.children:
            child.process.send_signal(signum)
        names = ", ".join(child.step.name for child in self.children)
        if names:
            self.board.say(f"stopping: waiting for {names} to save")
        deadline = time.monotonic() + GRACE_S
        for child in self.children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()
            if child.process.returncode == 0:  # it was as good as done
                self._settle(child)
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
            "jobs": [step.summary() for step in self.steps],
        }
        write_json(self.root / SUMMARY, summary)
        self.written = states

    def _status(self) -> int:
        failed = [step.status for step in self.steps if step.state == "failed"]
        if not failed:
            return 0
        return 2 if all(status == 2 for status in failed) else 1


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


def cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def _end_with_parent() -> None:
    """In a new child: ask Linux for a SIGTERM should the suite be killed without a word."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
