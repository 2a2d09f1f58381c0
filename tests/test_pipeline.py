"""The walk of the whole road: the demo's own suite, every script for real, in a few minutes.

What is shortened is the length of each stage. A test asserts what the page of a whole demo has.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.jobs import SUITES
from convert.backbone import load_backbone
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

# Words added to the commands of benchmarks/suites/quick.yaml.
DETECTOR = "SOLVER.MAX_ITER 4 SOLVER.STEPS (3,) TEST.PRECISE_BN.NUM_ITER 1"
SHORTER = {
    "pretrain/main_moco.py": "--max-steps 6 print_freq 2 knn_every 0",
    "transfer/train_net.py": DETECTOR,
    "transfer/main_lincls.py": "epochs 2",
    "transfer/knn.py": "",
}


def shortened(tmp: Path) -> Path:
    suite = yaml.safe_load((SUITES / "quick.yaml").read_text(encoding="utf-8"))
    for job in suite["jobs"].values():
        for script, words in SHORTER.items():
            if script in job["command"]:
                job["command"] += f" {words}"
    file = tmp / "walk.yaml"
    file.write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
    return file


def run_suite(tmp: Path, file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks/suite.py", "--suite", file, "--output-dir", "out"]
    return subprocess.run(command, cwd=tmp, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    pytest.importorskip("detectron2")
    tmp = tmp_path_factory.mktemp("walk")
    file = shortened(tmp)
    done = run_suite(tmp, file)
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp, file, done.stdout


def test_every_job_of_the_demo_ran(walk):
    tmp, _, said = walk
    jobs = {job["name"]: job for job in json.loads((tmp / "out/suite.json").read_text())["jobs"]}
    assert len(jobs) == 10
    assert {job["state"] for job in jobs.values()} == {"done"}
    assert said.splitlines()[-1] == f"report: {tmp / 'out/report.html'}"


def test_the_checkpoint_is_the_references_and_all_of_it_landed(walk):
    tmp, *_ = walk
    (path,) = (tmp / "out/pretrain").glob("checkpoint_*.pth.tar")
    content = torch.load(path, weights_only=True)
    assert {"epoch", "arch", "state_dict", "optimizer"} <= content.keys()
    assert len(content["state_dict"]) == 646
    certificate = json.loads((tmp / "out/convert/certificate.json").read_text())
    assert certificate["tensors"]["landed"] == certificate["tensors"]["expected"] == 265
    assert certificate["method"] == "MoCo v2"
    for target in ("c4", "fpn"):
        assert certificate["proof"][target]["relative"] <= 1e-5


def test_every_measurement_has_its_record_and_its_baseline(walk):
    tmp, *_ = walk
    keys = {
        "coco": {f"coco/{kind}_{ap}" for kind in ("box", "mask") for ap in ("AP", "AP50", "AP75")},
        "voc": {"voc07/AP", "voc07/AP50", "voc07/AP75"},
        "linear": {"linear/top1", "linear/top5"},
        "knn": {"knn20/top1", "knn200/top1"},
    }
    sources = set()
    for task, wanted in keys.items():
        moco, random = (
            json.loads((tmp / f"out/{task}/{init}/results.json").read_text())
            for init in ("moco", "random")
        )
        assert wanted <= moco["metrics"].keys() == random["metrics"].keys()
        assert moco["fingerprint"] == random["fingerprint"]
        assert moco["environment"]["versions"]["detectron2"]
        assert moco["checkpoint"]["sha256"] != random["checkpoint"].get("sha256")
        assert len(moco["per_seed"]) == (3 if task in ("linear", "knn") else 1)
        sources.add(moco["checkpoint"]["sha256"])
        run = json.loads((tmp / "out/pretrain/run.json").read_text())
        told = moco["checkpoint"]["training"]
        assert (told["K"], told["m"], told["tau"]) == (run["K"], run["m"], run["tau"])
    (path,) = (tmp / "out/pretrain").glob("checkpoint_*.pth.tar")
    assert sources == {load_backbone(path).facts.sha256}


def test_the_page_shows_it_all_and_needs_nothing_else(walk):
    tmp, *_ = walk
    page = (tmp / "out/report.html").read_text(encoding="utf-8")
    for key in ("coco/box_AP", "coco/mask_AP50", "voc07/AP50", "linear/top1", "knn20/top1"):
        task = {"voc07": "voc", "knn20": "knn"}.get(key.split("/")[0], key.split("/")[0])
        for init in ("moco", "random"):
            record = json.loads((tmp / f"out/{task}/{init}/results.json").read_text())
            assert f"{record['metrics'][key]:.1f}" in page, key
    assert "265 of 265" in page
    assert "not comparable" in page
    assert not re.search(r"(src|href)=\"https?://[^\"]+\.(js|css|png)", page)
    assert page.count("data:image/png") >= 4  # detections of four detectors
    assert (tmp / "out/report.md").exists()
    assert json.loads((tmp / "out/report.json").read_text())


def test_a_second_time_nothing_runs_again(walk):
    tmp, file, _ = walk
    records = {path: path.stat().st_mtime_ns for path in tmp.rglob("results.json")}
    again = run_suite(tmp, file)
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tmp.rglob("results.json")} == records
    jobs = json.loads((tmp / "out/suite.json").read_text())["jobs"]
    assert {job["state"] for job in jobs} == {"reused"}
