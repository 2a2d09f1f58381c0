"""Small inputs of the classification tests: images of a few colours, a ResNet-18 that saw some."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from convert.files import ROOT

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}


def write_images(root: Path, train: int = 8, val: int = 4, seed: int = 0) -> Path:
    """Write `train/` and `val/` with a folder a colour and so many images in each.

    Every image has a tint and noise of its own, so that some are mistaken for another colour.
    """
    draw = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = draw.normal(0, 70, 3) + draw.normal(0, 50, (40, 48, 3))
                pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def write_resnet18(path: Path, seed: int = 0) -> Path:
    """Write a torchvision ResNet-18 whose batch norms have seen images of unit variance."""
    torch.manual_seed(seed)
    network = torchvision.models.resnet18()
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.randn(16, 3, 32, 32))
    torch.save(network.state_dict(), path)
    return path


# Image -> its objects, (class, difficult); 0 to 5 are trainval (3 to 5 val), 6 and 7 test.
VOC_OBJECTS = (
    [("cat", 0)],
    [("cat", 1), ("cat", 0), ("dog", 0)],
    [("cat", 1), ("dog", 0)],
    [("dog", 0)],
    [("cat", 0), ("dog", 1)],
    [],
    [("cat", 0)],
    [("dog", 0)],
)


def write_voc(root: Path, objects: Sequence[list[tuple[str, int]]] = VOC_OBJECTS) -> Path:
    """Write a VOC2007 folder; an image is as red as it has cats, as blue as it has dogs.

    Args:
        root: VOC2007 itself.
        objects: of each image; the first three quarters are trainval, the second half of it val.
    """
    draw = np.random.default_rng(0)
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, found in enumerate(objects):
        tags = "".join(
            f"<object><name>{n}</name><difficult>{d}</difficult></object>" for n, d in found
        )
        (root / f"Annotations/{i}.xml").write_text(f"<annotation>{tags}</annotation>")
        labels = {n for n, _ in found}
        colour = np.array([60 + 130 * ("cat" in labels), 60, 60 + 130 * ("dog" in labels)])
        pixels = (colour + draw.normal(0, 40, (40, 48, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"JPEGImages/{i}.jpg")
    cut = len(objects) * 3 // 4
    for part, numbers in (
        ("trainval", range(cut)),
        ("val", range(cut // 2, cut)),
        ("test", range(cut, len(objects))),
    ):
        text = "".join(f"{i}\n" for i in numbers)
        (root / f"ImageSets/Main/{part}.txt").write_text(text)
    return root


def photographs(name: str) -> Path:
    """Return a set of photographs in the folder that MOCO_TRANSFER_TEST_DATA names, or skip."""
    folder = os.environ.get("MOCO_TRANSFER_TEST_DATA")
    if folder is None or not (Path(folder) / name).is_dir():
        pytest.skip(f"no {name} in the folder that MOCO_TRANSFER_TEST_DATA names")
    return Path(folder) / name


def on_processes(
    count: int, script: str, *words: object, folder: Path
) -> "subprocess.CompletedProcess[str]":
    """Run a script by torchrun on so many processes of this machine, in a folder."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *torchrun, str(ROOT / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to write more than so many bytes to a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
