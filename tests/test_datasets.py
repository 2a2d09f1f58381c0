import json
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.structures import BoxMode

from convert.errors import UserError
from convert.files import ROOT
from pretrain.embedded import embedded_root
from transfer.detection import datasets

SHARED = ROOT.parent / "shared" / "data"  # small photo sets beside the checkout; not ours to commit
COCO_NAMES = ("coco_2017_train", "coco_2017_val")
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the folder of small photo sets"
)


@pytest.fixture
def own_name(request):
    """A name in Detectron2's catalogs for one test."""
    name = f"test_{request.node.name}"
    yield name
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def test_importing_datasets_does_not_import_detectron2_or_torch() -> None:
    code = (
        "import sys, transfer.detection.datasets; print({'detectron2', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_naming_the_embedded_scenes_builds_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MOCO_TRANSFER_CACHE", str(tmp_path / "cache"))
    assert datasets.missing_files(list(datasets.EMBEDDED)) == []
    assert not (tmp_path / "cache").exists()


def test_both_embedded_layouts_hold_the_same_boxes_of_one_class() -> None:
    def boxes(loaded: datasets.Loaded) -> list[list[list[float]]]:
        return [
            sorted(
                BoxMode.convert(list(map(float, a["bbox"])), a["bbox_mode"], BoxMode.XYXY_ABS)
                for a in image["annotations"]
            )
            for image in loaded.dicts
        ]

    coco = datasets.load(["embedded_coco_val"], training=False)
    voc = datasets.load(["embedded_voc_test"], training=False)
    assert coco.classes == voc.classes == ("digit",)
    assert boxes(coco) == boxes(voc)
    assert all(boxes(coco))


def test_embedded_voc_is_measured_as_2007_with_its_eleven_points() -> None:
    datasets.register()
    assert datasets.evaluator_type("embedded_voc_test") == ("pascal_voc", 2007)
    assert datasets.evaluator_type("embedded_coco_val") == ("coco", 0)


def test_a_missing_set_says_what_is_missing_and_what_brings_it(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # Detectron2's default folder is relative: datasets/
    lines = datasets.missing_files([*COCO_NAMES, "voc_2007_test", "embedded_coco_val"])
    assert [line.split(":")[0] for line in lines] == [*COCO_NAMES, "voc_2007_test"]
    assert "instances_train2017.json is missing" in lines[0]
    assert all("DETECTRON2_DATASETS" in line and "download" in line for line in lines)


def test_an_unknown_set_names_the_nearest_ones() -> None:
    with pytest.raises(UserError, match=r"unknown set 'coco_2017_trian'.*coco_2017_train"):
        datasets.missing_files(["coco_2017_trian"])


def test_a_listed_image_that_is_gone_is_refused(tmp_path, own_name) -> None:
    listing = embedded_root() / "coco" / "annotations" / "instances_val2017.json"
    shutil.copytree(embedded_root() / "coco" / "val2017", tmp_path / "val2017")
    gone = tmp_path / "val2017" / json.loads(listing.read_text())["images"][0]["file_name"]
    gone.unlink()
    register_coco_instances(own_name, {}, str(listing), str(tmp_path / "val2017"))
    with pytest.raises(UserError, match=rf"1 of 60 images are missing: .*{gone.stem}"):
        datasets.load([own_name], training=False)


def test_a_class_that_is_not_in_the_list_is_refused(own_name) -> None:
    folder = str(embedded_root() / "VOC2007")
    register_pascal_voc(own_name, folder, "test", 2007, ("cat", "dog"))
    with pytest.raises(UserError, match=r"cannot be read .*not in"):
        datasets.load([own_name], training=False)


def test_a_record_tells_one_box_more_or_less_apart() -> None:
    loaded = datasets.load(["embedded_coco_val"], training=False)
    before = loaded.record()
    assert (before["images"], before["classes"]) == (60, 1)
    box = loaded.dicts[0]["annotations"][0]["bbox"]
    loaded.dicts[0]["annotations"][0]["bbox"] = [box[0] + 1, *box[1:]]
    assert loaded.record()["listing_hash"] != before["listing_hash"]
    loaded.dicts[0]["annotations"].pop()
    assert loaded.record()["instances"] == before["instances"] - 1


@needs_shared
def test_real_coco_and_voc_folders_are_read(tmp_path, monkeypatch) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "VOC2007").symlink_to(SHARED / "voc_mini" / "VOC2007")
    (tmp_path / "datasets" / "coco").symlink_to(SHARED / "coco_mini")
    monkeypatch.chdir(tmp_path)
    assert datasets.missing_files([*COCO_NAMES, "voc_2007_trainval", "voc_2007_test"]) == []
    coco = datasets.load(["coco_2017_val"], training=False)
    assert (len(coco.dicts), len(coco.classes)) == (188, 80)
    voc = datasets.load(["voc_2007_trainval"], training=True)
    assert (len(voc.dicts), len(voc.classes)) == (60, 20)
