import os
import time

import numpy as np
import pytest
from PIL import Image

from convert.errors import UserError
from pretrain import listing
from pretrain.listing import Names, Paths, files_of, list_tree, stamp_files
from pretrain.sources import open_set

JPG = (".jpg",)


@pytest.fixture
def folder(tmp_path):
    for name in ("b/2.jpg", "a/1.jpg", "a/deep/3.JPG", "a/notes.txt", "a/._1.jpg", ".cache/4.jpg"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "set"


def settle(folder):
    """Let a folder's last change lie further back than a clock's tick."""
    past = time.time() - 100
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (past, past), follow_symlinks=False)


def names(folder, remember=True):
    return files_of(list_tree(folder, JPG, remember=remember))[0]


@pytest.fixture
def looks(monkeypatch):
    """The folders that were read and not remembered."""
    seen = []
    look = listing._look
    monkeypatch.setattr(
        listing, "_look", lambda *words: (seen.append(words[0].name), look(*words))[1]
    )
    return seen


def test_files_are_found_at_any_depth_and_hidden_ones_left_out(folder):
    assert names(folder) == ["a/1.jpg", "a/deep/3.JPG", "b/2.jpg"]
    tree = list_tree(folder, JPG)
    assert files_of(tree, "a")[0] == ["a/1.jpg", "a/deep/3.JPG"]
    assert files_of(tree)[1][0].tolist() == [7, (folder / "a/1.jpg").stat().st_mtime_ns]


def test_an_unchanged_folder_is_not_read_again(folder, looks):
    settle(folder)
    before = names(folder)
    assert sorted(looks) == ["a", "b", "deep", "set"]
    looks.clear()
    assert names(folder) == before
    assert looks == []
    assert names(folder, remember=False) == before
    assert sorted(looks) == ["a", "b", "deep", "set"]


@pytest.mark.parametrize(
    "change", ["add", "remove", "rename", "replace", "new folder", "no folder"]
)
def test_only_a_changed_folder_is_read_again(folder, looks, change):
    settle(folder)
    names(folder)
    looks.clear()
    deep = folder / "a/deep"
    read = ["deep"]
    if change == "add":
        (deep / "5.jpg").write_text("x")
    elif change == "remove":
        (deep / "3.JPG").unlink()
    elif change == "rename":
        (deep / "3.JPG").rename(deep / "0.jpg")
    elif change == "replace":
        (folder.parent / "other").write_text("longer than before")
        (folder.parent / "other").rename(deep / "3.JPG")
    elif change == "new folder":
        (deep / "new").mkdir()
        (deep / "new/6.jpg").write_text("x")
        read = ["deep", "new"]
    else:
        (deep / "3.JPG").unlink()
        deep.rmdir()
        read = ["a"]
    tree = list_tree(folder, JPG, remember=True)
    assert sorted(looks) == read
    fresh = list_tree(folder, JPG)
    assert files_of(tree)[0] == files_of(fresh)[0]
    assert np.array_equal(files_of(tree)[1], files_of(fresh)[1])


def test_a_folder_that_changed_just_now_is_not_trusted(folder, looks):
    settle(folder)
    (folder / "a/9.jpg").write_text("x")
    names(folder)
    looks.clear()
    names(folder)
    assert looks == ["a"]


def test_links_are_followed_and_a_circle_ends(folder):
    (folder / "b/again").symlink_to(folder / "a")
    (folder / "a/up").symlink_to(folder)
    (folder / "a/gone.jpg").symlink_to(folder / "nowhere.jpg")
    found = names(folder)
    assert "b/again/1.jpg" in found
    assert len(found) == len(set(found)) < 20
    stamps = dict(zip(found, files_of(list_tree(folder, JPG))[1].tolist(), strict=True))
    assert stamps["a/gone.jpg"] == [-1, -1]


def test_a_broken_memory_costs_time_and_nothing_else(folder, cache, looks):
    settle(folder)
    before = names(folder)
    for file in (cache / "images").glob("listing-*.json"):
        file.write_text("{")
    looks.clear()
    assert names(folder) == before
    assert len(looks) == 4


def test_files_of_a_list_are_looked_at_again_when_their_folder_changed(folder, monkeypatch):
    paths = [folder / "a/1.jpg", folder / "b/2.jpg", folder / "b/gone.jpg"]
    assert stamp_files(paths)[2].tolist() == [-1, -1]
    (folder / "b/gone.jpg").write_text("here")
    assert stamp_files(paths)[:, 0].tolist() == [7, 7, 4]
    settle(folder)
    stamps = stamp_files(paths)
    monkeypatch.setattr(listing, "stamp", None)  # nobody looks
    assert np.array_equal(stamp_files(paths), stamps)


def test_compact_names_are_the_names(tmp_path):
    words = ["a", "", "é/ü.jpg", os.fsdecode(b"\xff.jpg"), "z"]
    packed = Names(words)
    assert list(packed) == words
    assert (packed[-1], packed[1:3]) == ("z", words[1:3])
    assert Paths(tmp_path, words)[2] == tmp_path / "é/ü.jpg"
    with pytest.raises(IndexError):
        packed[5]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone: cannot be listed \(No such file"):
        list_tree(tmp_path / "gone", JPG)


def test_a_set_is_opened_from_memory_as_from_the_disk(tmp_path, looks):
    for label in "ab":
        for i in range(3):
            path = tmp_path / "train" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(path)
    settle(tmp_path)
    first, _ = open_set(str(tmp_path))
    looks.clear()
    second, _ = open_set(str(tmp_path))
    assert looks == []
    assert list(first.paths) == list(second.paths)
    assert first.labels == second.labels == (0, 0, 0, 1, 1, 1)
    assert first.listing_hash() == second.listing_hash()
