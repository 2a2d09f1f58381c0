from pathlib import Path

import pytest
import yaml

from benchmarks.jobs import Suite, plan
from benchmarks.templates import Override, load_suite
from convert.errors import UserError

VOC = {
    "voc": {
        "command": "python transfer/train_net.py --config configs/voc_{init}.yaml --seed {seed} "
        "OUTPUT_DIR {output} MODEL.WEIGHTS {start}",
        "inits": {"moco": "{weights}", "random": "''"},
        "seeds": 2,
        "processes": 8,
    },
    "convert": {"command": "python c.py {checkpoint} {output}", "makes": {"weights": "w.pkl"}},
}


def load(tmp_path: Path, jobs: dict, *overrides: Override, seeds: int | None = None) -> Suite:
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({"jobs": jobs}, sort_keys=False))
    return load_suite(str(file), overrides, seeds)


def test_a_template_stands_for_each_start_and_seed_and_joins_the_seeds(tmp_path):
    jobs = {job.name: job for job in load(tmp_path, VOC).jobs}
    seeds = ["voc.moco.seed0", "voc.moco.seed1", "voc.random.seed0", "voc.random.seed1"]
    assert list(jobs) == [*seeds[:2], "voc/moco", *seeds[2:], "voc/random", "convert"]
    words = jobs["voc.random.seed1"].command
    assert words[3:6] == ("configs/voc_random.yaml", "--seed", "1")
    assert words[-2:] == ("MODEL.WEIGHTS", "")
    joined = jobs["voc/moco"]
    assert joined.command[1:] == (
        *("benchmarks/seeds.py", "{output}", "{voc.moco.seed0}", "{voc.moco.seed1}"),
    )
    assert not joined.gpu
    given = tmp_path / "c.pth"
    given.touch()
    steps = {s.name: s for s in plan(load(tmp_path, VOC), {"checkpoint": given}, tmp_path)}
    assert steps["voc/moco"].needs == ("voc.moco.seed0", "voc.moco.seed1")
    assert steps["voc.moco.seed0"].needs == ("convert",)
    assert steps["voc.random.seed0"].needs == ()


def test_one_seed_is_one_job_and_a_script_may_repeat_itself(tmp_path):
    assert [job.name for job in load(tmp_path, VOC, seeds=1).jobs] == [
        *("voc/moco", "voc/random", "convert"),
    ]
    command = "python l.py --seeds {seeds}"
    own = load(tmp_path, {"l/moco": {"command": command, "seeds": 5}})
    assert own.jobs[0].command == ("python", "l.py", "--seeds", "5")
    fewer = load(tmp_path, {"l/moco": {"command": command, "seeds": 5}}, seeds=2)
    assert fewer.jobs[0].command[-1] == "2"


def test_an_override_goes_to_the_runs_of_a_seed_and_marks_the_joined_row(tmp_path):
    override = Override("voc/*", "SOLVER.MAX_ITER", "2")
    jobs = {job.name: job for job in load(tmp_path, VOC, override).jobs}
    assert jobs["voc.moco.seed1"].command[-2:] == ("SOLVER.MAX_ITER", "2")
    assert "SOLVER.MAX_ITER" not in jobs["voc/moco"].command
    assert jobs["voc/moco"].reduced == jobs["voc.moco.seed0"].reduced == {"SOLVER.MAX_ITER": "2"}
    assert jobs["convert"].reduced == {}
    with pytest.raises(UserError, match="--override vic: fits no job; jobs are voc/moco"):
        load(tmp_path, VOC, Override("vic", "A", "1"))


def test_without_a_checkpoint_only_what_needs_one_stays_open(tmp_path):
    steps = {step.name: step for step in plan(load(tmp_path, VOC), {}, tmp_path)}
    assert steps["convert"].reason == "wants a checkpoint on the command line"
    assert steps["voc.moco.seed0"].reason.startswith("needs convert: wants a checkpoint")
    assert steps["voc/moco"].state == "open"
    assert steps["voc/random"].state == steps["voc.random.seed0"].state == "waits"
