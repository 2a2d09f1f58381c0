"""What is wrong with a set is counted and named before a run."""

import json

import pytest

pytest.importorskip("detectron2")

from PIL import Image

from convert.errors import UserError
from tests.own_sets import SIDE, VOC_OBJECTS, coco_content, write_coco, write_image, write_voc
from transfer.detection import data_check, datasets


def look(name: str, **how):
    return data_check.look(datasets.read(name), **{"training": True, **how})


def test_a_good_set_has_counts_and_nothing_else(tmp_path) -> None:
    found = look(write_coco(tmp_path), decode=True)
    assert found.summary.endswith(": 3 images (1 without a box), 2 boxes, 2 classes")
    assert (found.stops, found.notes) == ((), ())
    data_check.refuse([found])


def test_missing_and_unreadable_images_are_named_and_stop_a_run(tmp_path) -> None:
    name = write_coco(tmp_path)
    (tmp_path / "images" / "001.png").unlink()
    (tmp_path / "images" / "002.png").write_bytes(b"no image at all")
    found = look(name)
    missing, unreadable = found.stops
    assert missing.startswith("1 of 3 images are missing: ")
    assert missing.endswith("001.png")
    assert "1 of 3 images cannot be read: " in unreadable
    assert "002.png (cannot identify" in unreadable
    with pytest.raises(UserError, match=r"001\.png \(and 1 more kinds of fault\)"):
        data_check.refuse([found])


def test_a_truncated_image_is_found_when_every_image_is_decoded(tmp_path) -> None:
    name = write_coco(tmp_path)
    file = tmp_path / "images" / "003.png"
    Image.effect_noise((SIDE, SIDE), 90).save(file)
    file.write_bytes(file.read_bytes()[:900])
    assert look(name).stops == ()  # its head is whole
    (stop,) = look(name, decode=True).stops
    assert "1 of 3 images cannot be read" in stop
    assert "003.png" in stop


def test_a_size_that_differs_from_the_listing_stops_a_run(tmp_path) -> None:
    name = write_coco(tmp_path)
    write_image(tmp_path / "images" / "002.png", 40, 50)
    (stop,) = look(name).stops
    assert "1 of 3 images have another size than listed" in stop
    assert stop.endswith(f"002.png is 40 x 50, listed as {SIDE} x {SIDE}")


def test_an_image_that_a_camera_turned_has_the_size_that_detectron2_sees(tmp_path) -> None:
    exif = Image.Exif()
    exif[data_check.ORIENTATION] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    from detectron2.data.detection_utils import read_image

    height, width = read_image(str(tmp_path / "turned.jpg"), "RGB").shape[:2]
    assert data_check.image_size(tmp_path / "turned.jpg") == (width, height) == (30, 40)


BROKEN = coco_content(
    annotations=[
        {"id": i, "image_id": 1, "category_id": 3, "bbox": box, "iscrowd": 0, "area": 9.0}
        for i, box in enumerate(
            ([10, 10, 20, 20], [5, 5, 0, 9], [5, 5, 9, -2], [64, 0, 5, 5], [-9, 3, 9, 9]), start=1
        )
    ]
)


def test_broken_boxes_are_counted_named_and_dropped_from_training(tmp_path) -> None:
    name = write_coco(tmp_path, BROKEN)
    found = look(name)
    assert found.stops == ()
    flat, outside, unused = found.notes
    assert (
        flat == "2 of 5 boxes have no area (dropped): 001.png [5, 5, 0, 9], 001.png [5, 5, 9, -2]"
    )
    assert outside.startswith("2 of 5 boxes lie outside their image (dropped): 001.png [64, 0, 5")
    assert unused == "no box of 1 classes: dog"
    loaded = datasets.load([name], training=True)
    assert [len(image["annotations"]) for image in loaded.dicts] == [1]
    assert loaded.record()["dropped_boxes"] == len(loaded.dropped) == 4
    assert loaded.dropped[0].endswith("001.png: box [5, 5, 0, 9] has no area")


def test_a_test_set_is_measured_as_it_is(tmp_path) -> None:
    name = write_coco(tmp_path, BROKEN)
    assert "kept, as the measure has them" in look(name, training=False).notes[0]
    assert len(datasets.load([name], training=False).dicts[0]["annotations"]) == 5


def test_another_count_than_the_published_sets_is_told(tmp_path, monkeypatch) -> None:
    name = write_coco(tmp_path)
    monkeypatch.setitem(data_check.PUBLISHED, name, 5000)
    assert look(name).notes == ("the published set has 5000 images, this one 3",)


def test_published_counts_are_the_papers() -> None:
    both = [data_check.PUBLISHED[f"voc_{year}_trainval"] for year in (2007, 2012)]
    assert sum(both) == 16551
    assert data_check.PUBLISHED["voc_2007_test"] == 4952
    assert data_check.PUBLISHED["coco_2017_train"] == 118287
    assert data_check.PUBLISHED["coco_2017_val"] == 5000


def test_what_detectron2_leaves_out_while_it_reads_is_told(tmp_path) -> None:
    content = coco_content()
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    found = look(write_coco(tmp_path, content))
    assert any("1 instances without valid segmentation" in note for note in found.notes)


def test_classes_and_annotations_that_are_broken_stop_a_run(tmp_path, monkeypatch) -> None:
    folder = write_voc(tmp_path / "VOC", VOC_OBJECTS)
    name = f"{folder}:all"
    (folder / "Annotations" / "two.xml").write_text("<annotation><size>")
    reading = datasets.Reading(name, [], ("cat",))
    monkeypatch.setattr(datasets, "_classes", lambda name: reading.classes)
    broken, unknown = look(name).stops
    assert "1 broken annotations, first: " in broken
    assert "two.xml is no VOC annotation" in broken
    assert unknown == "objects of classes that are not in its list: 1 of 'dog'"


def test_a_coco_file_that_is_no_json_or_lacks_a_category_stops_a_run(tmp_path) -> None:
    name = write_coco(tmp_path)
    content = coco_content()
    content["annotations"][0]["category_id"] = 99
    (tmp_path / "own.json").write_text(json.dumps(content), encoding="utf-8")
    assert "category_id=99" in look(name).stops[0]
    (tmp_path / "own.json").write_text('{"images": [', encoding="utf-8")
    assert "own.json cannot be read" in look(name).stops[0]
