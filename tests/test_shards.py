import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.errors import UserError
from pretrain import shards
from pretrain.checks import check
from pretrain.config import PretrainConfig
from pretrain.embedded import embedded_root
from pretrain.faults import open_usable
from pretrain.loop import train
from pretrain.shards import expand
from pretrain.sources import open_set

COUNT, EACH = 3, 16


def pack(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    """Write a tar."""
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def digits() -> list[bytes]:
    files = sorted((embedded_root() / "digits/train").rglob("*.png"))
    return [file.read_bytes() for file in files[:: len(files) // (COUNT * EACH)][: COUNT * EACH]]


@pytest.fixture
def folder(tmp_path, digits):
    """Three shards of sixteen digits, each with its class beside it."""
    place = tmp_path / "shards"
    place.mkdir()
    for s in range(COUNT):
        members = []
        for i in range(EACH):
            key = f"part/{s}_{i:03d}"
            members += [
                (f"{key}.png", digits[s * EACH + i]),
                (f"{key}.cls", f"{i % 3 * 5}".encode()),
            ]
        pack(place / f"{s:02d}.tar", members)
    return place


def test_shards_hold_the_images_that_were_packed_in_their_order(folder, digits):
    images, val = open_set(str(folder))
    assert (len(images), val) == (COUNT * EACH, None)
    assert [images.data(i) for i in range(len(images))] == digits
    assert images.name(17) == f"{folder}/01.tar:part/1_001.png"
    assert (images.classes, images.labels[:4]) == (("0", "5", "10"), (0, 1, 2, 0))
    left = images.without({0: "is empty"})
    assert (len(left), left.labels[0], left.data(0)) == (len(digits) - 1, 1, digits[1])


@pytest.mark.parametrize("pattern", ["{00..02}.tar", "0{0,1,2}.tar", "*.tar", "0[012].tar"])
def test_a_pattern_names_the_same_shards(folder, digits, pattern):
    images, _ = open_set(f"{folder}/{pattern}")
    assert [path.name for path in images.paths] == ["00.tar", "01.tar", "02.tar"]
    assert images.data(40) == digits[40]


def test_one_shard_is_a_set(folder):
    assert len(open_set(f"{folder}/01.tar")[0]) == EACH


def test_shards_of_train_and_val_may_lie_in_a_set(folder, tmp_path):
    for part, name in (("train", "00.tar"), ("train", "01.tar"), ("val", "02.tar")):
        (tmp_path / "set" / part).mkdir(parents=True, exist_ok=True)
        (folder / name).rename(tmp_path / "set" / part / name)
    images, val = open_set(str(tmp_path / "set"))
    assert (len(images), len(val), images.classes) == (2 * EACH, EACH, val.classes)


def test_a_shard_is_read_through_once_in_its_life(folder, monkeypatch):
    first, _ = open_set(str(folder))
    read = []
    index = shards._index
    monkeypatch.setattr(shards, "_index", lambda path: (read.append(path.name), index(path))[1])
    again, _ = open_set(str(folder))
    assert (read, list(again.names)) == ([], list(first.names))
    pack(folder / "01.tar", [("a.png", first.data(3)), ("b.webp", first.data(4))])
    with pytest.raises(UserError, match="2 of 34 images have no class"):
        open_set(str(folder))
    assert read == ["01.tar"]


def test_keys_group_files_and_what_is_no_image_is_left_alone(tmp_path, digits):
    members = [
        ("a/1.jpg", digits[0]),
        ("a/1.json", json.dumps({"label": "cat", "url": "x"}).encode()),
        ("a/1.seg.png", digits[1]),  # WebDataset: another part of sample a/1
        ("b/1.PNG", digits[2]),
        ("b/1.json", json.dumps({"label": "dog"}).encode()),
        ("._b.png", digits[3]),
        ("notes.txt", b"no image"),
        ("long/" + "x" * 150 + ".png", digits[4]),
        ("long/" + "x" * 150 + ".cls", b"cat"),
    ]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        images, _ = open_set(str(pack(tmp_path / f"{form}.tar", members, format=form)))
        assert [images.data(i) for i in range(len(images))] == [digits[i] for i in (0, 2, 4)]
        assert (images.classes, images.labels) == (("cat", "dog"), (0, 1, 0))


def test_each_bad_shard_gets_its_line(folder, tmp_path, digits):
    whole = (folder / "01.tar").read_bytes()
    with tarfile.open(folder / "01.tar") as archive:
        members = archive.getmembers()
    tenth = members[10]
    changed = bytearray(whole)
    changed[tenth.offset + 150] ^= 1  # in its header's checksum
    for data, line in (
        (whole[: tenth.offset_data + 100], r"01.tar: ends in the middle: 10 files could be read, "
         rf"up to byte {tenth.offset} of the {tenth.offset_data + 100} there are, and part/1_005"),
        (whole[: tenth.offset + 100], rf"ends in the middle: 10 files could be read, up to byte "
         rf"{tenth.offset} of"),
        (whole[: tenth.offset], "ends in the middle: 10 files could be read"),
        (bytes(changed), rf"is damaged after 10 files, at byte {tenth.offset} of {len(whole)}"),
        (b"no tar at all" * 100, "is no tar file after 0 files"),
        (b"", "is no tar file after 0 files"),
    ):  # fmt: skip
        (folder / "01.tar").write_bytes(data)
        with pytest.raises(UserError, match=line):
            open_set(str(folder))
    (folder / "01.tar").unlink()
    with pytest.raises(UserError, match=r"1 of 3 are missing: .*01.tar; want .tar files"):
        open_set(f"{folder}/{{00..02}}.tar")
    with pytest.raises(UserError, match=r"0 of 0 are missing: none is found"):
        open_set(f"{folder}/9*.tar")
    pack(folder / "01.tar", [("a.txt", b"x")], format=tarfile.GNU_FORMAT)
    with pytest.raises(UserError, match=r"1 shards, .*01.tar, hold no image"):
        open_set(f"{folder}/01.tar")
    with tarfile.open(folder / "01.tar", "w:gz") as archive:
        archive.add(folder / "00.tar")
    with pytest.raises(UserError, match=r"01.tar: is packed with gzip"):
        open_set(str(folder))
    (folder / "loose.png").write_bytes(digits[0])
    with pytest.raises(UserError, match=r"3 .tar shards and loose images"):
        open_set(str(folder))


def test_a_shard_that_shrinks_later_is_named(folder):
    images, _ = open_set(str(folder))
    (folder / "02.tar").write_bytes((folder / "02.tar").read_bytes()[:3000])
    with pytest.raises(UserError, match=r"02.tar: byte \d+: cannot be read \(the shard is shorter"):
        images.read(47)


def test_braces_count_and_multiply(tmp_path):
    for name in ("a-008.tar", "a-009.tar", "a-010.tar", "b-008.tar", "b-009.tar", "b-010.tar"):
        (tmp_path / name).touch()
    found = expand(str(tmp_path / "{a,b}-{008..010}.tar"))
    assert [path.name for path in found] == sorted(path.name for path in tmp_path.iterdir())


SMALL = PretrainConfig(
    arch="resnet18", K=16, batch_size=8, image_size=32, epochs=2, workers=0, device="cpu",
    precision="fp32", print_freq=1, leak=True, bn_groups=1, max_bad_share=0.1,
)  # fmt: skip


def run(data, folder, **changes):
    """Train with or without a stop; return the weights."""
    from pretrain.checkpoint import find_resume

    config = replace(SMALL, data=str(data), **changes)
    images, _ = open_usable(config, quiet=True)
    config = check(config, len(images))
    path = train(config, images, folder, resume=find_resume("auto", folder), quiet=True)
    return torch.load(path, weights_only=True)["state_dict"], images


def test_shards_train_as_the_folder_they_were_packed_from_and_go_on_exactly(
    folder, tmp_path, digits
):
    bad = [("part/1_zzz.png", digits[0][:200]), ("part/1_zzz.cls", b"5")]
    with tarfile.open(folder / "01.tar", "a") as archive:
        for name, data in bad:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    loose = tmp_path / "loose"
    loose.mkdir()
    for i, data in enumerate(digits):
        (loose / f"{i:03d}.png").write_bytes(data)
    plain, _ = run(loose, tmp_path / "0")
    run(folder, tmp_path / "1", max_steps=4)  # stopped within the first epoch of six steps
    packed, images = run(folder, tmp_path / "1", workers=2)
    assert [name for name, _ in images.skipped] == [f"{folder}/01.tar:part/1_zzz.png"]
    for name, value in plain.items():
        assert torch.equal(value, packed[name]), name


def test_a_memory_bank_has_an_entry_for_each_image_of_shards(folder, tmp_path):
    state, images = run(folder, tmp_path / "1", dictionary="bank", epochs=1)
    assert state["module.bank"].shape[0] == len(images) == COUNT * EACH
    assert np.isfinite(state["module.bank"].numpy()).all()
