import json
import os

import pytest

from benchmarks.speed.convert import table, write_checkpoint
from convert.certificate import can_prove
from convert.files import environment


def test_a_small_run_measures_everything(script):
    done = script("benchmarks/speed/convert.py", "--runs", 1, "--small", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["convert_s"] < found["whole_s"]
    assert found["file_bytes"] > 2 * found["backbone_bytes"] > 80e6
    # The weights are read whole, once at least.
    assert found["convert_peak"] > found["backbone_bytes"]
    assert found["proved"] == can_prove()
    if found["proved"]:
        assert found["proved_peak"] > found["convert_peak"]


@pytest.mark.parametrize("proved", [True, False])
def test_the_table_sets_every_number_beside_its_goal(proved):
    record = {
        "arch": "resnet50",
        "runs": 3,
        "file_bytes": 258_000_000,
        "backbone_bytes": 94_000_000,
        "convert_s": 1.25,
        "convert_cpu_s": 1.5,
        "convert_peak": 300e6,
        "whole_s": 11.5,
        "whole_cpu_s": 14.0,
        "proved_peak": 500e6,
        "proved": proved,
        "environment": environment(),
    }
    lines = {line[:34].strip(): line[34:].split() for line in table(record).splitlines()}
    assert lines["recognise and convert, s (*)"] == ["1.25", "2.0"]
    assert ["300.00", "516.0"] in [line[34:].split() for line in table(record).splitlines()]
    assert ("704.0" in table(record)) == proved
    assert ("did not run" in table(record)) != proved
    assert f"{os.cpu_count()} cores" in table(record)


def test_the_file_is_as_large_as_the_releases_with_both_encoders(tmp_path):
    sizes = write_checkpoint(tmp_path / "ckpt.pth", "resnet50", 65536)
    assert 255e6 < sizes["file_bytes"] < 262e6
    assert 93e6 < sizes["backbone_bytes"] < 95e6
