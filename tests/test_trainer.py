"""Training of real detectors, narrow ones, on the embedded scenes, on the CPU."""

import dataclasses
import json
import os
import re
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

from convert import files
from convert.errors import UserError
from convert.files import ROOT
from tests import detector_processes
from tests.detectors import COCO, NARROW, VOC, load, narrow, plain_losses
from transfer import train_net
from transfer.detection import checkpoint, datasets, recipes, weights
from transfer.detection.trainer import Trainer, forget_lines


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


@pytest.fixture
def few(monkeypatch) -> None:
    """Read the first six images of every set: what is measured here are not the numbers."""
    real = datasets.load

    def load_few(*words: Any, **more: Any) -> datasets.Loaded:
        whole = real(*words, **more)
        return dataclasses.replace(whole, dicts=whole.dicts[:6])

    monkeypatch.setattr(datasets, "load", load_few)


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


def test_two_processes_hold_the_same_bits_and_compute_what_one_does(tmp_path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"folder": str(tmp_path), "processes": 2}))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "detector_processes.py", spec],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "found.pt")
    assert len(two["digests"]) == 5
    assert all(len(digests) == 2 and len(set(digests)) == 1 for digests in two["digests"])
    assert len({digests[0] for digests in two["digests"]}) == 5  # and they move
    before = torch.get_default_dtype()
    try:
        one = detector_processes.regress()
    finally:
        torch.set_default_dtype(before)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-9)
    assert len(set(one["losses"])) == 5
    for name, parameter in one["parameters"].items():
        assert parameter.allclose(two["parameters"][name], rtol=0, atol=1e-5), name


