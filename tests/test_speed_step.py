import json

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

SMALL = "--size 32 --batch-size 16 --steps 1 --rounds 2 --device cpu --workers 0 --quiet --json"
KEYS = "arch resnet18 K 32"


@pytest.mark.parametrize("photographs", [False, True])
def test_all_contenders_take_their_rounds_from_files_or_without(script, tmp_path, photographs):
    words = [*SMALL.split(), "--profile"]
    if photographs:
        Image.fromarray(load_sample_images().images[0]).save(tmp_path / "photograph.jpg")
        words += ["--photographs", str(tmp_path)]
    done = script("benchmarks/speed/step.py", *words, *KEYS.split())
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["end_to_end"] is photographs
    assert {"reference", "ours"} <= set(record["contenders"])
    for found in record["contenders"].values():
        assert len(found["rounds"]) == 2
        assert found["images_per_s"] > 0
        assert 100 < found["host_MiB"] < 10_000
    assert record["contenders"]["reference"]["ratio"] == 1
    assert sum(record["profile"].values()) < 100
    assert any("convolution" in name for name in record["profile"])


def test_an_unknown_contender_is_refused(script):
    done = script("benchmarks/speed/step.py", "--contenders", "our")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("there is no 'our'; try ours")
