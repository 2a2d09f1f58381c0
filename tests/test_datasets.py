import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.structures import BoxMode

from convert.errors import UserError
from convert.files import ROOT
from pretrain.embedded import embedded_root
from tests.own_sets import coco_content, write_coco, write_voc
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


def test_naming_the_embedded_sets_builds_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MOCO_TRANSFER_CACHE", str(tmp_path / "cache"))
    assert datasets.missing_files([*datasets.EMBEDDED, *datasets.FIGURES]) == []
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
    with pytest.raises(UserError, match=r"not in its list: \d+ of 'digit'"):
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


def test_a_path_is_ones_own_set_and_a_name_is_not(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_voc(tmp_path / "mine")
    assert datasets.own_source("coco_2017_train") is None
    assert datasets.own_source("lvis_v0.5_train") is None
    coco = datasets.own_source("a/train.json:a/images")
    assert (coco.kind, coco.images, coco.label) == ("coco", Path("a/images"), "train.json:images")
    assert datasets.own_source("a/train.json").images == Path("a")  # beside the file
    voc = datasets.own_source("mine:few")
    assert (voc.kind, voc.path, voc.part, voc.label) == (
        "pascal_voc",
        Path("mine"),
        "few",
        "mine:few",
    )


def test_a_voc_folder_wants_one_of_its_lists_or_has_none(tmp_path) -> None:
    folder = write_voc(tmp_path / "mine")
    for name in (f"{folder}", f"{folder}:nope"):
        with pytest.raises(UserError, match=r"want one of .*mine:all, .*mine:few"):
            datasets.own_source(name)
    shutil.rmtree(folder / "ImageSets")
    assert len(datasets.load([str(folder)], training=False).dicts) == 3


def test_own_sets_are_read_with_their_classes(tmp_path) -> None:
    voc = f"{write_voc(tmp_path / 'voc', suffix='.png')}:all"
    coco = write_coco(tmp_path / "coco")
    assert datasets.own_classes([voc]) == datasets.own_classes([coco]) == ("cat", "dog")
    one = datasets.load([voc], training=False)
    assert [Path(image["file_name"]).name for image in one.dicts] == [
        "one.png",
        "two.png",
        "three.png",
    ]
    first = one.dicts[0]["annotations"]
    assert first[0]["bbox"] == [10, 10, 30, 30]
    assert [entry["difficult"] for entry in first] == [False, True]
    other = datasets.load([coco], training=True)
    assert [len(image["annotations"]) for image in other.dicts] == [
        1,
        1,
    ]  # the empty one is left out
    assert [image["annotations"][0]["category_id"] for image in other.dicts] == [0, 1]


def test_a_voc_folder_has_the_classes_of_all_its_annotations_in_each_of_its_lists(tmp_path) -> None:
    folder = write_voc(tmp_path, {"a": [("cat", 1, 1, 9, 9, 0)], "b": [("dog", 1, 1, 9, 9, 0)]})
    assert datasets.load([f"{folder}:few"], training=True).classes == ("cat", "dog")


def test_other_classes_in_training_and_test_are_refused(tmp_path) -> None:
    train = write_coco(tmp_path / "a")
    more = coco_content(categories=[{"id": 3, "name": "cat"}, {"id": 7, "name": "cow"}])
    test = write_coco(tmp_path / "b", more)
    with pytest.raises(UserError, match=r"dog only in .*a/own.*; cow only in .*b/own"):
        datasets.own_classes([train, test])
    turned = coco_content(categories=[{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}])
    with pytest.raises(UserError, match="another order"):
        datasets.own_classes([train, write_coco(tmp_path / "c", turned)])


def test_voc_is_read_as_detectron2_reads_it(own_name) -> None:
    from detectron2.data.datasets import load_voc_instances

    ours = datasets.load(["embedded_voc_test"], training=False).dicts
    folder = str(embedded_root() / "VOC2007")
    theirs = load_voc_instances(folder, "test", ("digit",))
    for image in ours:
        for entry in image["annotations"]:
            assert entry.pop("difficult") is False
    assert ours == theirs


def test_fractions_are_nested_and_another_seed_draws_others() -> None:
    def drawn(fraction: float, seed: int = 0) -> list[str]:
        return [d["file_name"] for d in datasets.choose(dicts, fraction, seed)]

    dicts = datasets.load(["embedded_coco_train"], training=True).dicts
    one, five, ten, whole = (drawn(f) for f in (0.01, 0.05, 0.1, 1.0))
    assert [len(part) for part in (one, five, ten, whole)] == [2, 12, 24, 240]
    assert set(one) < set(five) < set(ten) < set(whole)
    assert ten == [name for name in whole if name in ten]  # in the listing's order
    assert drawn(0.1) == ten
    assert len(set(drawn(0.1, seed=1)) & set(ten)) < 12
    few = datasets.load(["embedded_coco_train"], training=True, fraction=0.05, split_seed=1)
    assert [d["file_name"] for d in few.dicts] == drawn(0.05, seed=1)


def test_a_fraction_does_not_depend_on_where_the_images_lie() -> None:
    here, there = ([{"file_name": f"/{root}/{i}.jpg"} for i in range(50)] for root in "ab")
    kept = [datasets.choose(dicts, 0.2, 7) for dicts in (here, there)]
    names = [[Path(image["file_name"]).name for image in part] for part in kept]
    assert names[0] == names[1]
