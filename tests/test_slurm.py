import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from benchmarks.slurm import Task
from convert.files import ROOT, write_json

# Counts to `steps`, a step a tenth of a second; saves on SIGTERM and goes on from there.
COUNTS = """
import pathlib, signal, sys, time
out, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
saved = out / "saved"
done = int(saved.read_text()) if saved.exists() else 0
with (out / "starts").open("a") as file:
    file.write(f"{done} ")
def save(signum, frame):
    time.sleep(0.5)
    saved.write_text(str(done))
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
while done < steps:
    time.sleep(0.1)
    done += 1
    print(f"step {done}/{steps}", flush=True)
text = "".join(pathlib.Path(word).read_text() for word in sys.argv[3:] if "/" in word)
(out / "made.txt").write_text(f"{text}{out.name}{done} ")
"""


def reason_to_skip() -> str:
    if shutil.which("sbatch") is None:
        return "there is no SLURM here (sbatch); docs/slurm.md says how to get one on a machine"
    if importlib.util.find_spec("submitit") is None:
        return "submitit is not installed"
    up = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, timeout=30)
    return "" if {"idle", "mixed", "allocated"} & set(up.stdout.split()) else "no node is up"


@pytest.fixture
def slurm() -> None:
    if reason := reason_to_skip():
        pytest.skip(reason)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    return write(tmp_path, steps=3)


def write(tmp_path: Path, steps: int) -> Path:
    script = tmp_path / "counts.py"
    script.write_text(COUNTS)
    command = f"python {script} {{output}} {steps}"
    jobs = {name: {"command": command, "makes": {name: "made.txt"}} for name in "ab"}
    jobs["both/moco"] = {"command": f"{command} {{a}} {{b}} --resume"}
    jobs["a"]["command"] += " --resume"
    file = tmp_path / f"{steps}.yaml"
    file.write_text(yaml.safe_dump({"parallel": 2, "jobs": jobs}))
    return file


def call(suite: Path, out: Path, *words: str) -> list[str]:
    script = str(ROOT / "benchmarks/suite.py")
    return [sys.executable, script, "--suite", str(suite), "--output-dir", str(out), *words]


def run(suite: Path, out: Path, *words: str, status: int = 0) -> str:
    done = subprocess.run(call(suite, out, *words), capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def states(out: Path) -> dict[str, str]:
    jobs = json.loads((out / "suite.json").read_text())["jobs"]
    return {job["name"]: job["state"] for job in jobs}


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)


def job_of(out: Path, name: str) -> str:
    return str(json.loads((out / f"jobs/{name}.slurm.json").read_text()).get("job", ""))


def has_started(out: Path, name: str) -> bool:
    log = out / f"jobs/{name}.log"
    return log.exists() and "step 2/" in log.read_text()


