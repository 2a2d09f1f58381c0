"""The demo's suite, its real scripts shortened, killed twice: the table of an unbroken run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from convert.files import ROOT

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

DETECTOR = {
    "SOLVER.MAX_ITER": "6",
    "SOLVER.STEPS": "(5,)",
    "TEST.PRECISE_BN.NUM_ITER": "1",
    "MOCO.CHECKPOINT_EVERY": "2",
}
OVERRIDES = {
    "pretrain": {"max_steps": "6", "print_freq": "2", "knn_every": "0", "checkpoint_every": "2"},
    "coco/*": DETECTOR,
    "voc/*": DETECTOR,
    "linear/*": {"epochs": "2"},
}
WORDS = [
    word
    for jobs, pairs in OVERRIDES.items()
    for key, value in pairs.items()
    for word in ("--override", jobs, key, value)
]


def start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, ROOT / "benchmarks/suite.py", "--output-dir", out, *WORDS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in listed.read_text().split()] if listed.exists() else []


def finished(out: Path) -> dict[str, int]:
    """The jobs that ended well, and when each was written down."""
    done = {}
    for file in (out / "jobs").rglob("*.json"):
        record = json.loads(file.read_text())
        if record["state"] == "done":
            done[record["name"]] = file.stat().st_mtime_ns
    return done


def table(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "report.json").read_text())["rows"]
    for row in rows:
        row["label"] = row["key"]  # not the name of a file
    return rows


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds a suite's jobs in /proc")
def test_the_demo_killed_twice_ends_in_the_table_of_an_unbroken_run(tmp_path):
    pytest.importorskip("detectron2")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert start(whole).wait() == 0, whole.with_suffix(".log").read_text()
    length = time.monotonic() - began
    draw = random.Random()
    moments = [draw.uniform(0.1, 0.6) * length for _ in range(2)]
    print(f"unbroken: {length:.0f} s; kills after {moments[0]:.1f} and {moments[1]:.1f} s")

    suite = start(out)
    time.sleep(moments[0])
    suite.kill()  # its jobs are told by the system, and save
    suite.wait()
    before = finished(out)

    suite = start(out)
    end = time.monotonic() + moments[1]
    while (time.monotonic() < end or not children(suite.pid)) and suite.poll() is None:
        time.sleep(0.05)
    victims = children(suite.pid)
    for victim in victims[:1]:
        os.kill(victim, signal.SIGKILL)  # the suite tries it once more
    assert suite.wait() == 0, out.with_suffix(".log").read_text()
    said = out.with_suffix(".log").read_text()
    assert victims == [] or "ended by SIGKILL" in said

    after = finished(out)
    assert before.items() <= after.items()  # nothing finished was run again
    assert len(after) == 10
    assert table(out) == table(whole)
