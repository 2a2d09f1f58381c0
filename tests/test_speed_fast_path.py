import json

import pytest
from PIL import Image

from benchmarks.speed.fast_path import last_tenth, table


def test_both_paths_of_every_seed_are_trained_compared_and_drawn(script, tmp_path):
    words = "--steps 3 --seeds 2 --device cpu --quiet --output-dir out"
    words += " image_size 32 batch_size 16 K 32 workers 0"
    done = script("benchmarks/speed/fast_path.py", *words.split())
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/fast_path.json").read_text())
    for path in ("slow", "fast"):
        assert [len(losses) for losses in record["losses"][path]] == [3, 3]
        assert all(rate > 0 for rate in record["steps_per_s"][path])
    assert record["paths"]["slow"] == "fp32, views pillow"
    assert record["paths"]["fast"].endswith("views device")
    slow, fast = (record["losses"][path] for path in ("slow", "fast"))
    assert slow[0] != slow[1]
    for one, two in zip(slow, fast, strict=True):  # the same seed, the same images
        assert one != two
        assert one[0] == pytest.approx(two[0], abs=0.1)
    with Image.open(tmp_path / "out/fast_path.png") as picture:
        assert picture.width > 400
    assert "the fast path takes" in done.stdout


@pytest.mark.parametrize("words", [["--steps", "1"], ["--seeds", "0"], ["tempo", "3"]])
def test_what_cannot_be_compared_is_refused(script, words):
    done = script("benchmarks/speed/fast_path.py", *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_the_table_sets_the_gap_beside_the_seeds_spread():
    record = {
        "final_loss": {"slow": [4.0, 4.2, 4.1], "fast": [4.01, 4.18, 4.1]},
        "steps_per_s": {"slow": [2.0, 2.0, 4.0], "fast": [3.0, 4.0, 6.0]},
        "config": {"arch": "resnet18", "image_size": 64, "batch_size": 32, "iterations": 200},
        "environment": {"hardware": {"cpu": "a CPU", "cores": 2, "gpus": []}},
        "paths": {"slow": "fp32, views pillow", "fast": "bf16, views device"},
        "seeds": 3,
    }
    said = table(record)
    assert "+0.010, -0.020, +0.000; the slow path's seeds lie 0.200 apart" in said
    assert "the fast path takes 1.50 times" in said
    assert last_tenth([9.0] * 18 + [1.0, 2.0]) == 1.5
