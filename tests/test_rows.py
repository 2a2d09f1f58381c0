from pathlib import Path

import pytest

from benchmarks.jobs import plan
from benchmarks.rows import Row, close, describe, filled, find_rows, row_of, spread
from benchmarks.templates import load_suite
from convert.errors import UserError
from tests.small_sets import write_resnet18

SUITE = """
tables:
  v1 Table 1:
    MoCo R50: {task: linear, arch: resnet50, method: MoCo v1}
    MoCo R18: {task: linear, arch: resnet18}
    random: {task: linear, init: random}
jobs:
  pretrain: {command: python p.py, makes: {checkpoint: c}}
  convert: {command: "python c.py {checkpoint}", makes: {weights: w}, wants: {arch: resnet50}}
  voc: {command: "python v.py {seed} {start}", inits: {moco: "{weights}", random: "''"}, seeds: 2}
  linear: {command: "python l.py {start}", inits: {moco: "{checkpoint}", random: random}}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "s.yaml"
    path.write_text(SUITE)
    return str(path)


def checkpoints(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    return [folder / name for name in names]


def test_several_checkpoints_are_a_row_each_and_baselines_stay_single(file, tmp_path):
    rows = find_rows(checkpoints(tmp_path, "A.pth", "b c.pth.tar"))
    assert [row.name for row in rows] == ["a", "b-c"]
    suite, given = spread(load_suite(file), rows)
    steps = {step.name: step for step in plan(suite, given, tmp_path / "out")}
    assert set(steps) == {
        *("convert/a", "convert/b-c", "linear/a", "linear/b-c", "linear/random"),
        *(f"voc.{row}.seed{seed}" for row in ("a", "b-c", "random") for seed in (0, 1)),
        *("voc/a", "voc/b-c", "voc/random"),
    }
    assert steps["voc/a"].needs == ("voc.a.seed0", "voc.a.seed1")
    assert steps["voc.b-c.seed1"].needs == ("convert/b-c",)
    assert steps["linear/a"].job.command[-1] == "{checkpoint.a}"
    assert steps["linear/a"].key != steps["linear/b-c"].key
    owners = {name: row_of(step, rows) for name, step in steps.items()}
    assert {name for name, row in owners.items() if row == rows[1]} == {
        *("convert/b-c", "linear/b-c", "voc/b-c", "voc.b-c.seed0", "voc.b-c.seed1"),
    }
    assert owners["voc.random.seed0"] is None


def test_a_folder_stands_for_its_checkpoints_and_equal_names_get_their_folders(tmp_path):
    run = tmp_path / "run"
    checkpoints(run, "checkpoint_0001.pth.tar", "checkpoint_0000.pth.tar", "log.jsonl")
    assert [row.name for row in find_rows([run])] == ["checkpoint_0000", "checkpoint_0001"]
    other = checkpoints(tmp_path / "other", "checkpoint_0001.pth.tar")
    named = [row.name for row in find_rows([run, *other])]
    assert named == ["run-checkpoint_0000", "run-checkpoint_0001", "other-checkpoint_0001"]
    assert [row.name for row in find_rows(other)] == ["moco"]
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint_"):
        find_rows([tmp_path / "out"])
    with pytest.raises(UserError, match="is named twice"):
        find_rows([other[0], other[0]])


def test_what_a_checkpoint_does_not_fit_stays_open_and_is_listed(file, tmp_path):
    path = write_resnet18(tmp_path / "small.pth")
    rows = [Row("moco", path)]
    facts = {"moco": describe(path)}
    assert facts["moco"]["arch"] == "resnet18"
    suite, given = spread(load_suite(file), rows)
    steps = plan(suite, given, tmp_path / "out")
    close(steps, rows, facts)
    reasons = {step.name: step.reason for step in steps if step.state == "open"}
    assert reasons["convert"] == "wants arch resnet50; small.pth is resnet18"
    assert reasons["voc/moco"].startswith("needs voc.moco.seed0: needs convert: wants arch")
    assert set(reasons) == {"convert", "voc.moco.seed0", "voc.moco.seed1", "voc/moco"}
    assert [(row["row"], row["by"]) for row in filled(suite, facts)] == [
        ("MoCo R50", None),
        ("MoCo R18", "moco"),
        ("random", "random"),
    ]
    broken = checkpoints(tmp_path, "broken.pth")[0]
    with pytest.raises(UserError, match=r"broken\.pth"):
        describe(broken)


def test_the_batch_of_our_own_checkpoints_fills_a_row_that_wants_it(tmp_path):
    suite = load_suite("moco-v2")
    facts = {"arch": "resnet50", "method": "SimCLR", "epoch": 200, "training": {"batch_size": 256}}
    rows = [row for row in filled(suite, {"moco": facts}) if row["by"] == "moco"]
    assert [row["row"] for row in rows] == ["SimCLR, 200 epochs, batch 256"]
    assert not any(row["by"] == "moco" for row in filled(suite, {"moco": facts | {"training": {}}}))
