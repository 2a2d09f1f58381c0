import json


def test_a_small_run_finds_the_same_neighbours_by_every_way(script):
    words = ("--bank", 300, "--queries", 40, "--widths", "8,16", "-k", 5, "--runs", 1, "--json")
    done = script("benchmarks/speed/knn.py", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["widths"]
    assert set(found) == {"8", "16"}
    assert {"bare", "ours", "scikit-learn"} <= set(found["8"])
    assert all(way["wall_s"] > 0 for width in found.values() for way in width.values())


def test_sizes_that_mean_nothing_are_refused(script):
    done = script("benchmarks/speed/knn.py", "--bank", 3)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
