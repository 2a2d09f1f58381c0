import json

import pytest

from benchmarks.speed import features, heads

SMALL = ["--arch", "resnet18", "--image-size", "32", "--quiet", "--json", "--device", "cpu"]


def test_a_small_grid_is_timed_beside_one_head(capsys):
    words = ["--batch-size", "8", "--classes", "3", "--heads", "4", "--runs", "2"]
    assert heads.main([*SMALL, *words]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["heads"] == 4
    assert record["ratio"] == pytest.approx(record["grid_s"] / record["one_s"])
    assert min(record["grid_cpu_s"], record["one_cpu_s"]) > 0
    assert "goal 1.25 at 50 heads" in heads.table(record)


def test_a_small_extraction_is_timed_beside_the_plain_loop(capsys):
    assert features.main([*SMALL, "--images", "6", "--runs", "1"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fp32_difference"] < 1e-4 < record["bf16_difference"] < 0.1
    assert record["bf16_speedup"] == pytest.approx(record["plain_s"] / record["bf16_s"])
    assert "goal on a CPU: 1.8" in features.table(record)
