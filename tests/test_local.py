import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.local import gpus_at_hand, launched
from convert.files import ROOT

# Notes its GPUs, when it began and ended, and its place among the job's processes.
NOTES = """
import os, pathlib, sys, time
out = pathlib.Path(sys.argv[1])
began = time.time()
time.sleep(0.6)
rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
(out / f"note{rank}").write_text(f"{gpus} {began} {time.time()} {size} {' '.join(sys.argv[2:])}")
"""


def run(tmp_path: Path, jobs: dict, *words: str, gpus: str, parallel: int = 8) -> dict[str, list]:
    (tmp_path / "notes.py").write_text(NOTES)
    for job in jobs.values():
        job["command"] = f"python {tmp_path}/notes.py {{output}} {job.get('command', '')}"
    suite = tmp_path / "s.yaml"
    suite.write_text(yaml.safe_dump({"parallel": parallel, "jobs": jobs}))
    out = tmp_path / "out"
    call = [sys.executable, str(ROOT / "benchmarks/suite.py"), "--suite", str(suite)]
    done = subprocess.run(
        [*call, "--output-dir", str(out), *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {f"{f.parent.name}{f.name[4:]}": f.read_text().split() for f in out.glob("*/note*")}


@pytest.mark.long
def test_jobs_share_the_gpus_and_none_has_anothers(tmp_path):
    jobs = {name: {} for name in "abcd"} | {"cpu": {"gpu": False}}
    notes = run(tmp_path, jobs, gpus="3,5")
    times = {name: (float(note[1]), float(note[2])) for name, note in notes.items()}
    assert {notes[name + "0"][0] for name in "abcd"} == {"3", "5"}
    for gpu in "35":
        turns = sorted(times[f"{n}0"] for n in "abcd" if notes[f"{n}0"][0] == gpu)
        assert len(turns) == 2
        assert turns[0][1] <= turns[1][0]  # one after the other
    assert times["cpu0"][0] < max(begin for begin, _ in times.values())  # it waits for no GPU
    assert notes["cpu0"][0] == "3,5"


def test_a_job_of_several_processes_has_a_gpu_each_through_torchrun_or_its_own_flag(tmp_path):
    jobs = {"many": {"processes": 8}, "own": {"processes": 8, "command": "{processes}"}}
    notes = run(tmp_path, jobs, gpus="0,1")
    assert {name: note[0] for name, note in notes.items()} == {
        "many0": "0,1",
        "many1": "0,1",
        "own0": "0,1",
    }
    assert [notes[f"many{rank}"][3] for rank in (0, 1)] == ["2", "2"]
    assert notes["own0"][3:] == ["1", "2"]


@pytest.mark.long
def test_without_gpus_a_job_is_one_process_unless_asked(tmp_path):
    notes = run(tmp_path, {"many": {"processes": 8}}, gpus="")
    assert list(notes) == ["many0"]
    summary = json.loads((tmp_path / "out/suite.json").read_text())
    assert summary["jobs"][0]["state"] == "done"
    assert launched(("python", "x.py"), 2, launches_itself=False)[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "x.py"),
    ]


@pytest.mark.parametrize(("named", "found"), [("", ()), ("-1", ()), ("2, 3", ("2", "3"))])
def test_gpus_are_those_that_the_user_left_visible(monkeypatch, named, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpus_at_hand() == found
