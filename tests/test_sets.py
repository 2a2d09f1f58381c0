import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from convert.errors import UserError
from tests.small_sets import photographs, write_images, write_voc
from transfer.classification.sets import open_sets
from transfer.classification.tags import ABSENT, DIFFICULT, PRESENT


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def names(part):
    return [(p.name, part.classes[label]) for p, label in zip(part.paths, part.labels, strict=True)]


# --- VOC ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "VOC2007", "VOCdevkit/VOC2007"])
def test_voc_is_found_wherever_it_lies_and_tags_say_present_difficult_absent(tmp_path, inside):
    write_voc(tmp_path / inside)
    sets = open_sets(tmp_path, tagged=True)
    assert sets.train.classes == ("cat", "dog")
    assert [path.name for path in sets.train.paths] == [f"{i}.jpg" for i in range(6)]
    assert sets.train.tags.tolist() == [
        [PRESENT, ABSENT],
        [PRESENT, PRESENT],  # one of two cats is difficult: there is one that is not
        [DIFFICULT, PRESENT],  # its only cat is
        [ABSENT, PRESENT],
        [PRESENT, DIFFICULT],
        [ABSENT, ABSENT],
    ]
    assert list(sets.apart) == [3, 4, 5]  # what val.txt names
    assert sets.metric == "mAP"
    assert sets.train.labels == (0, 1, 2, 3, 4, 5)


def test_changed_tags_change_the_listing(tmp_path):
    write_voc(tmp_path)
    before = open_sets(tmp_path, tagged=True).train.listing_hash()
    path = tmp_path / "Annotations/2.xml"
    path.write_text(path.read_text().replace("<difficult>1", "<difficult>0"))
    assert open_sets(tmp_path, tagged=True).train.listing_hash() != before


def test_a_set_with_several_classes_an_image_is_refused_where_one_is_wanted(tmp_path):
    write_voc(tmp_path)
    with pytest.raises(UserError, match=r"several classes an image.*take transfer/svm\.py"):
        open_sets(tmp_path)


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        ("Annotations/1.xml", "<annotation><obj", r"annotation .*1\.xml: cannot be read"),
        ("Annotations/7.xml", None, r"annotation .*7\.xml: cannot be read"),
        ("ImageSets/Main/test.txt", None, r"list .*test\.txt: cannot be read"),
        ("ImageSets/Main/test.txt", "6\n", "class 'dog' is in one of trainval and test only"),
        ("JPEGImages/3.jpg", None, r"1 listed images are missing, .*3\.jpg first"),
        ("ImageSets/Main/trainval.txt", "2\n3\n", "class 'cat' has no image in one part where"),
    ],
)
def test_a_damaged_voc_is_refused_in_one_line(tmp_path, path, text, line):
    write_voc(tmp_path)
    (tmp_path / path).unlink() if text is None else (tmp_path / path).write_text(text)
    with pytest.raises(UserError, match=line) as caught:
        open_sets(tmp_path, tagged=True)
    assert "\n" not in str(caught.value)


def test_tags_from_annotations_are_vocs_own_class_files():
    root = photographs("voc_mini")
    sets = open_sets(root, tagged=True)
    main = root / "VOC2007/ImageSets/Main"
    for part, images in (("trainval", sets.train), ("test", sets.val)):
        for column, label in enumerate(images.classes):
            lines = (main / f"{label}_{part}.txt").read_text().split()
            theirs = dict(zip(lines[::2], map(int, lines[1::2]), strict=True))
            ours = {
                p.stem: int(t) for p, t in zip(images.paths, images.tags[:, column], strict=True)
            }
            assert ours == theirs


# --- CIFAR ----------------------------------------------------------------------------------------


