import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from convert.errors import UserError
from pretrain.sources import image_folder, open_set, read_image, read_list, train_folder


@pytest.fixture
def pictures(tmp_path):
    for place in ("train/cat/2.png", "train/cat/1.jpg", "train/dog/deep/3.JPEG", "val/cat/4.png"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6), 77).save(path)
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    return tmp_path


def test_images_are_listed_by_class_then_name(pictures):
    images = image_folder(pictures / "train")
    assert images.classes == ("cat", "dog")
    assert [path.name for path in images.paths] == ["1.jpg", "2.png", "3.JPEG"]
    assert images.labels == (0, 0, 1)
    assert len(images) == 3


def test_gray_images_become_rgb(pictures):
    assert image_folder(pictures / "train").read(0).mode == "RGB"


def test_the_listing_hash_sees_a_changed_folder(pictures):
    before = image_folder(pictures / "train").listing_hash()
    assert image_folder(pictures / "train").listing_hash() == before
    Image.new("RGB", (9, 9)).save(pictures / "train/dog/5.png")
    assert image_folder(pictures / "train").listing_hash() != before


def test_a_set_may_lack_val_and_not_train(pictures):
    assert open_set(str(pictures))[1] is not None
    (pictures / "val/cat/4.png").unlink()
    (pictures / "val/cat").rmdir()
    (pictures / "val").rmdir()
    assert open_set(str(pictures))[1] is None


def test_the_embedded_set_opens_by_name():
    train, val = open_set("embedded")
    assert val is not None
    assert train.classes == val.classes == tuple("0123456789")


def test_a_folder_without_classes_is_all_its_images_in_one_order(pictures):
    cats = pictures / "train/cat"
    (cats / "1.jpg").rename(
        pictures / "train/9.jpg"
    )  # an image beside folders: these are no classes
    train, val = open_set(str(pictures))
    assert (train.labels, train.classes, val) == ((), (), None)
    assert list(train.names) == ["9.jpg", "cat/2.png", "dog/deep/3.JPEG"]
    nested, _ = open_set(str(pictures / "train"))  # no train/ in it
    assert list(nested.names) == list(train.names)
    assert nested.labels == ()
    Image.new("L", (8, 6)).save(cats / "0.png")
    flat, _ = open_set(str(cats))
    assert list(flat.names) == ["0.png", "2.png"]


