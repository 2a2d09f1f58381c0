"""moco-v2 on a few photographs and iterations: whole, and every number marked as reduced."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convert.backbone import load_backbone
from convert.files import ROOT
from convert.names import to_detectron2
from convert.released import find

SHARED = ROOT.parent / "shared" / "data"  # small photo sets beside the checkout; not ours to commit
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

# As benchmarks/README.md has them.
OVERRIDES = {
    "voc*": {
        "SOLVER.MAX_ITER": "2",
        "SOLVER.STEPS": "(1,)",
        "SOLVER.IMS_PER_BATCH": "2",
        "SOLVER.BASE_LR": "0.0025",
        "TEST.PRECISE_BN.NUM_ITER": "1",
        "INPUT.MIN_SIZE_TRAIN": "(128,)",
        "INPUT.MIN_SIZE_TEST": "96",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "4",
        "MODEL.RPN.POST_NMS_TOPK_TEST": "4",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": "7",
        "DATALOADER.NUM_WORKERS": "0",
    },
    "linear/*": {"epochs": "2", "schedule": "[1]", "batch_size": "16", "image_size": "64"},
}


def voc(folder: Path, trainval: int, test: int) -> None:
    """A VOC folder of a few photographs of the small set."""
    small = SHARED / "voc_mini" / "VOC2007"
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for name in ("Annotations", "JPEGImages"):
        (folder / name).symlink_to(small / name)
    for name, count in (("trainval", trainval), ("test", test)):
        lines = (small / "ImageSets" / "Main" / f"{name}.txt").read_text().splitlines(True)
        (lists / f"{name}.txt").write_text("".join(lines[:count]))


def photographs(folder: Path) -> None:
    """Two classes of photographs in the place of ImageNet."""
    for part, count in (("train", 12), ("val", 6)):
        for name in ("airplanes", "bonsai"):
            (folder / part / name).mkdir(parents=True)
            for file in sorted((SHARED / "caltech101" / part / name).iterdir())[:count]:
                (folder / part / name / file.name).symlink_to(file)


def supervised(cache: Path, checkpoint: Path) -> None:
    """A file of the layout of MSRA's weights, in their place; its numbers are the checkpoint's."""
    release = find("msra_resnet50")
    assert release is not None
    weights = load_backbone(checkpoint).weights
    arrays = {to_detectron2(k): v.numpy() for k, v in weights.items() if "tracked" not in k}
    (cache / "released").mkdir(parents=True)
    content = pickle.dumps({"model": arrays, "__author__": "a test"}, protocol=3)
    (cache / "released" / release.file_name).write_bytes(content)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, moco_v2_file: Path) -> tuple[Path, str]:
    """Run it; the output folder, and what was printed."""
    pytest.importorskip("detectron2")
    if not SHARED.is_dir():
        pytest.skip("needs the folder of small photo sets")
    tmp = tmp_path_factory.mktemp("reduced")
    voc(tmp / "datasets/VOC2007", 8, 6)
    voc(tmp / "datasets/VOC2012", 8, 0)
    photographs(tmp / "imagenet")
    supervised(tmp / "cache", moco_v2_file)
    words = [
        word
        for jobs, pairs in OVERRIDES.items()
        for key, value in pairs.items()
        for word in ("--override", jobs, key, value)
    ]
    places = ["--data", f"datasets={tmp}/datasets", "--data", f"imagenet={tmp}/imagenet"]
    command = [sys.executable, ROOT / "benchmarks/suite.py", moco_v2_file, "--suite", "moco-v2"]
    done = subprocess.run(
        [*command, "--output-dir", tmp / "out", "--seeds", "2", *places, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"MOCO_TRANSFER_CACHE": str(tmp / "cache"), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for weights in tmp.rglob("model_final.pth"):
        weights.unlink()
    shutil.rmtree(tmp / "cache")
    return tmp / "out", done.stdout


def report(run: tuple[Path, str]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run[0] / "report.json").read_text())
    return content


def test_every_job_ran_and_every_cell_is_filled(run):
    out, said = run
    jobs = json.loads((out / "suite.json").read_text())["jobs"]
    assert {job["state"] for job in jobs} == {"done"}
    assert "missing:" not in said
    assert "fetched first" not in said
    rows = {row["method"]: row["cells"] for row in report(run)["rows"]}
    metrics = {m: {cell["metric"] for cell in cells} for m, cells in rows.items()}
    boxes = {"voc07/AP", "voc07/AP50", "voc07/AP75"}
    assert metrics == {
        "MoCo v2": boxes | {"linear/top1", "linear/top5"},
        "supervised": boxes,
        "random init": boxes,
    }
    assert {cell["seeds"] for cells in rows.values() for cell in cells} == {1, 2}
    protocols = {cell["group"] for cells in rows.values() for cell in cells}
    assert len(protocols) == 2  # one of detection, one of the linear classifier


def test_every_number_is_marked_as_reduced_and_stands_beside_no_printed_one(run):
    out, _ = run
    cells = [cell for row in report(run)["rows"] for cell in row["cells"]]
    assert all(cell["printed"] is None for cell in cells)  # 200 epochs of v2 have printed numbers
    assert all(cell["reduced"].startswith("changed: ") for cell in cells)
    html = (out / "report.html").read_text()
    assert html.count('<td class="reduced"') >= len(cells)
    assert "under the same protocol" not in html
    assert "not comparable" in html
    assert "Reduced: " in html
    assert "v2 Table 1, (d)" in html
    jobs = json.loads((out / "suite.json").read_text())["jobs"]
    marked = {job["name"] for job in jobs if job.get("reduced")}
    assert marked == {job["name"] for job in jobs} - {"convert"}
