import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from convert.errors import UserError
from pretrain import decoding
from pretrain.checks import check
from pretrain.config import PretrainConfig
from pretrain.embedded import embedded_root
from pretrain.faults import open_usable, skip_faulty, write_skipped
from pretrain.loop import train
from pretrain.monitor import read_log
from pretrain.sources import image_folder
from tests.conftest import ROOT
from tests.odd_images import broken_files, odd_files, write

PHOTOS = ROOT.parent / "shared/data/caltech101/train"  # beside the checkout, where it is
SMALL = PretrainConfig(
    arch="resnet18", mlp=True, tau=0.2, augmentation="v2", K=32, batch_size=16, image_size=32,
    epochs=2, workers=0, device="cpu", precision="fp32", max_bad_share=0.3, print_freq=1,
)  # fmt: skip


def mixed(source: Path, root: Path, classes: int, each: int) -> tuple[Path, Path]:
    """Write a set with 20 odd files in it, and the same one without the ten that are broken.

    The odd ones lie in the first class, the middle one and the last, so that the numbers of nearly
    all other images would move.
    """
    folders = sorted(path for path in source.iterdir() if path.is_dir())[:classes]
    whole = root / "clean/train"
    for folder in folders:
        (whole / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:each]:
            shutil.copy(file, whole / folder.name)
    photo = Image.open(next(iter(sorted((whole / folders[0].name).iterdir()))))
    places = (folders[0].name, folders[classes // 2].name, folders[-1].name)
    for i, (name, data) in enumerate(odd_files(photo).items()):
        write(whole / places[i % 3], {f"{i}_{name}": data})
    shutil.copytree(root / "clean", root / "mixed")
    for i, (name, data) in enumerate(broken_files(photo).items()):
        write(root / "mixed/train" / places[i % 3], {f"{i}_{name}": data})
    return root / "mixed", root / "clean"


def trained(data: Path, folder: Path, **changes):
    """Train as the script does; return the weights, the queue, and what was skipped."""
    config = replace(SMALL, data=str(data), **changes)
    images, _ = open_usable(config, quiet=True)
    path = train(check(config, len(images)), images, folder, quiet=True)
    content = torch.load(path, weights_only=True)
    return content["state_dict"], images.skipped


def assert_same_run(mixed, clean, tmp_path):
    with_bad, skipped = trained(mixed, tmp_path / "1", workers=1)
    without, none = trained(clean, tmp_path / "2")
    assert (len(skipped), len(none)) == (10, 0)
    assert with_bad.keys() == without.keys()
    for name, value in with_bad.items():
        assert torch.equal(value, without[name]), name
    losses = [[line["loss"] for line in read_log(tmp_path / run)] for run in "12"]
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 4


def test_broken_files_change_nothing_of_a_run_to_the_last_bit(tmp_path):
    pair = mixed(embedded_root() / "digits/train", tmp_path, classes=4, each=10)
    assert_same_run(*pair, tmp_path)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs at {PHOTOS}")
def test_broken_files_among_photographs_change_nothing_to_the_last_bit(tmp_path):
    assert_same_run(*mixed(PHOTOS, tmp_path, classes=6, each=6), tmp_path)


@pytest.fixture
def photos(tmp_path):
    """Twenty images and two broken files."""
    pixels = Image.effect_noise((40, 40), 90).convert("RGB")
    for label in "ab":
        folder = tmp_path / "set/train" / label
        folder.mkdir(parents=True)
        for i in range(10):
            pixels.rotate(9 * i).save(folder / f"{i}.png")
        (folder / "bad.jpg").write_text(f"page {label}")
    return tmp_path / "set"


@pytest.fixture
def read(monkeypatch):
    """How many files were decoded."""
    count = []
    fault_of = decoding.fault_of
    monkeypatch.setattr(decoding, "fault_of", lambda *w: (count.append(1), fault_of(*w))[1])
    return count


def usable(data, **changes):
    return open_usable(replace(SMALL, data=str(data), **changes), quiet=True)[0]


def test_a_file_is_judged_once_in_its_life(photos, read):
    assert (len(usable(photos)), len(read)) == (20, 22)
    read.clear()
    again = usable(photos)
    assert (len(again), len(read)) == (20, 0)
    assert [name.rpartition("/")[2] for name, _ in again.skipped] == ["bad.jpg", "bad.jpg"]
    Image.new("RGB", (40, 40)).save(photos / "train/a/new.png")
    assert (len(usable(photos)), len(read)) == (21, 1)
    (photos / "train/a/3.png").unlink()
    assert (len(usable(photos)), len(read)) == (20, 1)


def test_another_min_side_is_another_verdict(photos):
    assert len(usable(photos)) == 20
    Image.new("RGB", (70, 70)).save(photos / "train/a/large.png")
    Image.new("RGB", (70, 70)).save(photos / "train/b/large.png")
    large = usable(photos, min_side=64, max_bad_share=1.0)
    assert (len(large), large.labels) == (2, (0, 1))
    assert ("is 40 x 40 pixels, below min_side 64") in dict(large.skipped).values()
    assert len(usable(photos)) == 22


def test_a_broken_file_that_was_mended_in_its_place_is_seen(photos, read):
    for place in (photos, photos / "train", photos / "train/a"):
        os.utime(place, (1e9, 1e9))  # settled: what is remembered of it is trusted
    usable(photos)
    before = (photos / "train/a").stat().st_mtime_ns
    good = (photos / "train/a/1.png").read_bytes()
    (photos / "train/a/bad.jpg").write_bytes(good)
    assert (photos / "train/a").stat().st_mtime_ns == before
    assert len(usable(photos)) == 21
    assert len(usable(photos)) == 21


def test_workers_find_what_one_process_finds(photos, monkeypatch):
    monkeypatch.setattr("pretrain.faults.FEW", 0)
    monkeypatch.setattr("pretrain.faults.AT_ONCE", 5)
    images = image_folder(photos / "train")
    found = skip_faulty(images, min_side=9, max_bad_share=0.5, workers=2, quiet=True)
    monkeypatch.undo()
    alone = skip_faulty(images, min_side=10, max_bad_share=0.5, quiet=True)
    assert found.skipped == alone.skipped
    assert list(found.paths) == list(alone.paths)


def test_too_many_broken_files_stop_the_run_with_their_count_and_first_names(photos):
    for label in "ab":
        for i in range(4):
            (photos / f"train/{label}/{i}.png").write_text("cut")
    line = (
        r"10 of 22 cannot be used, 45.5%, and max_bad_share 0.3 allows 30%: "
        r".*a/0.png \(is no image\), .*a/1.png \(is no image\), .*a/2.png \(is no image\), \.\.\.; "
        r"mend or remove them, or raise max_bad_share"
    )
    for _ in range(2):  # found, and remembered
        with pytest.raises(UserError, match=line):
            usable(photos)
    assert len(usable(photos, max_bad_share=0.5)) == 12


def test_many_broken_files_are_not_read_to_the_end(photos, monkeypatch, read):
    monkeypatch.setattr("pretrain.faults.AT_ONCE", 4)
    for i in range(10):
        (photos / f"train/a/{i}.png").write_text("cut")
    with pytest.raises(UserError, match=r"8 of the first 8 \(of 22\) cannot be used"):
        usable(photos)
    assert len(read) == 8
    with pytest.raises(UserError, match=r"8 of the first 8 \(of 22\) cannot be used"):
        usable(photos)  # what was read is remembered
    assert len(read) == 8


def test_a_file_that_cannot_be_read_is_no_broken_one(photos, monkeypatch):
    read_bytes = Path.read_bytes

    def refuse(path):
        if path.name == "3.png":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        UserError, match=r"a/3.png: cannot be read \(Permission denied\) \(and 1 mor"
    ):
        usable(photos)
    monkeypatch.undo()
    assert len(usable(photos)) == 20  # and was not remembered as one


def test_one_image_that_is_left_is_too_few(tmp_path):
    write(tmp_path / "set", {"a.jpg": b"x", "b.jpg": b"y"})
    Image.new("RGB", (20, 20)).save(tmp_path / "set/c.png")
    with pytest.raises(UserError, match=r"one image is left, .*c.png, and 2 cannot be used"):
        usable(tmp_path / "set", max_bad_share=1.0)
    (tmp_path / "set/c.png").unlink()
    with pytest.raises(UserError, match=r"2 of 2 cannot be used, 100\.0%"):
        usable(tmp_path / "set", max_bad_share=1.0)


def test_broken_images_to_vote_on_are_left_out_too(photos, tmp_path):
    shutil.copytree(photos / "train", photos / "val")
    train_part, val = open_usable(replace(SMALL, data=str(photos)), quiet=True)
    assert (len(val), val.classes, len(val.labels)) == (20, ("a", "b"), 20)
    assert write_skipped(tmp_path, train_part, val) == 4
    lines = (tmp_path / "skipped.txt").read_text().splitlines()
    assert lines[0] == f"{photos}/train/a/bad.jpg\tis no image"
    assert lines[3].startswith(f"{photos}/val/b/bad.jpg")
    clean, _ = train_part.without({0: "x"}), val
    assert write_skipped(tmp_path, replace(clean, skipped=())) == 0
    assert not (tmp_path / "skipped.txt").exists()


def test_addresses_with_nothing_behind_them_are_counted(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    for i in range(3):
        data = (embedded_root() / "digits/train/0").iterdir()
        fsspec.filesystem("memory").pipe(f"/faults/{i}.png", next(data).read_bytes())
    file = tmp_path / "list.txt"
    file.write_text("".join(f"memory://faults/{i}.png\n" for i in range(5)))
    with pytest.raises(UserError, match=r"2 of 5 files are missing: memory://faults/3.png, memo"):
        usable(file, max_bad_share=1.0)
    file.write_text("".join(f"memory://faults/{i}.png\n" for i in range(3)))
    assert len(usable(file)) == 3


TOGETHER = """
import json, sys
from pretrain import distributed, faults
from pretrain.config import PretrainConfig
faults.AT_ONCE = 4
config = PretrainConfig(data=sys.argv[1], max_bad_share=0.5, workers=0)
with distributed.group(distributed.Launch(timeout_s=120), "cpu"):
    images, _ = faults.open_usable(config, quiet=True)
    told = [list(images.names), list(images.labels), images.skipped]
    same = distributed.collect(told)
    if distributed.rank() == 0:
        assert same[0] == same[1]
        print(json.dumps(told))
"""


def test_two_processes_share_the_work_and_agree(photos, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", TOGETHER, str(photos)]
    both = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | place | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    alone = usable(photos, max_bad_share=0.5)
    names, labels, skipped = json.loads(told[0].splitlines()[-1])
    assert names == list(alone.names)
    assert labels == list(alone.labels)
    assert skipped == [list(pair) for pair in alone.skipped]
