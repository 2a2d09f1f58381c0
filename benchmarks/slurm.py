"""Runs a suite's jobs in SLURM's queue, through submitit.

What is sent is a `Task`: it starts the job's command as a child. SLURM's warning before a time
limit or a preemption (SIGUSR2) becomes a SIGTERM for the child, whose save is waited for before
submitit puts the job into the queue again; there the script goes on by its own `--resume`.

How a job ended is told by a file of the task's own, `jobs/NAME.end.json`, so that no accounting
(sacct) is needed; `squeue` is asked only whether a job without that file is still known.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.jobs import Step
from benchmarks.local import launched
from convert.errors import UserError
from convert.files import ROOT, write_json

FOLDER = "slurm"  # below the output folder: submitit's own files and logs
POLL_S = 3.0
LOST_S = 15.0  # a shared disk may show a file this late
SAVE_S = 120  # before the end SLURM warns, for a child to save
TIMEOUTS = 1000  # how often a job may come again after its time limit
DAY_MIN = 24 * 60
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "TIMEOUT"),
}
GONE = -signal.SIGKILL


@dataclass
class Task:
    """What runs inside a SLURM job.

    Attributes:
        argv: the job's command, filled.
        processes: how many; launches_itself: whether the script starts them itself.
        log: where what it prints goes; stdout: the file for its standard output, if any.
        ticket: says which submission of the job is the last one; end: where it tells how it ended.
        token: of this submission.
        variables: of the child's environment.
    """

    argv: tuple[str, ...]
    processes: int
    launches_itself: bool
    log: Path
    stdout: Path | None
    ticket: Path
    end: Path
    token: str
    variables: Mapping[str, str]
    child: subprocess.Popen[bytes] | None = None
    stopped: bool = False

    def __call__(self) -> int | None:
        """Run the command and tell how it ended; None where it was stopped or is out of date."""
        if read(self.ticket).get("token") != self.token:
            return None  # it was submitted again, and this one forgotten
        started = time.monotonic()
        with contextlib.ExitStack() as files:
            log = files.enter_context(self.log.open("ab"))
            log.write(f"$ {' '.join(self.argv)}\n".encode())
            log.flush()
            self.child = subprocess.Popen(
                launched(self.argv, self.processes, self.launches_itself),
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=files.enter_context(self.stdout.open("wb")) if self.stdout else log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_ignore_warning,
            )
        signal.signal(signal.SIGTERM, self._pass_on)
        status = self._wait()
        if status != 0 and self.stopped:
            return None
        seconds = round(time.monotonic() - started, 1)
        write_json(self.end, {"token": self.token, "status": status, "seconds": seconds})
        return status

    def checkpoint(self) -> Any:
        """Let the child save and end; submitit calls this on SLURM's warning, then requeues."""
        from submitit.helpers import DelayedSubmission

        self._pass_on(signal.SIGTERM, None)
        self._wait()
        return DelayedSubmission(replace(self, child=None, stopped=False))

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        """Ask the child to save and end."""
        self.stopped = True
        if self.child is not None and self.child.returncode is None:
            self.child.send_signal(signal.SIGTERM)

    def _wait(self) -> int:
        # waitid without reaping: a signal's handler may wait for the child while we do.
        assert self.child is not None
        if self.child.returncode is None:
            os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return self.child.wait()

    def _environment(self) -> dict[str, str]:
        threads = os.environ.get("SLURM_CPUS_PER_TASK", "1")
        each = str(max(1, int(threads) // self.processes))
        ours = {"OMP_NUM_THREADS": each, "MKL_NUM_THREADS": each, "PYTHONUNBUFFERED": "1"}
        # torchrun and Detectron2 start processes of their own: they are not SLURM's tasks.
        theirs = {k: v for k, v in os.environ.items() if not k.startswith(("SUBMITIT_", "PMI"))}
        return ours | theirs | dict(self.variables)


@dataclass
class Queued:
    """A job in the queue."""

    place: "Slurm"
    job: str
    token: str
    end: Path
    why: str = ""
    lost_since: float | None = None

    def status(self) -> int | None:
        """Return the exit status that its task told; None while it waits or runs."""
        told = read(self.end)
        if told.get("token") == self.token:
            return int(told["status"])
        state = self.place.state(self.job)
        if state is not None and state not in ENDED:
            self.lost_since = None
            return None
        now = time.monotonic()
        self.lost_since = now if self.lost_since is None else self.lost_since
        if now - self.lost_since < LOST_S:
            return None
        self.why = f"SLURM job {self.job} left the queue ({(state or 'unknown').lower()})"
        return GONE

    def stop(self, signum: int) -> None:
        """Leave it: it goes on without the suite."""

    def wait(self, seconds: float) -> None:
        """Leave it: it goes on without the suite."""


@dataclass
class Slurm:
    """SLURM's queue.

    Attributes:
        root: the suite's output folder, on a disk that the nodes share.
        options: of sbatch, by submitit's names or SLURM's.
        most: how many processes a job gets at most.
        variables: of the jobs' environment.
    """

    root: Path
    options: Mapping[str, str]
    most: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    lock: int = -1
    asked: float = float("-inf")
    states: dict[str, str] = field(default_factory=dict)

    stays = True  # a stop of the suite leaves the jobs in the queue

    @classmethod
    def connect(
        cls, root: Path, words: Sequence[str], most: int | None, variables: Mapping[str, str]
    ) -> "Slurm":
        """Read `KEY=VALUE` words and make sure that SLURM and submitit are at hand.

        Raises:
            UserError: they are not, or a word is no pair.
        """
        options = {}
        for word in words:
            key, sign, value = word.partition("=")
            if not sign or not key:
                raise UserError(f"--slurm {word}: want KEY=VALUE, as in partition=gpu or time=600")
            options[key.replace("-", "_")] = value
        if options.get("nodes", "1") != "1":
            raise UserError(f"--slurm nodes={options['nodes']}: a job runs on one node")
        if shutil.which("sbatch") is None:
            raise UserError("--on slurm: found no sbatch; run this where SLURM's commands are")
        try:
            import submitit  # noqa: F401
        except ImportError as error:
            raise UserError("--on slurm: submitit is missing; pip install submitit") from error
        return cls(root, options, most, variables)

    def describe(self) -> str:
        """Say where jobs run."""
        said = " ".join(f"{key}={value}" for key, value in self.options.items())
        return f"in SLURM's queue {said}".rstrip()

    def processes(self, step: Step) -> int:
        """Say how many processes a job gets: what it asks for, or one where it has no GPUs."""
        without = self.options.get("gpus_per_node") == "0"
        return max(1, min(step.job.processes, self.most or (1 if without else step.job.processes)))

    def room(self, step: Step) -> bool:
        """Say that the queue takes any job."""
        return True

    def start(self, steps: Sequence[Step]) -> list[Queued]:
        """Submit jobs, those that want the same of a node as one array."""
        groups: dict[str, list[Step]] = {}
        for step in steps:
            wanted = json.dumps(self._wanted(step), sort_keys=True)
            groups.setdefault(wanted, []).append(step)
        works = {}
        for wanted, group in groups.items():
            tasks = [self._task(step) for step in group]
            for step, task in zip(group, tasks, strict=True):
                task.end.unlink(missing_ok=True)
                write_json(task.ticket, {"token": task.token, "key": step.key})
            jobs = self._submit(tasks, json.loads(wanted))
            for step, task, job in zip(group, tasks, jobs, strict=True):
                write_json(task.ticket, {"token": task.token, "key": step.key, "job": job})
                works[step.name] = Queued(self, job, task.token, task.end)
        self.asked = float("-inf")
        return [works[step.name] for step in steps]

    def find(self, step: Step) -> Queued | None:
        """Return a job that an earlier call left in the queue, or that has ended since.

        Raises:
            UserError: that job has other inputs than this one and is still in the queue.
        """
        ticket = read(ticket_of(step))
        if "job" not in ticket:
            return None
        if ticket.get("key") != step.key:
            if (job := left_in_queue(step)) is not None:
                raise UserError(
                    f"{step.name}: its inputs changed, and its old job {job} is still in SLURM's "
                    f"queue; end it first: scancel {job}"
                )
            return None
        if step.remembered().get("state") != "running":
            return None
        return Queued(self, str(ticket["job"]), str(ticket["token"]), end_of(step))

    def state(self, job: str) -> str | None:
        """Return what SLURM says of a job; None where it does not know it any more."""
        if time.monotonic() - self.asked > POLL_S:
            self.states, self.asked = queue(), time.monotonic()
        return self.states.get(job)

    def _task(self, step: Step) -> Task:
        return Task(
            argv=step.argv,
            processes=self.processes(step),
            launches_itself=step.job.launches_itself,
            log=step.log,
            stdout=step.stdout,
            ticket=ticket_of(step),
            end=end_of(step),
            token=uuid.uuid4().hex,
            variables=self.variables,
        )

    def _wanted(self, step: Step) -> dict[str, Any]:
        """Return what a job asks of a node; twice the forecast's time, as it may come again."""
        minutes = 60 + 2 * step.job.minutes if step.job.minutes else DAY_MIN
        wanted: dict[str, Any] = {"time": round(minutes), "signal_delay_s": SAVE_S}
        if step.job.gpu_gb and step.job.gpu:
            wanted["gpus_per_node"] = self.processes(step)
        return wanted

    def _submit(self, tasks: Sequence[Task], wanted: Mapping[str, Any]) -> list[str]:
        import submitit
        from submitit.core.utils import FailedJobError

        # submitit keeps its own words, SLURM's go through it as they are.
        known = submitit.SlurmExecutor._valid_parameters() - {"setup", "additional_parameters"}
        options: dict[str, Any] = dict(wanted) | {
            key: int(value) if value.isdecimal() else value for key, value in self.options.items()
        }
        if options.get("gpus_per_node") == 0:
            del options["gpus_per_node"]
        executor = submitit.SlurmExecutor(self.root / FOLDER, max_num_timeout=TIMEOUTS)
        executor.update_parameters(
            job_name=f"suite-{self.root.name}"[:60],
            nodes=1,
            ntasks_per_node=1,
            setup=[f"export PYTHONPATH={_quoted(ROOT)}:$PYTHONPATH"],
            additional_parameters={k: v for k, v in options.items() if k not in known},
            **{key: value for key, value in options.items() if key in known},
        )
        try:
            with executor.batch():
                jobs = [executor.submit(task) for task in tasks]
        except (FailedJobError, subprocess.CalledProcessError, OSError) as error:
            said = [line for line in str(error).splitlines() if "error" in line.lower()]
            reason = " ".join((said or str(error).splitlines() or ["no reason"])[-1].split())
            raise UserError(f"--on slurm: sbatch refused a job: {reason}") from error
        return [str(job.job_id) for job in jobs]


def ticket_of(step: Step) -> Path:
    """Return the file that says which SLURM job is this job's."""
    return step.record.with_suffix(".slurm.json")


def end_of(step: Step) -> Path:
    """Return the file by which a task tells how it ended."""
    return step.record.with_suffix(".end.json")


def left_in_queue(step: Step) -> str | None:
    """Return the SLURM job that an earlier call left, if it may still write to the folder."""
    ticket = read(ticket_of(step))
    if "job" not in ticket or read(end_of(step)).get("token") == ticket["token"]:
        return None
    if shutil.which("squeue") is None:
        return None
    job = str(ticket["job"])
    return job if queue().get(job, "COMPLETED") not in ENDED else None


def queue() -> dict[str, str]:
    """Return the state of each of the user's jobs that SLURM still knows."""
    words = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return _Unknown()
    if done.returncode:
        return _Unknown()
    pairs = (line.strip().partition("|") for line in done.stdout.splitlines())
    return {job: state for job, _, state in pairs}


class _Unknown(dict[str, str]):
    """What stands for the queue while SLURM does not answer: every job may be running."""

    def get(self, key: str, default: Any = None) -> Any:
        return "UNKNOWN"


def read(file: Path) -> dict[str, Any]:
    """Read a JSON file of ours; empty where there is none yet."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "'\\''") + "'"


def _ignore_warning() -> None:
    """In a new child: SLURM warns every process of a job, and this one is told by its parent."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
