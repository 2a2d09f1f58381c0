"""Cityscapes from folders to numbers: read, refused, trained and measured."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as rle

from convert.errors import UserError
from convert.files import ROOT
from pretrain.embedded import embedded_root
from tests.city_scenes import random_ids
from tests.detectors import load
from tests.narrow_fpn import NARROW
from tests.own_sets import write_image
from transfer import train_net
from transfer.detection import cityscapes_sets, datasets, evaluation
from transfer.segmentation.sets import open_pairs

RECIPE = ROOT / "configs" / "cityscapes_R50_FPN_24k_moco.yaml"
EMBEDDED = (
    *("DATASETS.TRAIN", "('embedded_cityscapes_train',)"),
    *("DATASETS.TEST", "('embedded_cityscapes_val',)", "DATALOADER.NUM_WORKERS", "0"),
)
PUBLISHED = ("cityscapes_fine_instance_seg_train", "cityscapes_fine_instance_seg_val")
METRICS = ["cityscapes/mask_AP", "cityscapes/mask_AP50"]


def write(folder: Path, ids: np.ndarray, name: str = "bonn_000001_000019") -> tuple[Path, Path]:
    """Write a photograph and its ids; return the two folders of the split."""
    images, truth = folder / "leftImg8bit" / "val", folder / "gtFine" / "val"
    write_image(images / "bonn" / f"{name}_leftImg8bit.png", ids.shape[1], ids.shape[0])
    file = truth / "bonn" / f"{name}_gtFine_instanceIds.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids.astype(np.uint16)).save(file)
    return images, truth


def test_every_object_is_read_as_the_pixels_of_its_id(tmp_path) -> None:
    ids = random_ids(3)
    (record,), faults = cityscapes_sets.read(*write(tmp_path, ids))
    assert faults == ()
    assert record["image_id"] == "bonn_000001_000019"
    assert (record["height"], record["width"]) == ids.shape
    numbers = [n for n in np.unique(ids) if (n // 1000 or n) in cityscapes_sets.THINGS]
    assert len(numbers) == len(record["annotations"]) > 5
    for number, entry in zip(numbers, record["annotations"], strict=True):
        mask = ids == number
        assert np.array_equal(rle.decode(entry["segmentation"]), mask)
        assert entry["iscrowd"] == (number < 1000)
        rows, columns = np.nonzero(mask)
        x, y = columns.min(), rows.min()
        assert entry["bbox"] == [x, y, columns.max() - x + 1, rows.max() - y + 1]
        label = number // 1000 or number
        assert cityscapes_sets.THINGS[entry["category_id"]] == label
    assert {entry["iscrowd"] for entry in record["annotations"]} == {0, 1}


def test_the_classes_are_detectron2s() -> None:
    from detectron2.data import MetadataCatalog

    names = MetadataCatalog.get(PUBLISHED[0]).thing_classes
    assert list(cityscapes_sets.CLASSES) == names
    assert cityscapes_sets.THINGS == (24, 25, 26, 27, 28, 31, 32, 33)


@pytest.mark.parametrize(
    ("number", "complaint"),
    [
        (34, "holds id 34, want labels 0 to 33, or 1000 times one of 24, 25, 26, 27, 28, 31, 32"),
        (255, "holds id 255"),
        (7001, "holds id 7001"),
        (34002, "holds id 34002"),
    ],
)
def test_an_id_outside_the_list_is_refused(tmp_path, number, complaint) -> None:
    ids = random_ids(0)
    ids[50:60, 50:60] = number
    _, (fault,) = cityscapes_sets.read(*write(tmp_path, ids))
    assert fault.startswith("1 of 1 label images are broken: label image ")
    assert "bonn_000001_000019_gtFine_instanceIds.png: " + complaint in fault


def test_numbered_caravans_and_trailers_are_known_and_not_learnt(tmp_path) -> None:
    ids = np.full((20, 20), 7)
    ids[:5], ids[5:10] = 29001, 30000
    (record,), faults = cityscapes_sets.read(*write(tmp_path, ids))
    assert (faults, record["annotations"]) == ((), [])


def test_broken_and_missing_label_images_are_named(tmp_path) -> None:
    folders = write(tmp_path, random_ids(0))
    write(tmp_path, random_ids(1), "bonn_000002_000019")
    first, second = sorted((folders[1] / "bonn").iterdir())
    Image.new("RGB", (160, 96)).save(first)
    second.write_bytes(b"no image")
    _, (fault,) = cityscapes_sets.read(*folders)
    assert fault.startswith(f"2 of 2 label images are broken: label image {first}: has shape")
    first.unlink()
    assert cityscapes_sets.read(*folders)[1] == (f"1 of 2 label images are missing, first {first}",)
    shutil.rmtree(folders[0])
    assert "holds no CITY/*_leftImg8bit.png" in cityscapes_sets.read(*folders)[1][0]


def test_a_folder_without_gtfine_is_said_before_anything_is_read(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "datasets" / "cityscapes" / "leftImg8bit" / split).mkdir(parents=True)
    with pytest.raises(UserError) as refused:
        train_net.main(["--config", str(RECIPE), "MODEL.WEIGHTS", ""])
    line = str(refused.value)
    assert f"{PUBLISHED[0]}: datasets/cityscapes/gtFine/train is missing; set DETECTRON2" in line
    assert "download leftImg8bit and gtFine from cityscapes-dataset.com into cityscapes/" in line
    assert "\n" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["datasets"]


def test_an_id_outside_the_list_ends_a_run_in_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = random_ids(0)
    ids[50:60, 50:60] = 99
    write(tmp_path / "datasets" / "cityscapes", ids)
    pairs = ["DATASETS.TRAIN", f"('{PUBLISHED[1]}',)", "MODEL.WEIGHTS", "", "OUTPUT_DIR", "out"]
    with pytest.raises(UserError, match=r"^data cityscapes_fine_.*_val: 1 of 1 .* holds id 99, "):
        train_net.main(["--config", str(RECIPE), *pairs])
    assert not (tmp_path / "out").exists()


def test_without_masks_there_is_nothing_to_measure() -> None:
    with pytest.raises(UserError, match=r"is measured by masks; set MODEL\.MASK_ON True"):
        evaluation.find_task(load(RECIPE, *EMBEDDED, "MODEL.MASK_ON", "False"))


def test_the_embedded_scenes_are_cocos_and_segmentation_reads_them_too() -> None:
    loaded = datasets.load(["embedded_cityscapes_train"], training=False)
    coco = datasets.load(["embedded_coco_train"], training=False)
    for one, other in zip(loaded.dicts, coco.dicts, strict=True):
        scene = np.asarray(Image.open(one["file_name"]))
        close = np.abs(scene.astype(int) - np.asarray(Image.open(other["file_name"])))
        assert close.mean() < 6  # JPEG
        boxes = sorted(e["bbox"] for e in one["annotations"] if not e["iscrowd"])
        assert all(
            list(map(int, box)) in [e["bbox"] for e in other["annotations"]] for box in boxes
        )
    found = {e["category_id"] for image in loaded.dicts for e in image["annotations"]}
    assert found == set(range(8))
    assert any(e["iscrowd"] for image in loaded.dicts for e in image["annotations"])
    pairs = open_pairs("cityscapes", embedded_root(), "val")
    assert len(pairs) == 60
    assert set(np.unique(pairs.read(0)[1])) - {0, 255} <= set(range(11, 19))


class Oracle(torch.nn.Module):
    """Finds every object, and none of the groups; or another class's."""

    def __init__(self, loaded: datasets.Loaded, shift: int) -> None:
        super().__init__()
        self.known = {image["image_id"]: image["annotations"] for image in loaded.dicts}
        self.shift = shift

    def forward(self, inputs):
        return [{"instances": self.find(image)} for image in inputs]

    def find(self, image) -> Instances:
        own = [entry for entry in self.known[image["image_id"]] if not entry["iscrowd"]]
        found = Instances((image["height"], image["width"]))
        corners = torch.tensor([entry["bbox"] for entry in own]).reshape(-1, 4)
        found.pred_boxes = Boxes(torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1))
        found.scores = torch.full((len(own),), 0.9)
        classes = [(entry["category_id"] + self.shift) % 8 for entry in own]
        found.pred_classes = torch.tensor(classes, dtype=torch.int64)
        masks = [rle.decode(entry["segmentation"]).astype(bool) for entry in own]
        size = (len(own), image["height"], image["width"])
        found.pred_masks = torch.from_numpy(np.array(masks).reshape(size))
        return found


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_perfect_detector_scores_a_hundred_and_one_that_takes_cars_for_trucks_nothing() -> None:
    cfg = load(RECIPE, *EMBEDDED)
    test = datasets.load(cfg.DATASETS.TEST, training=False)
    perfect = evaluation.evaluate(cfg, Oracle(test, 0), test, quiet=True)
    assert perfect.metrics == dict.fromkeys(METRICS, pytest.approx(100, abs=1e-9))
    per_class = perfect.details["per_class"]["cityscapes/mask_AP50"]
    assert list(per_class) == list(cityscapes_sets.CLASSES)
    assert perfect.curves["cityscapes/mask_AP50"].tolist() == pytest.approx([1.0] * 101)
    mistaken = evaluation.evaluate(cfg, Oracle(test, 1), test, quiet=True)
    assert max(mistaken.metrics.values()) < 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # Detectron2's masks
def test_the_row_trains_and_is_measured_on_the_embedded_scenes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(RECIPE), "--device", "cpu", "--output-dir", "out", "--quiet"]
    assert train_net.main([*words, *NARROW, *EMBEDDED]) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (record["task"], list(record["metrics"])) == ("cityscapes", METRICS)
    assert record["recipe"]["name"] == "cityscapes_R50_FPN_24k_moco"
    assert (tmp_path / "out" / "detections.png").is_file()