def made(out: Path) -> dict[str, str]:
    return {f.parent.name: f.read_text() for f in out.rglob("made.txt")}


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_the_same_suite_in_the_queue_and_here_gives_the_same_numbers(suite, tmp_path):
    run(suite, tmp_path / "here")
    said = run(suite, tmp_path / "queue", "--on", "slurm", "--slurm", "time=10")
    assert "in SLURM's queue time=10" in said
    assert made(tmp_path / "queue") == made(tmp_path / "here")
    assert len(made(tmp_path / "here")) == 3
    assert job_of(tmp_path / "queue", "a").endswith("_0")  # one array of what can start together
    assert job_of(tmp_path / "queue", "b").endswith("_1")
    run(suite, tmp_path / "queue")  # what the queue finished is finished here too
    assert set(states(tmp_path / "queue").values()) == {"reused"}


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("way", ["warned", "requeued"])
def test_a_job_that_slurm_takes_away_saves_is_requeued_and_goes_on(tmp_path, way):
    suite, out = write(tmp_path, steps=60), tmp_path / "out"
    process = subprocess.Popen(
        call(suite, out, "--on", "slurm"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: has_started(out, "a"))
    job = job_of(out, "a")
    if way == "warned":  # as before a time limit or a preemption
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
    else:
        subprocess.run(["scontrol", "requeue", job], check=True)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    starts = [int(word) for word in (out / "a/starts").read_text().split()]
    assert len(starts) == 2
    assert 0 < starts[1] < 60  # it went on from what it had saved
    assert made(out)["moco"] == "a60 b60 moco60 "
    assert job_of(out, "a") == job  # the same job came again, and the suite did not notice
    assert json.loads((out / "jobs/a.json").read_text())["attempts"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_a_killed_suite_finds_its_jobs_in_the_queue_again(tmp_path):
    suite, out = write(tmp_path, steps=80), tmp_path / "out"
    process = subprocess.Popen(call(suite, out, "--on", "slurm"), stdout=subprocess.DEVNULL)
    wait_for(lambda: has_started(out, "a") and has_started(out, "b"))
    process.kill()
    process.wait()
    refused = run(suite, out, status=2)  # not beside them, in the same folders
    assert f"is in SLURM's queue as job {job_of(out, 'a')}" in refused
    (tmp_path / "counts.py").write_text(f"{COUNTS}# changed")
    refused = run(suite, out, "--on", "slurm", status=2)
    assert f"its inputs changed, and its old job {job_of(out, 'a')} is still in" in refused
    (tmp_path / "counts.py").write_text(COUNTS)
    said = run(suite, out, "--on", "slurm")
    assert "a: is running since an earlier call" in said
    assert (out / "a/starts").read_text() == (out / "b/starts").read_text() == "0 "
    assert set(states(out).values()) == {"done"}


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_a_cancelled_job_is_tried_once_more_and_then_reported(tmp_path):
    file = tmp_path / "s.yaml"
    script = tmp_path / "counts.py"
    script.write_text(COUNTS)
    file.write_text(yaml.safe_dump({"jobs": {"a": {"command": f"python {script} {{output}} 900"}}}))
    out = tmp_path / "out"
    process = subprocess.Popen(
        call(file, out, "--on", "slurm"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for attempt in (1, 2):
        wait_for(lambda: has_started(out, "a"))
        job = job_of(out, "a")
        subprocess.run(["scancel", job], check=True)
        if attempt == 1:
            (out / "jobs/a.log").unlink()
            wait_for(lambda: job_of(out, "a") not in ("", job))  # noqa: B023
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"SLURM job {job_of(out, 'a')} left the queue (cancelled)" in said
    assert states(out) == {"a": "failed"}


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_what_sbatch_refuses_is_one_line_and_the_next_call_goes_on(suite, tmp_path):
    said = run(suite, tmp_path / "out", "--on", "slurm", "--slurm", "partition=nowhere", status=2)
    assert "suite.py: --on slurm: sbatch refused a job: " in said
    assert "invalid partition" in said
    assert "Traceback" not in said
    run(suite, tmp_path / "out", "--on", "slurm")
    assert set(states(tmp_path / "out").values()) == {"done"}


def test_without_slurm_it_is_one_line(suite, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        call(suite, out, "--on", "slurm"),
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": "/nowhere"},
    )
    assert done.returncode == 2
    assert "--on slurm: found no sbatch" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def task(tmp_path: Path, token: str = "t") -> Task:
    script = tmp_path / "counts.py"
    script.write_text(COUNTS)
    write_json(tmp_path / "ticket.json", {"token": "t"})
    argv = ("python", str(script), str(tmp_path), "20")
    files = (tmp_path / "log", None, tmp_path / "ticket.json", tmp_path / "end.json")
    return Task(argv, 1, True, *files, token, {})


def test_a_task_tells_how_its_command_ended(tmp_path):
    assert task(tmp_path)() == 0
    told = json.loads((tmp_path / "end.json").read_text())
    assert (told["token"], told["status"]) == ("t", 0)
    assert "step 20/20" in (tmp_path / "log").read_text()


def test_a_task_that_was_submitted_again_does_nothing(tmp_path):
    assert task(tmp_path, token="older")() is None
    assert not (tmp_path / "end.json").exists()
    assert not (tmp_path / "log").exists()


def test_a_stopped_task_waits_for_its_commands_save_and_tells_nothing(tmp_path):
    code = (
        "import sys, pathlib; from tests.test_slurm import task; task(pathlib.Path(sys.argv[1]))()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    wait_for(lambda: (tmp_path / "log").exists() and "step 2/" in (tmp_path / "log").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert int((tmp_path / "saved").read_text()) >= 2
    assert not (tmp_path / "end.json").exists()
