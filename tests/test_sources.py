import pytest
from PIL import Image

from convert.errors import UserError
from pretrain.sources import image_folder, open_set, read_image, train_folder


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


def test_each_bad_folder_gets_its_line(pictures):
    (pictures / "empty").mkdir()
    (pictures / "half/train/full").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(pictures / "half/train/full/1.png")
    (pictures / "half/train/hollow").mkdir()
    (pictures / "bare/train").mkdir(parents=True)
    for folder, line in {
        "gone": "found nothing, want a folder with train/",
        "train/cat/1.jpg": "found a file, want a folder with train/",
        "empty": "has no train/ in it",
        "bare": "found 0 sub-folders and no image",
        "half": "class folder 'hollow' holds no image",
    }.items():
        with pytest.raises(UserError, match=line):
            open_set(str(pictures / folder))
    with pytest.raises(UserError, match="cannot be listed"):
        image_folder(pictures / "gone")
    assert train_folder(pictures).name == "train"


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_text("not a picture")
    with pytest.raises(UserError, match=r"broken.jpg: cannot be decoded"):
        read_image(tmp_path / "broken.jpg")