def test_each_bad_folder_gets_its_line(pictures):
    (pictures / "empty/below").mkdir(parents=True)
    (pictures / "half/train/full").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(pictures / "half/train/full/1.png")
    (pictures / "half/train/hollow").mkdir()
    (pictures / "bare/train").mkdir(parents=True)
    (pictures / "hollow/train/a").mkdir(parents=True)
    (pictures / "one/train/a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(pictures / "one/train/a/1.png")
    (pictures / "eval/val/a").mkdir(parents=True)
    for folder, line in {
        "gone": "found nothing, want a folder with train/",
        "train/cat/1.jpg": "is no text; want a folder, or a list",
        "empty": "found no image in it and the 1 folders below it",
        "bare": "found no image in it",
        "hollow": "found 1 sub-folders and no image in them",
        "half": "class folder 'hollow' holds no image",
        "one": "holds one image, .*1.png; contrast needs others",
        "eval": "has val/ and no train/",
    }.items():
        with pytest.raises(UserError, match=line):
            open_set(str(pictures / folder))
    with pytest.raises(UserError, match="cannot be listed"):
        image_folder(pictures / "gone")
    with pytest.raises(UserError, match="has no train/ in it"):
        train_folder(pictures / "empty")
    assert train_folder(pictures).name == "train"


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_text("not a picture")
    with pytest.raises(UserError, match=r"broken.jpg: cannot be decoded \(is no image\)"):
        read_image(tmp_path / "broken.jpg")
    with pytest.raises(UserError, match=r"gone.jpg: cannot be read \(No such file"):
        read_image(tmp_path / "gone.jpg")


def test_images_that_are_left_out_leave_no_gap(pictures):
    images = image_folder(pictures / "train")
    left = images.without({1: "is empty"})
    assert [path.name for path in left.paths] == ["1.jpg", "3.JPEG"]
    assert (left.labels, len(left.stamps)) == ((0, 1), 2)
    assert left.skipped == ((str(pictures / "train/cat/2.png"), "is empty"),)
    assert images.without({}) is images


# --- lists ----------------------------------------------------------------------------------------


def written(folder, *lines, name="list.txt"):
    file = folder / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def test_a_list_keeps_its_order_and_its_classes(pictures):
    absolute = str(pictures / "train/cat/2.png")
    rows = ["train/dog/deep/3.JPEG\tdog", f"{absolute}\tcat", "", "train/cat/1.jpg\tcat\r"]
    images, val = open_set(written(pictures, *rows))
    assert [path.name for path in images.paths] == ["3.JPEG", "2.png", "1.jpg"]
    assert (images.labels, images.classes, val) == ((1, 0, 0), ("cat", "dog"), None)
    assert images.read(1).size == (8, 6)
    before = images.listing_hash()
    images, _ = open_set(written(pictures, *[row.split("\t")[0] for row in rows]))
    assert images.labels == ()
    assert images.listing_hash() == before


def test_each_bad_list_gets_its_line(pictures):
    gone = [f"train/gone/{i}.jpg" for i in range(5)]
    for rows, line in (
        ([], "names no image"),
        (
            ["train/cat/1.jpg", *gone],
            r"5 of 6 files are missing: .*gone/0.jpg, .*gone/2.jpg, \.\.\.",
        ),
        (
            ["train/cat/1.jpg\tcat", "train/cat/2.png"],
            "1 of 2 lines have a class, and 'train/cat/2",
        ),
        (["train/cat/1.jpg", "memory://x/2.png"], "1 of 2 lines are addresses"),
        (["train/cat/1.jpg"], "holds one image"),
    ):
        with pytest.raises(UserError, match=line):
            open_set(written(pictures, *rows))
    with pytest.raises(UserError, match=r"none.txt: found nothing"):
        open_set(str(pictures / "none.txt"))


def test_a_list_may_name_addresses_and_lie_behind_one(pictures):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in ("1.jpg", "2.png"):
        memory.pipe(f"/sources/{name}", (pictures / "train/cat" / name).read_bytes())
    memory.pipe("/sources/list.txt", b"memory://sources/2.png\tb\nmemory://sources/1.jpg\ta\n")
    images, _ = open_set("memory://sources/list.txt")
    assert (images.labels, len(images)) == ((1, 0), 2)
    assert images.read(1).size == (8, 6)
    assert images.name(0) == "memory://sources/2.png"
    left = images.without({0: "is empty"})
    assert (left.name(0), left.labels, len(left)) == ("memory://sources/1.jpg", (0,), 1)
    with pytest.raises(UserError, match=r"list nowhere://a: |nowhere:// cannot be opened"):
        open_set("nowhere://a/list.txt")


def test_without_fsspec_an_address_is_refused_in_one_line(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match="addresses need fsspec: pip install fsspec"):
        read_list("s3://bucket/list.txt")


# --- CIFAR-10 -------------------------------------------------------------------------------------


def cifar(folder, train=20, labels=None):
    """Write batches as CIFAR-10's authors do, of a few images each."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    pixels = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = draw.integers(0, 256, (train, 3072), dtype=np.uint8)
        told = labels or draw.integers(0, 10, train).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": told}, protocol=2))
        pixels[name] = data
    names = [f"kind{i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    return pixels


@pytest.mark.parametrize("place", [".", "cifar-10-batches-py"])
def test_cifars_batches_are_read_as_their_authors_wrote_them(tmp_path, place):
    pixels = cifar(tmp_path / "set" / place)
    train, val = open_set(str(tmp_path / "set"))
    assert (len(train), len(val)) == (100, 20)
    assert train.classes == val.classes == tuple(f"kind{i}" for i in range(10))
    third = np.asarray(train.read(42))
    for channel in range(3):
        plane = pixels["data_batch_3"][2][channel * 1024 : (channel + 1) * 1024]
        assert np.array_equal(third[..., channel], plane.reshape(32, 32))
    assert train.listing_hash() != val.listing_hash()


def test_damaged_batches_are_refused_and_run_no_code(tmp_path):
    folder = tmp_path / "set"
    cifar(folder)
    (folder / "data_batch_4").unlink()
    with pytest.raises(UserError, match="1 of 5 batches are missing: data_batch_4"):
        open_set(str(folder))
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    cut = (folder / "data_batch_3").read_bytes()[:500]
    other = pickle.dumps({"data": np.zeros((2, 7), np.uint8), "labels": [1, 2]}, protocol=2)
    for bad in (evil, cut, other, b"", pickle.dumps([1], protocol=2)):
        (folder / "data_batch_4").write_bytes(bad)
        with pytest.raises(UserError, match=r"data_batch_4: (is no batch|cannot be read)"):
            open_set(str(folder))
    assert not (tmp_path / "ran").exists()


def test_tiny_imagenets_val_is_read_as_it_is_downloaded(tmp_path):
    for place in ("train/n1/images/n1_0.JPEG", "train/n2/images/n2_0.JPEG"):
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(path)
    images = tmp_path / "val/images"
    images.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (64, 64)).save(images / f"val_{i}.JPEG")
    table = tmp_path / "val/val_annotations.txt"
    table.write_text("".join(f"val_{i}.JPEG\tn{2 - i % 2}\t0\t0\t9\t9\n" for i in range(3)))
    train, val = open_set(str(tmp_path))
    assert train.classes == val.classes == ("n1", "n2")
    assert [(p.name, label) for p, label in zip(val.paths, val.labels, strict=True)] == [
        ("val_1.JPEG", 0),
        ("val_0.JPEG", 1),
        ("val_2.JPEG", 1),
    ]
    table.write_text("val_0.JPEG\tn9\t0\t0\t9\t9\n")
    with pytest.raises(UserError, match="1 of 1 lines name no class folder of train/"):
        open_set(str(tmp_path))
