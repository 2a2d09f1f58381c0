"""LVIS from files to numbers: read, refused, sampled, trained and measured."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from convert.errors import UserError
from convert.files import ROOT
from pretrain.embedded import embedded_root
from tests.detectors import load
from tests.narrow_fpn import NARROW
from tests.own_sets import write_image
from tests.test_evaluation import Oracle
from transfer import train_net
from transfer.detection import batches, datasets, evaluation

RECIPE = ROOT / "configs" / "lvis_R50_FPN_1x_moco.yaml"
SHARED = ROOT.parent / "shared" / "data" / "lvis_mini"
EMBEDDED = (
    *("DATASETS.TRAIN", "('embedded_lvis_train',)", "DATASETS.TEST", "('embedded_lvis_val',)"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "5", "DATALOADER.NUM_WORKERS", "0"),
)
METRICS = [
    f"lvis/{kind}_AP{part}" for kind in ("box", "mask") for part in ("", "50", "75", "r", "c", "f")
]


def content(**changes: Any) -> dict[str, Any]:
    """Two images, two categories whose ids leave a gap."""
    square = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]
    own = {"bbox": [10.0, 10.0, 20.0, 20.0], "area": 400.0, "segmentation": square}
    base = {
        "images": [
            {
                "id": number,
                "coco_url": f"http://images.cocodataset.org/val2017/{number}.png",
                "file_name": f"COCO_val2014_{number}.png",
                "width": 64,
                "height": 64,
                "neg_category_ids": [7],
                "not_exhaustive_category_ids": [],
            }
            for number in (2, 1)
        ],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, **own}],
        "categories": [
            {"id": 7, "name": "dog", "frequency": "f"},
            {"id": 3, "name": "cat", "frequency": "r"},
        ],
    }
    return base | changes


@pytest.fixture
def own(tmp_path, request):
    """Write a file and register it as Detectron2 does; return its name."""

    def write(listing: Any) -> str:
        (tmp_path / "lvis.json").write_text(json.dumps(listing), encoding="utf-8")
        for number in (1, 2):
            write_image(tmp_path / "coco" / "val2017" / f"{number}.png")
        MetadataCatalog.get(name).set(
            evaluator_type="lvis",
            json_file=str(tmp_path / "lvis.json"),
            image_root=str(tmp_path / "coco/"),
        )
        if name not in DatasetCatalog.list():
            DatasetCatalog.register(name, lambda: datasets.read(name).dicts)
        return name

    name = f"lvis_{request.node.name}"
    yield write
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def test_a_file_is_read_with_its_lists_and_images_found_by_their_addresses(own, tmp_path) -> None:
    reading = datasets.read(own(content()))
    assert (reading.faults, reading.classes) == ((), ("cat", "dog"))
    one, two = reading.dicts
    assert (one["image_id"], two["image_id"], two["annotations"]) == (1, 2, [])
    assert Path(one["file_name"]) == tmp_path / "coco" / "val2017" / "1.png"
    assert (one["neg_category_ids"], one["not_exhaustive_category_ids"]) == ([7], [])
    assert one["annotations"] == [
        {
            "bbox": [10.0, 10.0, 20.0, 20.0],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 0,
            "segmentation": content()["annotations"][0]["segmentation"],
        }
    ]


def test_detectron2s_own_reader_says_the_same_of_the_published_names(own, monkeypatch) -> None:
    """Its 1230 categories are numbered from 1 without gaps."""
    import sys
    from types import ModuleType

    class Index:
        """What Detectron2 asks of the lvis package."""

        def __init__(self, file: str) -> None:
            listing = json.loads(Path(file).read_text())
            self.imgs = {image["id"]: image for image in listing["images"]}
            self.img_ann_map = {i: [] for i in self.imgs}
            for entry in listing["annotations"]:
                self.img_ann_map[entry["image_id"]].append(entry)

        def load_imgs(self, ids: list[int]) -> list[dict[str, Any]]:
            return [self.imgs[i] for i in ids]

    from detectron2.data.datasets.lvis import load_lvis_json

    package = ModuleType("lvis")
    package.LVIS = Index
    monkeypatch.setitem(sys.modules, "lvis", package)
    ours = datasets.load(["embedded_lvis_val"], training=False)
    file = MetadataCatalog.get("embedded_lvis_val").json_file
    theirs = load_lvis_json(file, f"{embedded_root()}/coco/")
    assert ours.dicts == theirs


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"annotations": [content()["annotations"][0] | {"category_id": 1231}]},
            "1 categories out of range, first 1231 in annotation 1, want 3 to 7",
        ),
        (
            {"images": [content()["images"][0] | {"neg_category_ids": [3, 9, 10]}]},
            "2 categories out of range, first 9 in neg_category_ids of image 2, want 3 to 7",
        ),
        (
            {"categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog", "frequency": "x"}]},
            "2 categories have no frequency r, c or f, first id 3",
        ),
        (
            {"images": [{"id": 1, "file_name": "1.png", "width": 64, "height": 64}]},
            "1 images have no neg_category_ids or no not_exhaustive_category_ids, first id 1; LVIS",
        ),
        (
            {"annotations": [content()["annotations"][0] | {"image_id": 9}]},
            "1 annotations are of no listed image, first id 1",
        ),
        (
            {"annotations": [content()["annotations"][0] | {"segmentation": [[1, 2, 3, 4]]}]},
            "1 annotations have a polygon of fewer than 3 points, first id 1",
        ),
        ({"images": []}, "of no listed image"),
        ({"categories": []}, "want some: the file has no categories"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(own, change, complaint) -> None:
    name = own(content(**change))
    with pytest.raises(UserError) as refused:
        datasets.load([name], training=False)
    assert complaint in str(refused.value)
    assert str(refused.value).startswith(f"data {name}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("listing", [[], {"images": []}, {"images": 3, "categories": []}])
def test_what_is_no_lvis_file_is_said_in_one_line(own, listing) -> None:
    with pytest.raises(UserError, match=r"lvis\.json cannot be read"):
        datasets.load([own(listing)], training=False)


def test_missing_lvis_says_what_brings_it(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = datasets.missing_files(["lvis_v0.5_train"])
    assert line.startswith("lvis_v0.5_train: datasets/lvis/lvis_v0.5_train.json is missing; set ")
    assert line.endswith("lvisdataset.org into lvis/; images are COCO's, in coco/")


def test_the_embedded_categories_are_rare_common_and_frequent_as_their_counts_say() -> None:
    file = embedded_root() / "lvis" / "lvis_v0.5_train.json"
    for word in json.loads(file.read_text())["categories"]:
        wanted = "r" if word["image_count"] < 10 else "c" if word["image_count"] < 100 else "f"
        assert word["frequency"] == wanted


def test_the_embedded_objects_are_cocos_of_the_categories_that_were_looked_for() -> None:
    from pretrain.embedded import LVIS_CATEGORIES

    for split in ("train", "val"):
        lvis = json.loads((embedded_root() / "lvis" / f"lvis_v0.5_{split}.json").read_text())
        file = embedded_root() / "coco" / "annotations" / f"instances_{split}2017.json"
        coco = {entry["id"]: entry for entry in json.loads(file.read_text())["annotations"]}
        kept = {entry["id"] for entry in lvis["annotations"]}
        for entry in lvis["annotations"]:
            assert entry["segmentation"] == coco[entry["id"]]["segmentation"]
            assert coco[entry["id"]]["value"] in LVIS_CATEGORIES[entry["category_id"] - 1][2]
        for image in lvis["images"]:
            there = {e["category_id"] for e in lvis["annotations"] if e["image_id"] == image["id"]}
            assert not there & set(image["neg_category_ids"])
            assert set(image["not_exhaustive_category_ids"]) <= there
            complete = there - set(image["not_exhaustive_category_ids"])
            values = {v for k in complete for v in LVIS_CATEGORIES[k - 1][2]}
            own = [e for e in coco.values() if e["image_id"] == image["id"]]
            assert {e["id"] for e in own if e["value"] in values} <= kept
        assert any(image["not_exhaustive_category_ids"] for image in lvis["images"])
        assert any(image["neg_category_ids"] for image in lvis["images"])


def test_images_with_rare_categories_are_repeated() -> None:
    """At t = 1 a category in a fourth of the images makes its images come twice."""
    cfg = load(RECIPE, *EMBEDDED, "DATALOADER.REPEAT_THRESHOLD", "1.0")
    dicts = [
        {"annotations": [{"category_id": int(i % 4 == 0)}, {"category_id": 2}]} for i in range(400)
    ]
    order = batches._order(cfg, dicts)()
    drawn = torch.tensor([next(order) for _ in range(400 * 20)])
    rare = float((drawn % 4 == 0).float().mean())
    assert rare == pytest.approx(2 * 100 / (2 * 100 + 300 * (4 / 3) ** 0.5), abs=0.01)


class Learned(Oracle):
    """Knows the categories too."""

    def find(self, image: dict[str, Any]):
        found = super().find(image)
        known = self.truth[image["image_id"]]
        found.pred_classes = torch.tensor([a["category_id"] for a in known], dtype=torch.int64)
        return found


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_perfect_detector_scores_a_hundred_and_a_blind_one_nothing() -> None:
    cfg = load(RECIPE, *EMBEDDED)
    test = datasets.load(cfg.DATASETS.TEST, training=False)
    perfect = evaluation.evaluate(cfg, Learned(test, 0.0), test, quiet=True)
    assert list(perfect.metrics) == METRICS
    assert all(value > 99.9 for value in perfect.metrics.values()), perfect.metrics
    assert list(perfect.details["per_class"]["lvis/mask_AP"]) == [
        *("loop", "stroke", "two", "three", "five")
    ]
    assert perfect.details["evaluator"].startswith("LVIS, ")
    blind = evaluation.evaluate(cfg, Learned(test, 60.0), test, quiet=True)
    assert all(v < 2 for k, v in blind.metrics.items() if "box" in k)


@pytest.mark.slow
def test_the_row_trains_and_is_measured_on_the_embedded_scenes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(RECIPE), "--device", "cpu", "--output-dir", "out", "--quiet"]
    assert train_net.main([*words, *NARROW, *EMBEDDED]) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (record["task"], list(record["metrics"])) == ("lvis", METRICS)
    assert record["recipe"]["name"] == "lvis_R50_FPN_1x_moco"
    assert record["protocol"]["DATALOADER.SAMPLER_TRAIN"] == "RepeatFactorTrainingSampler"
    assert (tmp_path / "out" / "detections.png").is_file()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder of small photo sets")
def test_real_annotations_of_lvis_are_trained_on_and_measured(tmp_path, monkeypatch) -> None:
    """All 1230 categories of v0.5, the published detector narrowed."""
    folder = tmp_path / "datasets"  # where Detectron2 looks
    for part in ("lvis", "coco"):
        (folder / part).mkdir(parents=True)
    file = SHARED / "annotations" / "lvis_v0.5_val_mini.json"
    (folder / "lvis" / "lvis_v0.5_val.json").symlink_to(file)
    (folder / "coco" / "val2017").symlink_to(SHARED / "val2017")
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(RECIPE), "--device", "cpu", "--output-dir", "out", "--quiet"]
    # 300 detections' masks of 1230 categories would be a GiB.
    pairs = [*NARROW, "DATASETS.TRAIN", "('lvis_v0.5_val',)", "TEST.DETECTIONS_PER_IMAGE", "20"]
    assert train_net.main([*words, *pairs]) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["data"]["test"] == record["data"]["test"] | {"images": 64, "classes": 1230}
    assert record["data"]["test"]["instances"] == 674
    assert list(record["metrics"]) == METRICS
    cfg = load(RECIPE, "DATALOADER.NUM_WORKERS", "0")
    test = datasets.load(cfg.DATASETS.TEST, training=False)
    perfect = evaluation.evaluate(cfg, Learned(test, 0.0), test, quiet=True)
    assert all(value > 99.9 for value in perfect.metrics.values())
