import shutil

import pytest
import torch

from convert.errors import UserError
from tests.small_sets import write_images
from transfer.classification.features import Features
from transfer.classification.shifted import open_shifted, restricted, shifted_metrics

CLASSES = ("blue", "green", "red", "white")


def write_set(root, train=1, val=2):
    """Write a folder a class: blue, green and red, and not white."""
    write_images(root.with_name("made"), train=train, val=val)
    (root.with_name("made") / "val").rename(root)
    shutil.rmtree(root.with_name("made"))
    return root


def test_a_subset_of_the_classes_is_mapped_by_folder_name(tmp_path):
    folder = write_set(tmp_path / "ImageNet-R")
    (tmp_path / "ImageNet-R/green").rename(tmp_path / "gone")
    (part,) = open_shifted([folder], CLASSES)
    assert (part.name, part.columns, part.corruption) == ("imagenet-r", (0, 2), None)
    assert part.images.labels == (0, 0, 1, 1)
    assert not part.ready


def test_folders_of_numbers_are_places_among_the_classes(tmp_path):
    folder = write_set(tmp_path / "v2")
    for name, number in (("blue", "3"), ("green", "0"), ("red", "1")):
        (folder / name).rename(folder / number)
    (part,) = open_shifted([folder], CLASSES)
    assert part.columns == (0, 1, 3)
    classes = [*map(str, range(12))]  # numbers that are names: 10 sorts before 2 in a listing
    (folder / "3").rename(folder / "10")
    (part,) = open_shifted([folder], sorted(classes))
    assert [sorted(classes)[i] for i in part.columns] == ["0", "1", "10"]


@pytest.mark.parametrize("group", ["", "blur/"])
def test_corruptions_and_severities_are_found_with_and_without_groups(tmp_path, group):
    one = write_set(tmp_path / "one")
    for corruption, severities in (("fog", "15"), ("defocus_blur", "3")):
        for severity in severities:
            shutil.copytree(one, tmp_path / f"imagenet-c/{group}{corruption}/{severity}")
    parts = open_shifted([tmp_path / "imagenet-c"], CLASSES)
    assert [part.corruption for part in parts] == ["defocus_blur", "fog", "fog"]
    assert all(part.ready and part.columns == (0, 1, 2) for part in parts)


def test_corruptions_count_alike_whatever_their_severities(tmp_path):
    one = write_set(tmp_path / "one")
    for place in ("fog/1", "fog/2", "snow/1"):
        shutil.copytree(one, tmp_path / "c" / place)
    parts = open_shifted([tmp_path / "c"], CLASSES)
    fc = torch.nn.Linear(4, 4)
    fc.weight.data, fc.bias.data = torch.eye(4), torch.zeros(4)
    right, wrong = torch.eye(3, 4), torch.eye(3, 4).roll(1, dims=0)
    labels = torch.arange(3)
    found = [Features(right, labels), Features(wrong, labels), Features(wrong, labels)]
    metrics = shifted_metrics("linear", fc, list(zip(parts, found, strict=True)))
    assert metrics == {
        "linear/c/top1": 25.0,  # fog 50, snow 0
        "linear/c/top5": 100.0,
        "linear/c/fog/top1": 50.0,
        "linear/c/snow/top1": 0.0,
    }


def test_only_the_classes_of_the_set_compete():
    fc = torch.nn.Linear(4, 4)
    fc.weight.data, fc.bias.data = torch.eye(4), torch.tensor([0.0, 9.0, 0.0, 0.0])
    values = torch.eye(4)[[0, 2]]
    assert fc(values).argmax(1).tolist() == [1, 1]
    assert restricted(fc, (0, 2))(values).argmax(1).tolist() == [0, 1]


def test_folders_that_do_not_fit_are_refused_in_one_line(tmp_path):
    folder = write_set(tmp_path / "set")
    (folder / "green").rename(folder / "grün")
    for folders, line in (
        ([folder], "1 of its 3 class folders are none of the training set's, first 'grün'"),
        ([tmp_path / "gone"], "gone: no such folder"),
        ([folder, tmp_path / "other/SET"], "two folders are called set"),
    ):
        with pytest.raises(UserError, match=line) as caught:
            open_shifted(folders, CLASSES)
        assert "\n" not in str(caught.value)
