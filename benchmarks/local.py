"""Runs a suite's jobs as processes on this machine, packed on the GPUs or cores at hand.

Every child is a session of its own, so that a Ctrl-C on the terminal reaches it once, from us, and
its save is waited for. All of them hold the suite's lock, so that no second suite writes beside a
child that outlived a killed one; on Linux such a child is asked to save and end as well.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from benchmarks.jobs import Step
from convert.errors import UserError
from convert.files import ROOT

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass
class Process:
    """A job's process, and the GPUs that it has."""

    popen: subprocess.Popen[bytes]
    gpus: tuple[str, ...] = ()
    why: str = ""

    def status(self) -> int | None:
        """Return the exit status, negative where a signal ended it; None while it runs."""
        return self.popen.poll()

    def stop(self, signum: int) -> None:
        """Pass a signal on."""
        self.popen.send_signal(signum)

    def wait(self, seconds: float) -> None:
        """Wait until it has ended; what has not by then is killed with all its children."""
        try:
            self.popen.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()


@dataclass
class Local:
    """This machine.

    Attributes:
        parallel: how many jobs run at once.
        most: how many processes a job gets at most; None: as many as there are GPUs.
        variables: of the children's environment, beside ours.
        gpus: names of the GPUs at hand, as CUDA_VISIBLE_DEVICES has them.
        lock: file descriptor of the suite's lock, for the children to hold as well.
    """

    parallel: int
    most: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = field(default_factory=lambda: gpus_at_hand())
    lock: int = -1
    running: list[Process] = field(default_factory=list)

    stays = False  # a stop of the suite stops the jobs

    def describe(self) -> str:
        """Say where jobs run."""
        if self.gpus:
            return f"up to {self.parallel} at once on {len(self.gpus)} GPUs"
        return f"up to {self.parallel} at once on {cores()} cores"

    def processes(self, step: Step) -> int:
        """Say how many processes a job gets here: what it asks for, as far as GPUs reach."""
        return max(1, min(step.job.processes, self.most or len(self.gpus) or 1))

    def room(self, step: Step) -> bool:
        """Say whether a job can start now."""
        self.running = [process for process in self.running if process.status() is None]
        if len(self.running) >= self.parallel:
            return False
        return not self.gpus or not step.job.gpu or len(self._free()) >= self._gpus_of(step)

    def start(self, steps: Sequence[Step]) -> list[Process]:
        """Start jobs, each in its folder's log."""
        return [self._start(step) for step in steps]

    def find(self, step: Step) -> None:
        """Return a job's work that an earlier call has left: here, none outlives its suite.

        Raises:
            UserError: that call had put it into SLURM's queue, where it still is.
        """
        from benchmarks.slurm import left_in_queue

        if (job := left_in_queue(step)) is not None:
            raise UserError(
                f"{step.name}: is in SLURM's queue as job {job}; go on with --on slurm, or end it "
                f"first: scancel {job}"
            )

    def _start(self, step: Step) -> Process:
        gpus = self._free()[: self._gpus_of(step)] if step.job.gpu else ()
        with contextlib.ExitStack() as files:
            log: IO[bytes] = files.enter_context(step.log.open("ab"))
            log.write(f"$ {step.summary()['command']}\n".encode())
            log.flush()
            process = Process(
                subprocess.Popen(
                    launched(step.argv, self.processes(step), step.job.launches_itself),
                    cwd=ROOT,
                    env=self._environment(gpus, wants_gpu=step.job.gpu),
                    stdin=subprocess.DEVNULL,
                    stdout=files.enter_context(step.stdout.open("wb")) if step.stdout else log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(self.lock,) if self.lock >= 0 else (),
                    preexec_fn=_end_with_parent if sys.platform == "linux" else None,
                ),
                gpus,
            )
        self.running.append(process)
        return process

    def _gpus_of(self, step: Step) -> int:
        return min(self.processes(step), len(self.gpus))

    def _free(self) -> tuple[str, ...]:
        taken = {gpu for process in self.running for gpu in process.gpus}
        return tuple(gpu for gpu in self.gpus if gpu not in taken)

    def _environment(self, gpus: Sequence[str], *, wants_gpu: bool) -> dict[str, str]:
        # The same number whether or not a core is idle: sums in another order are other numbers.
        threads = str(max(1, cores() // self.parallel))
        ours = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        chosen = {VISIBLE: ",".join(gpus)} if self.gpus and wants_gpu else {}
        return ours | dict(os.environ) | dict(self.variables) | chosen  # what the user set stays


def launched(argv: Sequence[str], processes: int, launches_itself: bool) -> list[str]:
    """Return the words that start a job: torchrun's before it where it has several processes."""
    words = list(argv[1:])
    if processes > 1 and not launches_itself:
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        words = [*run, *words]
    return [sys.executable, *words]


def gpus_at_hand() -> tuple[str, ...]:
    """Name the GPUs that this process may use, without importing torch."""
    chosen = os.environ.get(VISIBLE)
    if chosen is not None:
        return tuple(word.strip() for word in chosen.split(",") if word.strip() not in ("", "-1"))
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(done.stdout.split()) if done.returncode == 0 else ()


def cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _end_with_parent() -> None:
    """In a new child: ask Linux for a SIGTERM should the suite be killed without a word."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
