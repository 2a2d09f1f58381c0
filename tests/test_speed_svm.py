import json


def test_a_small_run_trains_the_same_machines_on_both_sides(script):
    words = ("--images", 60, "--width", 8, "--classes", 3, "--runs", 1, "--json")
    done = script("benchmarks/speed/svm.py", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (run,) = found["runs"]
    assert found["faster"] == run["loop_s"] / run["ours_s"]
    assert found["goal"] == 0.8 * found["cores"]


def test_sizes_that_mean_nothing_are_refused(script):
    done = script("benchmarks/speed/svm.py", "--images", 3)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
