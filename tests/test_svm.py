import json
import re

import numpy as np
import pytest

from convert.errors import UserError
from tests.conftest import ROOT
from tests.small_sets import photographs, write_voc
from transfer import svm
from transfer.classification.svm import COSTS, SvmConfig, share_of
from transfer.classification.tags import ABSENT, PRESENT

SMALL = ["costs", ".01,1", "image_size", "32", "jobs", "1"]
PETS = [[("cat", 0)], [("dog", 0)], [("cat", 0), ("dog", 0)], []] * 8


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc") / "VOC2007", PETS).parent


def run(weights, images, out, *words):
    named = ["--pretrained", str(weights), "--output-dir", str(out), "--device", "cpu", "--quiet"]
    assert svm.main([str(images), *named, *SMALL, *map(str, words)]) == 0
    return json.loads((out / "results.json").read_text())


def test_voc_gives_map_and_the_low_shot_curve(weights, voc, tmp_path, capsys):
    record = run(weights, voc, tmp_path / "out", "low_shot", "1,4", "samples", "3")
    metrics = record["metrics"]
    assert list(metrics) == [
        "voc07_svm/mAP",
        "voc07_svm/mAP_11point",
        *(f"voc07_svm_k{k}/{m}" for k in (1, 4) for m in ("mAP", "mAP_std", "mAP_cost_by_test")),
    ]
    assert metrics["voc07_svm/mAP"] > 75  # colours: a random network sees them; chance is 50
    assert metrics["voc07_svm_k4/mAP"] <= metrics["voc07_svm_k4/mAP_cost_by_test"] + 1e-9
    assert record["data"]["train"]["images"] == 24
    assert (tmp_path / "out/low_shot.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("voc07_svm/mAP ")


def test_class_folders_give_top1_and_seeds_a_spread_that_repeats_exactly(weights, images, tmp_path):
    first = run(weights, images, tmp_path / "a", "--seeds", "3")
    again = run(weights, images, tmp_path / "b", "--seeds", "3")
    assert list(first["metrics"]) == ["svm/top1", "svm/mAP", "svm/mAP_11point"]
    assert first["metrics"]["svm/top1"] > 40  # chance is 33
    assert first["per_seed"] == again["per_seed"]
    assert max(first["spread"].values()) > 0
    assert "90%" in first["protocol"]["train"]


def test_processes_change_no_number(weights, voc, tmp_path):
    one = run(weights, voc, tmp_path / "a", "low_shot", "2", "samples", "2")
    two = run(weights, voc, tmp_path / "b", "low_shot", "2", "samples", "2", "jobs", "2")
    assert one["metrics"] == two["metrics"]
    assert one["fingerprint"] == two["fingerprint"]


def test_a_share_of_the_images_leaves_every_class_enough():
    tags = np.where(np.arange(100)[:, None] % 10 == np.arange(10), PRESENT, ABSENT)
    tags[:, 0] = ABSENT
    tags[[0, 50, 90], 0] = PRESENT
    for seed in range(20):
        kept = share_of(tags, 0.9, 3, seed)
        assert len(set(kept)) == len(kept) == 90
        assert (tags[kept] == PRESENT).sum(axis=0).min() >= 3
    assert len(share_of(tags, 0.9, 10, 0)) > 90  # where it must, it keeps more


def test_the_costs_are_the_papers():
    assert len(COSTS) == 26
    assert (COSTS[0], COSTS[-1]) == (1e-7, 100.0)
    assert {2.0**-19, 2.0**-4, 0.01, 0.1} <= set(COSTS)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["folds", "20"], "class 'blue' has 8 training images, and cross-validation in 20 folds"),
        (["low_shot", "1,9"], "class 'blue' has 8 training images, fewer than low_shot 9"),
        (["low_shot", "8"], "low_shot 8: no class has a training image more"),
        (["low_shot", "0"], "low_shot is 0, want at least 1"),
        (["costs", "0,1"], "costs is [0.0, 1.0], want numbers above 0"),
        (["folds", "1"], "folds is 1, want at least 2"),
        (["difficult", "often"], "difficult is 'often', want one of ignored, negative"),
        (["positive_weight", "nan"], "positive_weight is nan"),
        (["costs", "1,nan"], "costs is [1.0, nan], want numbers above 0"),
        (["--seed", "-1"], "seed is -1, want 0 or more"),
        (["cost", "1"], "unknown key 'cost'"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    weights, images, tmp_path, monkeypatch, words, line
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        svm.main([str(images), "--pretrained", str(weights), "image_size", "32", *words])
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_class_that_every_image_has_cannot_be_told_from_the_others(weights, tmp_path):
    folder = write_voc(tmp_path / "VOC2007", [[("cat", 0), ("dog", i % 2)] for i in range(16)])
    with pytest.raises(UserError, match="class 'cat' is absent from 0 training images, and cross"):
        run(weights, folder, tmp_path / "out")


def test_the_shipped_recipe_loads_with_the_papers_curve():
    from pretrain.config import load_config

    config = load_config(SvmConfig, ROOT / "configs/classification/svm_voc07.yaml")
    assert config.low_shot == (1, 2, 4, 8, 16, 32, 64, 96)
    assert (config.costs, config.folds, config.samples) == (COSTS, 3, 5)


def test_photographs_of_voc_are_judged(weights, tmp_path):
    words = ("folds", "2", "difficult", "negative")
    record = run(weights, photographs("voc_mini"), tmp_path / "out", *words)
    assert record["data"]["classes"] == 20
    assert 5 < record["metrics"]["voc07_svm/mAP"] < 60
