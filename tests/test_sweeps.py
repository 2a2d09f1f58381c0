import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.records import Record, read_record
from benchmarks.report import write_leaderboard
from benchmarks.sweeps import GRID, label_fractions, low_shot, sensitivity
from transfer.classification import grid

V2 = {"name": "v2.pth", "sha256": "aa", "method": "MoCo v2", "epoch": 200}


def put(folder: Path, metrics: dict[str, float], **protocol: Any) -> Record:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema": 2, "task": "t", "metrics": metrics, "protocol": protocol}
    (folder / "results.json").write_text(json.dumps(content | {"checkpoint": V2}))
    return read_record(folder / "results.json")


def outcome(source: str, lr: float, decay: float, top1: float) -> dict[str, Any]:
    return {"source": source, "lr": lr, "weight_decay": decay, "held_out_top1": top1}


def test_a_grid_is_a_curve_a_feature_at_its_best_decay(tmp_path):
    record = put(tmp_path, {"linear/top1": 60.0})
    assert sensitivity({"v2": [record]}) == {}
    outcomes = [outcome("res5", 1.0, 0.0, 50.0), outcome("res5", 0.1, 0.0, 40.0)]
    outcomes += [outcome("res5", 1.0, 1e-5, 55.0), outcome("res4", 1.0, 0.0, 30.0)]
    assert GRID == grid.FILE_NAME
    (tmp_path / GRID).write_text(json.dumps({"outcomes": outcomes}))
    found = sensitivity({"v2": [record]})
    assert found == {"v2, res4": [(1.0, 30.0)], "v2, res5": [(0.1, 40.0), (1.0, 55.0)]}
    (tmp_path / GRID).write_text('{"outcomes": [')
    assert sensitivity({"v2": [record]}) == {}


def test_low_shot_numbers_are_a_curve_over_images_a_class(tmp_path):
    metrics = {"voc07_svm/mAP": 80.0, "voc07_svm_k4/mAP": 60.0, "voc07_svm_k1/mAP": 40.0}
    record = put(tmp_path, metrics | {"voc07_svm_k1/mAP_std": 2.0, "voc07_svm_k1/top1": 3.0})
    assert low_shot({"v2": [record]}) == {"v2, voc07_svm mAP": [(1.0, 40.0), (4.0, 60.0)]}


@pytest.mark.parametrize(
    ("key", "values"),
    [("labels", ["1%", "10%", "all"]), ("MOCO.TRAIN_FRACTION", [0.01, 0.1, 1.0])],
)
def test_shares_of_the_labels_are_a_curve(tmp_path, key, values):
    records = [
        put(tmp_path / str(place), {"finetune/top1": 40.0 + place}, **{key: value})
        for place, value in enumerate(values)
    ]
    assert label_fractions({"v2": records[:1]}) == {}
    wanted = {"v2, finetune/top1": [(1.0, 40.0), (10.0, 41.0), (100.0, 42.0)]}
    assert label_fractions({"v2": records}) == wanted


def test_a_page_draws_them(tmp_path):
    for share, top1 in (("1%", 40.0), ("10%", 60.0)):
        put(tmp_path / "runs" / share, {"finetune/top1": top1}, labels=share)
    html = write_leaderboard([tmp_path / "runs"], tmp_path / "page").read_text()
    assert "The same evaluation with a share of the labels" in html
    assert "10" in (tmp_path / "page/figures/labels.svg").read_text()
