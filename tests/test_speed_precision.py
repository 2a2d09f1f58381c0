import json

import pytest
from PIL import Image

from benchmarks.speed.precision import last_tenth, table


def test_both_precisions_of_every_seed_are_trained_compared_and_drawn(script, tmp_path):
    words = "--steps 3 --seeds 2 --device cpu --quiet --output-dir out"
    words += " image_size 32 batch_size 16 K 32 workers 0"
    done = script("benchmarks/speed/precision.py", *words.split())
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/precision.json").read_text())
    for precision in ("fp32", "bf16"):
        assert [len(losses) for losses in record["losses"][precision]] == [3, 3]
        assert all(rate > 0 for rate in record["steps_per_s"][precision])
    fp32, bf16 = (record["losses"][precision] for precision in ("fp32", "bf16"))
    assert fp32[0] != fp32[1]
    for one, two in zip(fp32, bf16, strict=True):  # the same seed, the same images
        assert one != two
        assert one[0] == pytest.approx(two[0], abs=0.1)
    with Image.open(tmp_path / "out/precision.png") as picture:
        assert picture.width > 400
    assert "bf16 takes" in done.stdout


@pytest.mark.parametrize("words", [["--steps", "1"], ["--seeds", "0"], ["tempo", "3"]])
def test_what_cannot_be_compared_is_refused(script, words):
    done = script("benchmarks/speed/precision.py", *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_the_table_sets_the_gap_beside_the_seeds_spread():
    record = {
        "final_loss": {"fp32": [4.0, 4.2, 4.1], "bf16": [4.01, 4.18, 4.1]},
        "steps_per_s": {"fp32": [2.0, 2.0, 4.0], "bf16": [3.0, 4.0, 6.0]},
        "config": {"arch": "resnet18", "image_size": 64, "batch_size": 32, "iterations": 200},
        "environment": {"hardware": {"cpu": "a CPU", "cores": 2, "gpus": []}},
        "seeds": 3,
    }
    said = table(record)
    assert "+0.010, -0.020, +0.000; fp32's seeds lie 0.200 apart" in said
    assert "bf16 takes 1.50 times" in said
    assert last_tenth([9.0] * 18 + [1.0, 2.0]) == 1.5
