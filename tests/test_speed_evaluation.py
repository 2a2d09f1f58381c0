import importlib.util
import json

import pytest

from benchmarks.speed.evaluation import table

HAS_FAST = importlib.util.find_spec("faster_coco_eval") is not None


@pytest.mark.skipif(not HAS_FAST, reason="needs faster-coco-eval")
def test_a_small_run_measures_both_and_finds_them_equal(script):
    words = ("--images", 6, "--detections", 20, "--runs", 1, "--kind", "segm", "--json")
    done = script("benchmarks/speed/evaluation.py", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] is True
    assert found["detections"] == 120
    assert 0 < found["AP"] < 100
    assert found["times"] == pytest.approx(found["pycocotools_s"] / found["faster-coco-eval_s"])
    assert "equal to the last bit" in table(found)


@pytest.mark.skipif(HAS_FAST, reason="faster-coco-eval is installed")
def test_without_the_fast_one_a_line_says_how_to_get_it(script):
    pytest.importorskip("pycocotools")
    words = ("--images", 2, "--detections", 2, "--runs", 1)
    done = script("benchmarks/speed/evaluation.py", *words)
    assert done.returncode == 2
    assert "pip install faster-coco-eval" in done.stderr.splitlines()[-1]
