import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from convert.files import ROOT

# Copies the checkpoint that it reads.
READS = "import sys, pathlib; t = pathlib.Path(sys.argv[2]).read_text();"
READS += "pathlib.Path(sys.argv[1], 'made.txt').write_text(t)"


def rows(out: Path) -> dict[str, str]:
    return {file.parent.name: file.read_text() for file in (out / "copy").glob("*/made.txt")}


def wait_for(out: Path, count: int) -> None:
    end = time.monotonic() + 40
    while len(rows(out)) < count:
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def add(run: Path, epoch: int) -> None:
    name = f"checkpoint_{epoch:04d}.pth.tar"
    (run / f".{name}").write_text(f"epoch {epoch}")
    (run / f".{name}").replace(run / name)


def test_each_new_checkpoint_of_a_run_becomes_a_row_until_the_run_ends(tmp_path):
    (tmp_path / "reads.py").write_text(READS)
    command = f"python {tmp_path}/reads.py {{output}} {{checkpoint}}"
    suite = tmp_path / "s.yaml"
    suite.write_text(yaml.safe_dump({"jobs": {"copy/moco": {"command": command}}}))
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    add(run, 0)
    words = [*map(str, (run, "--watch", "--suite", suite, "--output-dir", out))]
    call = [sys.executable, str(ROOT / "benchmarks/suite.py"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(call, **pipes)
    wait_for(out, 1)
    add(run, 1)
    (run / "checkpoint_0000.pth.tar").unlink()  # a pretraining keeps its last ones only
    wait_for(out, 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    add(run, 2)
    (run / "run.json").write_text(json.dumps({"checkpoint": "checkpoint_0002.pth.tar"}))
    again = subprocess.run(call, **pipes, timeout=60)
    assert again.returncode == 0, again.stderr
    assert rows(out) == {f"checkpoint_{i:04d}": f"epoch {i}" for i in range(3)}
    summary = json.loads((out / "suite.json").read_text())
    states = {job["name"]: job["state"] for job in summary["jobs"]}
    assert states["copy/checkpoint_0000"] == states["copy/checkpoint_0001"] == "reused"
    assert list(summary["checkpoints"]) == [f"checkpoint_{i:04d}" for i in range(3)]


def test_watching_wants_one_folder(tmp_path):
    words = ["--watch", "--output-dir", str(tmp_path / "out")]
    call = [sys.executable, str(ROOT / "benchmarks/suite.py"), *words]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--watch: found nothing, want the one folder" in done.stderr
    assert not (tmp_path / "out").exists()
