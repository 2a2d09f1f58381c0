import subprocess
import sys

import pytest

from benchmarks.jobs import SUITES
from benchmarks.templates import load_suite
from convert.files import ROOT
from convert.released import find, place

MSRA = find("msra_resnet50")
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
SUITE = ROOT / "benchmarks/suite.py"


@pytest.mark.parametrize("name", ["moco-v1", "moco-v2", "detection", "classification"])
def test_a_papers_suite_says_without_data_what_is_missing_and_where_it_belongs(name, tmp_path):
    words = ["--suite", name, "--dry-run", "--data", f"datasets={tmp_path}"]
    done = subprocess.run([sys.executable, SUITE, *words], **PIPES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lost = "ImageSets/Main/trainval.txt, ImageSets/Main/test.txt, Annotations, JPEGImages"
    assert f"missing: PASCAL VOC 2007: in {tmp_path}/VOC2007 4 of 4 missing: {lost}" in done.stdout
    if name != "detection":
        assert "missing: ImageNet-1k, one folder a class: name the folder by" in done.stdout
    assert "row: v" in done.stdout
    assert "would run" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_suite_takes_over_the_jobs_and_tables_of_its_bases():
    base, suite = load_suite("detection"), load_suite("moco-v1")
    names = [job.name for job in suite.jobs]
    assert names[: len(base.jobs)] == [job.name for job in base.jobs]
    assert {"linear/moco", "semseg-voc12/moco", "semseg-cityscapes/random"} <= set(names)
    assert suite.title != base.title
    assert set(suite.tables) > {*base.tables, "v1 Table 1"}
    assert suite.costs == base.costs


def test_lvis_and_cityscapes_are_measured_from_every_start_and_lvis_with_frozen_norms_too():
    names = {job.name for job in load_suite("moco-v1").jobs}
    for init in ("moco", "supervised", "random"):
        assert {f"lvis-1x/{init}", f"lvis-2x/{init}", f"cityscapes-24k/{init}"} <= names
    assert {"lvis-1x/frozen", "lvis-2x/frozen"} <= names


def test_voc_is_five_trials_of_each_start():
    names = {job.name for job in load_suite("moco-v2").jobs}
    for init in ("moco", "supervised", "random"):
        assert {f"voc-c4-24k.{init}.seed{seed}" for seed in range(5)} <= names
        assert f"voc-c4-24k/{init}" in names


@pytest.mark.parametrize("file", sorted(SUITES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_suites_rows_name_tasks_that_it_measures(file):
    suite = load_suite(file.stem)
    tasks = {job.name.split("/")[0] for job in suite.jobs if "/" in job.name}
    for rows in suite.tables.values():
        for facts in rows.values():
            for task in facts["task"].split(", "):
                assert any(task == known or known.startswith(f"{task}-") for known in tasks), task


def test_a_dry_run_shows_trials_once_and_names_the_weights_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCO_TRANSFER_CACHE", str(tmp_path))
    words = ["--suite", "moco-v2", "--dry-run", "--data", f"datasets={tmp_path}"]
    done = subprocess.run([sys.executable, SUITE, *words], **PIPES, cwd=tmp_path)
    assert "open: voc-c4-24k.supervised.seed0 to seed4 (each), about 3.6 h" in done.stdout
    assert "seed3" not in done.stdout
    assert "--seed * OUTPUT_DIR {output} MODEL.WEIGHTS ''\n" in done.stdout
    assert f"fetched first: msra_resnet50, from {MSRA.address}, into {place(MSRA)}" in done.stdout
    place(MSRA).parent.mkdir()
    place(MSRA).touch()
    done = subprocess.run([sys.executable, SUITE, *words], **PIPES, cwd=tmp_path)
    assert "fetched first" not in done.stdout
