"""Training of real detectors, narrow ones, on the embedded scenes, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from convert.errors import Stopped, UserError
from convert.files import ROOT
from tests.detectors import COCO, NARROW, VOC, load, narrow, plain_losses
from transfer import train_net
from transfer.detection import checkpoint, datasets, recipes, weights
from transfer.detection.trainer import Trainer


def batch(cfg: CfgNode) -> list[dict[str, Any]]:
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 50.0]]))
    instances.gt_classes = torch.tensor([0])
    instances.gt_masks = PolygonMasks([[np.array([8.0, 8, 40, 8, 40, 50, 8, 50])]])
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    return [{"image": image, "instances": instances, "height": 64, "width": 64}]


@pytest.mark.parametrize("precision", recipes.PRECISIONS)
def test_a_step_trains_the_whole_detector_in_float32_parameters(precision: str) -> None:
    cfg = load(COCO, "MOCO.PRECISION", precision)
    built = weights.build_detector(cfg).train()
    kinds: list[torch.dtype] = []
    watch = built.backbone.stem.conv1.register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    with EventStorage():
        losses = built(batch(cfg))
    watch.remove()
    sum(losses.values()).backward()
    without = [name for name, p in built.named_parameters() if p.grad is None]
    assert without == []
    assert {p.dtype for p in built.parameters()} == {torch.float32}
    assert kinds == [torch.bfloat16 if precision == "bf16" else torch.float32]


def trainer(cfg: CfgNode, folder: Path) -> Trainer:
    cfg.OUTPUT_DIR = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.SEED)
    data = datasets.load(cfg.DATASETS.TRAIN, training=True)
    return Trainer(cfg, weights.build_detector(cfg), data, {"name": "random"}, quiet=True)


def logged(folder: Path, key: str) -> dict[int, float]:
    lines = [json.loads(x) for x in (folder / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line[key] for line in lines if key in line}


def test_losses_are_those_of_detectron2s_plain_loop(tmp_path) -> None:
    cfg = narrow(COCO, "SOLVER.MAX_ITER", "20", "MODEL.RESNETS.NORM", "BN")
    ours = trainer(cfg, tmp_path)
    ours.train_from(None)
    found = logged(tmp_path, "total_loss")
    assert [found[i] for i in range(20)] == pytest.approx(plain_losses(cfg, 20), abs=1e-5)


def run(folder: Path, *words: object) -> Path:
    """Run the script's main here, on the embedded VOC scenes."""
    pairs = ["OUTPUT_DIR", str(folder), "MODEL.DEVICE", "cpu", *NARROW, *map(str, words)]
    assert train_net.main(["--config", str(VOC), "--quiet", *pairs]) == 0
    return folder


def start(folder: Path, *words: object) -> subprocess.Popen[str]:
    """Start the same in a process of its own."""
    pairs = ["OUTPUT_DIR", str(folder), "MODEL.DEVICE", "cpu", *NARROW, *map(str, words)]
    return subprocess.Popen(
        [sys.executable, ROOT / "transfer" / "train_net.py", "--config", VOC, "--quiet", *pairs],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until_exists(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert file.exists(), process.communicate()


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (torch.load(f / "model_final.pth")["model"] for f in (one, other))
    assert first.keys() == second.keys()
    differ = [key for key in first if not first[key].equal(second[key])]
    assert differ == []


# Evaluations, each after recomputed statistics, come after iterations 3 and 6.
EVALUATED = ("SOLVER.MAX_ITER", 9, "TEST.EVAL_PERIOD", 3, "SOLVER.CHECKPOINT_PERIOD", 2)


def test_a_killed_run_resumed_ends_in_the_bits_of_one_that_never_stopped(tmp_path) -> None:
    process = start(tmp_path / "killed", *EVALUATED, "DATALOADER.NUM_WORKERS", 1)
    until_exists(tmp_path / "killed/checkpoint_0000004.pth", process)
    process.kill()
    process.communicate()
    (state,) = checkpoint.list_states(tmp_path / "killed")
    assert not (tmp_path / "killed/model_final.pth").exists()
    killed = run(tmp_path / "killed", *EVALUATED, "--resume")
    whole = run(tmp_path / "whole", *EVALUATED)
    assert_same_weights(whole, killed)
    assert logged(whole, "total_loss") == logged(killed, "total_loss")
    assert logged(whole, "voc07/AP") == logged(killed, "voc07/AP")
    assert list(logged(whole, "voc07/AP")) == [2, 5]
    assert state.name == "checkpoint_0000004.pth"