def write_cifar(root, hundred=False):
    draw = np.random.default_rng(0)
    key, names_key = ("fine_labels", "fine_label_names") if hundred else ("labels", "label_names")
    files = (
        ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    )
    root.mkdir(parents=True)
    pixels = {}
    for file in files:
        data = draw.integers(0, 256, (4, 3072)).astype(np.uint8)
        pixels[file] = data.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1)
        # Python 2's pickles: keys are byte strings.
        content = {b"data": data, key.encode(): [0, 1, 1, 0], b"filenames": [b"a"] * 4}
        (root / file).write_bytes(pickle.dumps(content, protocol=2))
    meta = {names_key.encode(): [b"cat", b"dog"]}
    (root / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return pixels


@pytest.mark.parametrize(
    ("folder", "hundred"), [("cifar-10-batches-py", False), ("cifar-100-python", True)]
)
def test_cifars_own_batches_are_read_to_the_pixel(tmp_path, folder, hundred):
    pixels = write_cifar(tmp_path / folder, hundred)
    for root in (tmp_path, tmp_path / folder):
        sets = open_sets(root)
        assert (len(sets.train), len(sets.val)) == ((4, 4) if hundred else (20, 4))
        assert sets.train.classes == ("cat", "dog")
        assert sets.train.labels[:4] == (0, 1, 1, 0)
        first = pixels["train" if hundred else "data_batch_1"]
        assert np.array_equal(np.asarray(sets.train.read(2)), first[2])
    assert sets.name.startswith("CIFAR-100" if hundred else "CIFAR-10 ")


def test_one_changed_pixel_changes_the_listing_of_a_packed_set(tmp_path):
    write_cifar(tmp_path / "cifar-100-python", hundred=True)
    before = open_sets(tmp_path).train.listing_hash()
    path = tmp_path / "cifar-100-python/train"
    content = pickle.loads(path.read_bytes())
    content[b"data"][3, 7] ^= 1
    path.write_bytes(pickle.dumps(content, protocol=2))
    assert open_sets(tmp_path).train.listing_hash() != before


def test_a_batch_that_runs_code_runs_nothing(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py")

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "cifar-10-batches-py/data_batch_2"
    path.write_bytes(pickle.dumps({b"data": Evil(), b"labels": [0]}, protocol=2))
    with pytest.raises(UserError, match="data_batch_2"):
        open_sets(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_missing_batch_is_named(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py/data_batch_4").unlink()
    with pytest.raises(UserError, match=r"data_batch_4: no such file"):
        open_sets(tmp_path)


# --- lists ----------------------------------------------------------------------------------------


def test_inaturalist_is_read_from_its_lists(tmp_path):
    for part in ("train", "val"):
        rows = [(f"train_val2018/{part}{i}.jpg", i % 2) for i in range(4)]
        touch(*(tmp_path / name for name, _ in rows))
        content = {
            "categories": [{"id": 0, "name": "moth"}, {"id": 1, "name": "fern"}],
            "images": [{"id": i, "file_name": name} for i, (name, _) in enumerate(rows)],
            "annotations": [{"image_id": i, "category_id": c} for i, (_, c) in enumerate(rows)],
        }
        write(tmp_path / f"{part}2018.json", json.dumps(content))
    sets = open_sets(tmp_path)
    assert sets.train.classes == ("fern", "moth")
    assert names(sets.train) == [
        ("train0.jpg", "moth"),
        ("train1.jpg", "fern"),
        ("train2.jpg", "moth"),
        ("train3.jpg", "fern"),
    ]
    before = sets.train.listing_hash()
    text = (tmp_path / "train2018.json").read_text()
    swapped = text.replace('"moth"', '"x"').replace('"fern"', '"moth"').replace('"x"', '"fern"')
    write(tmp_path / "train2018.json", swapped)
    assert open_sets(tmp_path).train.listing_hash() != before
    (tmp_path / "train_val2018/val3.jpg").unlink()
    with pytest.raises(UserError, match=r"1 listed images are missing, .*val3\.jpg first"):
        open_sets(tmp_path)


def make_places(root):
    write(root / "categories_places365.txt", "/a/attic 0\n/b/bar 1\n")
    write(root / "places365_train_standard.txt", "/a/attic/1.jpg 0\n/b/bar/1.jpg 1\n")
    write(root / "places365_val.txt", "V1.jpg 1\nV2.jpg 0\n")
    touch(root / "data_256_standard/a/attic/1.jpg", root / "data_256_standard/b/bar/1.jpg")
    touch(root / "val_256/V1.jpg", root / "val_256/V2.jpg")
    return ["a/attic", "b/bar"], ["b/bar", "a/attic"], "top1", ()


def make_dtd(root):
    for part, i in (("train", 1), ("val", 2), ("test", 3)):
        write(root / f"labels/{part}1.txt", f"dots/d_{i}.jpg\nlines/l_{i}.jpg\n")
        touch(root / f"images/dots/d_{i}.jpg", root / f"images/lines/l_{i}.jpg")
    return ["dots", "lines", "dots", "lines"], ["dots", "lines"], "top1", (2, 3)


def make_aircraft(root):
    for part, i in (("train", 1), ("val", 2), ("test", 3)):
        write(root / f"data/images_variant_{part}.txt", f"{i}0 Boeing 707\n{i}1 A 300\n")
        touch(root / f"data/images/{i}0.jpg", root / f"data/images/{i}1.jpg")
    both = ["Boeing 707", "A 300"]
    return [*both, *both], both, "mean_per_class", (2, 3)


def make_flowers(root):
    touch(*(root / f"jpg/image_{i:05d}.jpg" for i in range(1, 7)))
    savemat(root / "imagelabels.mat", {"labels": [[1, 2, 2, 1, 1, 2]]})
    savemat(root / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    return ["001", "002", "002", "001"], ["001", "002"], "mean_per_class", (2, 3)


def make_pets(root):
    write(root / "annotations/trainval.txt", "great_dane_1 1 2 1\nsphynx_4 2 1 1\n")
    write(root / "annotations/test.txt", "sphynx_5 2 1 1\ngreat_dane_7 1 2 1\n")
    touch(
        *(
            root / f"images/{n}.jpg"
            for n in ("great_dane_1", "sphynx_4", "sphynx_5", "great_dane_7")
        )
    )
    return ["great_dane", "sphynx"], ["sphynx", "great_dane"], "mean_per_class", ()


def make_food(root):
    for part, i in (("train", 1), ("test", 2)):
        write(root / f"meta/{part}.json", json.dumps({"pie": [f"pie/{i}"], "soup": [f"soup/{i}"]}))
        touch(root / f"images/pie/{i}.jpg", root / f"images/soup/{i}.jpg")
    return ["pie", "soup"], ["pie", "soup"], "top1", ()


def make_sun(root):
    for part, i in (("Training_01", 1), ("Testing_01", 2)):
        write(root / f"{part}.txt", f"/a/abbey/{i}.jpg\n/b/bar/inside/{i}.jpg\n")
        touch(root / f"a/abbey/{i}.jpg", root / f"b/bar/inside/{i}.jpg")
    return ["a/abbey", "b/bar/inside"], ["a/abbey", "b/bar/inside"], "top1", ()


def make_cars(root):
    def rows(*pairs):
        kinds = [("class", "O"), ("fname", "O")]
        return np.array([(np.array([[c]]), f) for f, c in pairs], dtype=kinds)

    touch(root / "cars_train/1.jpg", root / "cars_train/2.jpg")
    touch(root / "cars_test/1.jpg", root / "cars_test/2.jpg")
    (root / "devkit").mkdir()
    meta = np.array(["Audi", "BMW"], dtype=object)
    savemat(root / "devkit/cars_meta.mat", {"class_names": meta})
    savemat(root / "devkit/cars_train_annos.mat", {"annotations": rows(("1.jpg", 2), ("2.jpg", 1))})
    savemat(
        root / "cars_test_annos_withlabels.mat", {"annotations": rows(("1.jpg", 1), ("2.jpg", 2))}
    )
    return ["BMW", "Audi"], ["Audi", "BMW"], "top1", ()


@pytest.mark.parametrize(
    "make",
    [make_places, make_dtd, make_aircraft, make_flowers, make_pets, make_food, make_sun, make_cars],
)
def test_the_suites_sets_are_read_as_they_lie_on_disk(tmp_path, make):
    train, val, metric, apart = make(tmp_path)
    sets = open_sets(tmp_path)
    assert [name for _, name in names(sets.train)] == train
    assert [name for _, name in names(sets.val)] == val
    assert (sets.metric, sets.apart) == (metric, apart)
    sets.train.read(1)
    sets.train.paths[0].unlink()
    with pytest.raises(UserError, match="1 listed images are missing"):
        open_sets(tmp_path)


def test_caltech101_draws_30_images_a_class_once_and_judges_the_rest(tmp_path):
    root = tmp_path / "101_ObjectCategories"
    for name, count in (("ant", 33), ("bass", 31), ("BACKGROUND_Google", 5)):
        touch(*(root / name / f"image_{i:04d}.jpg" for i in range(count)))
    sets = open_sets(tmp_path)
    assert sets.train.classes == ("ant", "bass")
    assert (sets.train.labels.count(0), sets.train.labels.count(1)) == (30, 30)
    assert sets.val.labels == (0, 0, 0, 1)
    assert not set(sets.train.paths) & set(sets.val.paths)
    torch.manual_seed(5)
    assert open_sets(tmp_path).train.paths == sets.train.paths


def test_a_test_folder_stands_for_a_missing_val(tmp_path):
    write_images(tmp_path, train=1, val=1)
    (tmp_path / "val").rename(tmp_path / "test")
    assert len(open_sets(tmp_path).val) == 3
