import json

import pytest

SMALL = "--size 32 --steps 1 --rounds 1 --batches 16 --files 300,600 --device cpu --quiet"
OF = "dictionary,files"
KEYS = "arch resnet18 batch_size 16 K 64"


def test_dictionaries_and_listings_are_measured(script):
    done = script("benchmarks/speed/growth.py", *SMALL.split(), "--of", OF, "--json", *KEYS.split())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["found"]
    assert [*found["dictionary"]] == ["queue, batch 16", "end-to-end, batch 16"]
    for row in found["dictionary"].values():
        assert row["images_per_s"] > 0
        assert row["host_MiB"] > 100
    files = found["files"]["600 files"]
    assert min(files["list_again_s"], files["list_s"], files["first_batch_s"]) > 0
    assert files["million_s"] == pytest.approx(files["list_s"] * 1e6 / 600)


@pytest.mark.long
def test_runs_on_several_processes_are_measured(script):
    words = (
        "--size 32 --steps 1 --rounds 1 --of processes --processes 1,2 --device cpu --quiet --json"
    )
    done = script("benchmarks/speed/growth.py", *words.split(), *KEYS.split())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["found"]["processes"]
    assert [*found] == ["1 processes", "2 processes"]
    assert all(row["images_per_s"] > 0 for row in found.values())


@pytest.mark.parametrize("words", [["--of", "keys"], ["--K", "many"], ["--batches", "0"]])
def test_what_cannot_grow_is_refused(script, words):
    done = script("benchmarks/speed/growth.py", *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