def test_a_batch_in_parts_equals_the_whole_one_where_norms_are_frozen(tmp_path) -> None:
    # Every anchor and proposal is sampled, and every image has as many: nothing is drawn, and
    # means over parts are means over the whole.
    everything = [
        *("MODEL.RESNETS.NORM", "FrozenBN", "INPUT.MIN_SIZE_TRAIN", "(64,)"),
        *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "1000", "MODEL.RPN.POSITIVE_FRACTION", "1.0"),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1000", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "8"),
        *("MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0", "SOLVER.IMS_PER_BATCH", "4"),
        *("SOLVER.MAX_ITER", "4", "SOLVER.BASE_LR", "0.003"),
    ]
    losses, weighed = [], []
    for parts in ("1", "2"):
        cfg = narrow(VOC, *everything, "MOCO.ACCUMULATE", parts)
        ours = trainer(cfg, tmp_path / parts)
        alike = [d for d in ours._data.dicts if len(d["annotations"]) == 2]
        ours._data = dataclasses.replace(ours._data, dicts=alike)
        ours.train_from(None)
        losses.append(list(logged(tmp_path / parts, "total_loss").values()))
        weighed.append(dict(ours.detector.named_parameters()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(set(losses[0])) == 4
    for name, parameter in weighed[0].items():
        assert parameter.allclose(weighed[1][name], atol=1e-5), name


def test_a_signal_to_two_processes_saves_and_resume_goes_on(tmp_path) -> None:
    words = ("SOLVER.MAX_ITER", 4000, "SOLVER.CHECKPOINT_PERIOD", 0, "--num-gpus", 2)
    process = start(tmp_path / "out", *words, "--dist-url", "auto")
    until_exists(tmp_path / "out" / "metrics.json", process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert err.splitlines()[-1] == "train_net.py: stopped by SIGTERM"
    assert "Traceback" not in err
    (state,) = checkpoint.list_states(tmp_path / "out")
    done = torch.load(state)["next_iteration"]
    assert 0 < done < 4000
    with pytest.raises(UserError, match=r"took a batch in 2 parts .*now 1; choose them"):
        run(tmp_path / "out", *words[:-2], "--resume", "MODEL.RESNETS.NORM", "naiveSyncBN")


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path, monkeypatch) -> None:
    real = files.io.FileIO

    def full(path: Path, mode: str) -> Any:
        later = "0000004" in str(path)
        return real("/dev/full" if later else path, mode)

    monkeypatch.setattr(files.io, "FileIO", full)
    with pytest.raises(UserError, match=r"checkpoint_0000004\.pth: the disk is full"):
        run(tmp_path / "out", "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2)
    (kept,) = checkpoint.list_states(tmp_path / "out")
    assert torch.load(kept)["next_iteration"] == 2
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_what_a_run_says_of_itself_before_and_after_five_iterations(tmp_path, capsys) -> None:
    ours = trainer(narrow(VOC, "SOLVER.MAX_ITER", "7"), tmp_path)
    ours._quiet = False
    ours.train_from(None)
    out = capsys.readouterr().out
    assert re.search(
        r"^speed: \d+\.\d\d s an iteration, about 0\.\d minutes left; memory", out, re.M
    )
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_resumed_log_has_every_iteration_once(tmp_path) -> None:
    lines = [{"iteration": i, "total_loss": 1.0} for i in range(5)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 5, "tot'
    (tmp_path / "metrics.json").write_text(text)
    forget_lines(tmp_path / "metrics.json", 3)
    assert list(logged(tmp_path, "total_loss")) == [0, 1, 2]


def test_bf16_leaves_naive_sync_bn_its_variance() -> None:
    cfg = load(VOC, "MODEL.RESNETS.NORM", "naiveSyncBN", "MOCO.PRECISION", "bf16")
    norm = next(
        m for m in weights.build_detector(cfg).modules() if type(m).__name__ == "NaiveSyncBatchNorm"
    )
    kinds: list[torch.dtype] = []
    norm.register_forward_pre_hook(lambda _, given: kinds.append(given[0].dtype))
    assert norm(torch.randn(2, norm.num_features, 4, 4).bfloat16()).dtype == torch.bfloat16
    assert kinds == [torch.float32]


def test_channels_last_changes_how_weights_lie_and_not_what_they_give(tmp_path) -> None:
    found = []
    for switch in ("False", "True"):
        cfg = narrow(VOC, "SOLVER.MAX_ITER", "2", "MOCO.CHANNELS_LAST", switch)
        ours = trainer(cfg, tmp_path / switch)
        weight = ours.detector.backbone.res2[0].conv2.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == (switch == "True")
        ours.train_from(None)
        found.append(list(logged(tmp_path / switch, "total_loss").values()))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "metrics"),
    [
        ("voc_R50_C4_24k_random", ["voc07/AP"]),
        ("coco_R50_C4_1x_random", ["coco/box_AP", "coco/mask_AP"]),
        ("coco_R50_FPN_1x_random", ["coco/box_AP", "coco/mask_AP"]),
        ("coco_R50_FPN_4conv1fc_1x_random", ["coco/box_AP", "coco/mask_AP"]),
    ],
)
def test_every_architecture_trains_and_is_measured(tmp_path, few, recipe: str, metrics) -> None:
    data = "voc_trainval voc_test" if recipe.startswith("voc") else "coco_train coco_val"
    train, test = (f"('embedded_{name}',)" for name in data.split())
    words = [
        *(
            "--config",
            ROOT / "configs" / f"{recipe}.yaml",
            "--quiet",
            "OUTPUT_DIR",
            tmp_path / "out",
        ),
        *("MODEL.DEVICE", "cpu", *NARROW, "DATASETS.TRAIN", train, "DATASETS.TEST", test),
        *("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "MODEL.ROI_HEADS.NUM_CLASSES", 1),
        *("DATALOADER.NUM_WORKERS", 0, "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
        *("MODEL.ROI_BOX_HEAD.CONV_DIM", 32, "MODEL.FPN.OUT_CHANNELS", 32),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
    ]
    assert train_net.main([str(word) for word in words]) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(metrics) <= record["metrics"].keys()
    assert len(logged(tmp_path / "out", "total_loss")) == 2
