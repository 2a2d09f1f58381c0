import json

import pytest

pytest.importorskip("detectron2")

from benchmarks.speed.detection import PLAIN, VARIANTS, table
from convert.files import environment
from tests.detectors import NARROW


def test_a_small_run_measures_every_variant_beside_the_plain_recipe(script):
    words = ["--rounds", 1, "--iterations", 1, "--json", *NARROW[2:]]
    done = script("benchmarks/speed/detection.py", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["images_per_s"]) == list(VARIANTS)
    assert min(found["images_per_s"].values()) > 0
    assert found["ratio"][PLAIN] == 1


def test_the_table_sets_every_variant_beside_the_plain_recipe():
    rates = dict.fromkeys(VARIANTS, 2.0) | {"ours, bf16": 5.0}
    ratios = {name: rate / 2 for name, rate in rates.items()}
    record = {"config": "x.yaml", "opts": [], "workers": 0, "images_per_s": rates, "ratio": ratios}
    text = table(record | {"environment": environment()})
    (line,) = [line for line in text.splitlines() if line.startswith("ours, bf16  ")]
    assert line.split()[-2:] == ["5.00", "2.50"]
    assert "goal: 1.5" in text
