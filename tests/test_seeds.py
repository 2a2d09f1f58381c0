import json
from pathlib import Path

import pytest

from benchmarks.seeds import join
from convert.errors import UserError
from transfer.results import write_results


def record(folder: Path, seed: int, **changes: object) -> Path:
    values = {
        "task": "voc07",
        "per_seed": [{"voc07/AP50": 80.0 + seed}],
        "protocol": {"iterations": 24000},
        "config": {"SEED": seed},
        "checkpoint": {"name": "a", "sha256": "1"},
        "data": {"name": "VOC"},
        "started": 0.0,
    }
    write_results(folder / str(seed), **(values | changes))
    return folder / str(seed) / "results.json"


def test_seeds_of_one_protocol_become_one_row_with_its_spread(tmp_path):
    files = [record(tmp_path, seed) for seed in (0, 1, 2)]
    joined = join(tmp_path / "all", files)
    assert joined["metrics"] == {"voc07/AP50": 81.0}
    assert joined["spread"] == {"voc07/AP50": 1.0}
    assert joined["per_seed"] == [{"voc07/AP50": 80.0 + seed} for seed in (0, 1, 2)]
    first = json.loads(files[0].read_text())
    assert joined["fingerprint"] == first["fingerprint"]
    written = json.loads((tmp_path / "all/results.json").read_text())
    assert written["per_seed"] == joined["per_seed"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": {"iterations": 9000}}, "another iterations than"),
        ({"checkpoint": {"name": "b", "sha256": "2"}}, "another checkpoint"),
        ({"data": {"test": {"listing": "2"}}}, "another data.test than"),
        ({"per_seed": [{"voc07/AP": 1.0}]}, "other metrics"),
    ],
)
def test_what_is_not_one_row_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        join(tmp_path / "all", [record(tmp_path, 0), record(tmp_path, 1, **changes)])
    assert not (tmp_path / "all").exists()


def test_a_file_that_is_no_record_is_one_line(tmp_path):
    (tmp_path / "cut.json").write_text('{"task": ')
    with pytest.raises(UserError, match=r"cut\.json: cannot be read"):
        join(tmp_path / "all", [tmp_path / "cut.json"])


def test_the_same_seed_twice_is_no_spread(tmp_path):
    files = [record(tmp_path / folder, 1) for folder in ("a", "b")]
    with pytest.raises(UserError, match="two have the same seed"):
        join(tmp_path / "all", files)
