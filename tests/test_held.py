"""Small sets that lie decoded on the device give what their files give."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from convert.errors import UserError
from convert.files import ROOT
from pretrain import held
from pretrain.loader import DEVICE, Views, collate, on_device
from pretrain.sources import ImageList, image_folder
from pretrain.views import AUGMENTATIONS
from pretrain.workers import load

CPU = torch.device("cpu")
PLACES = [[(0, 4), (0, 1), (0, 9)], [(1, 3), (1, 4), (1, 0)]]


def write(folder: Path, count: int = 10, size: tuple[int, int] = (40, 30)) -> ImageList:
    for index in range(count):
        path = folder / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise(size, 10 + 9 * index).convert("RGB").save(path)
    return image_folder(folder)


def views_of(images: ImageList) -> Views:
    return Views(images, AUGMENTATIONS["v2"], 32, seed=2, backend=DEVICE)


@pytest.mark.parametrize("workers", [0, 2])
def test_views_of_a_held_set_are_those_of_its_files(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(held, "AT_ONCE", 4)  # and a last part of two
    views = views_of(write(tmp_path))
    pixels = held.hold(views, CPU, workers)
    assert pixels is not None
    assert pixels.shape == (10, 30, 40, 3)
    ours = list(held.batches(views, pixels, PLACES, workers))
    theirs = list(load(views, PLACES, 0, collate))
    assert len(ours) == len(theirs) == 2
    for our, their in zip(ours, theirs, strict=True):
        made = [on_device(batch, CPU, 32) for batch in (our, their)]
        assert all(torch.equal(*pair) for pair in zip(*made, strict=True))


def test_a_held_set_is_not_read_again(tmp_path):
    views = views_of(write(tmp_path))
    pixels = held.hold(views, CPU, 0)
    assert pixels is not None
    for path in views.images.paths:
        path.unlink()
    assert len(list(held.batches(views, pixels, PLACES, 0))) == 2


def test_large_images_images_of_two_sizes_and_large_sets_are_not_held(tmp_path, monkeypatch):
    for name, sizes in {"large": [(200, 30)], "odd": [(40, 30), (30, 40)]}.items():
        (tmp_path / name).mkdir()
        for size in sizes:
            (tmp_path / name / f"{size[0]}").mkdir()
            images = write(tmp_path / name / f"{size[0]}", size=size)
        assert held.hold(views_of(image_folder(tmp_path / name)), CPU, 0) is None
    assert held.hold(views_of(images), CPU, 0) is not None
    monkeypatch.setattr(held, "MOST_BYTES", 10 * 30 * 40 * 3 - 1)
    assert held.hold(views_of(images), CPU, 0) is None


def test_a_broken_image_is_named_before_the_first_step(tmp_path):
    images = write(tmp_path)
    images.paths[7].write_bytes(b"no image")
    with pytest.raises(UserError, match=r"5\.png: cannot be decoded"):
        held.hold(views_of(images), CPU, 0)


STEPS = """
import resource, sys, torch
from convert.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def step():
    for megabytes in (40, 3, 50, 2):
        torch.ones(megabytes * 2**18)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_taken_again_without_page_faults():
    faults = {}
    for word in ("kept", "given"):
        command = [sys.executable, "-c", STEPS, word]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        faults[word] = int(done.stdout)
    assert faults["given"] > 10_000
    assert faults["kept"] < faults["given"] / 4
