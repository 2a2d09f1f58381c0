"""VOC 2012 and Cityscapes as pairs of a photograph and an image of class numbers.

Layouts, below the folder that is named:
    voc12: JPEGImages/*.jpg, ImageSets/Segmentation/SPLIT.txt, and class numbers in
        SegmentationClassAug/*.png (of the train_aug list) or SegmentationClass/*.png; in the folder
        itself, its VOC2012/, or its VOCdevkit/VOC2012/
    cityscapes: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and, beside leftImg8bit/,
        gtFine/SPLIT/CITY/*_gtFine_labelIds.png; in the folder itself, or its cityscapes/
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convert.errors import UserError
from pretrain.sources import read_image

IGNORED = 255  # pixels that neither train nor count
VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
CITY_CLASSES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
# The evaluated ones among Cityscapes' 34 label ids, in the order of its 19 training ids.
CITY_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITY_KNOWN = range(34)
PUBLISHED = {"voc12": (10_582, 1_449), "cityscapes": (2_975, 500)}
LAYOUTS = tuple(PUBLISHED)

Labels = NDArray[np.uint8]  # (H, W), class numbers and IGNORED


@dataclass(frozen=True)
class Pairs:
    """One split of a set.

    Attributes:
        layout: `voc12` or `cityscapes`. split: its name.
        images, labels: files, in the same order.
    """

    layout: str
    split: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, in the order of their numbers."""
        return VOC_CLASSES if self.layout == "voc12" else CITY_CLASSES

    def read(self, index: int) -> tuple[Image.Image, Labels]:
        """Return a photograph, RGB, and its class numbers, of the same size.

        Raises:
            UserError: a file cannot be read, the sizes differ, or a number is no class.
        """
        image = read_image(self.images[index])
        file = self.labels[index]
        try:
            with Image.open(file) as opened:
                ids: Labels = np.asarray(opened)
        except (OSError, ValueError) as error:
            raise UserError(f"label image {file}: cannot be read ({error})") from error
        if ids.shape != image.size[::-1]:
            raise UserError(
                f"label image {file}: has shape {ids.shape}, its photograph {image.size[::-1]}; "
                "want one class number a pixel"
            )
        return image, self._numbers(ids, file)

    def record(self) -> dict[str, Any]:
        """Describe the split for a record."""
        lines = "\n".join(f"{image.name} {label.name}" for image, label in self._named)
        listing = hashlib.sha256(lines.encode()).hexdigest()[:12]
        return {"names": [f"{self.layout} {self.split}"], "images": len(self), "listing": listing}

    @property
    def _named(self) -> list[tuple[Path, Path]]:
        return list(zip(self.images, self.labels, strict=True))

    @cached_property
    def _table(self) -> Labels:
        """The class number of every id that a file may hold; 254 for an id that is none."""
        table: Labels = np.full(256, 254, np.uint8)
        table[IGNORED] = IGNORED
        if self.layout == "voc12":
            table[: len(VOC_CLASSES)] = np.arange(len(VOC_CLASSES))
        else:
            table[list(CITY_KNOWN)] = IGNORED
            table[list(CITY_IDS)] = np.arange(len(CITY_IDS))
        return table

    def _numbers(self, ids: Labels, file: Path) -> Labels:
        numbers: Labels = self._table[ids]
        unknown = np.unique(ids[numbers == 254])
        if len(unknown):
            known = "0 to 20" if self.layout == "voc12" else "0 to 33"
            raise UserError(
                f"label image {file}: holds id {unknown[0]}, want {known}, or {IGNORED} for ignored"
            )
        return numbers


def open_pairs(layout: str, folder: Path | None, split: str) -> Pairs:
    """List one split.

    Args:
        layout: one of `LAYOUTS`.
        folder: where the set lies.
        split: `train_aug`, `val` and the like for voc12; `train`, `val` for cityscapes.

    Raises:
        UserError: the folder is missing or laid out otherwise, or files are missing.
    """
    if folder is None:
        raise UserError(f"images: no folder was named; want one in the layout of {layout}")
    if not folder.is_dir():
        raise UserError(f"images {folder}: no such folder")
    opened = _voc if layout == "voc12" else _cityscapes
    images, labels = opened(folder, split)
    missing = [path for path in (*images, *labels) if not path.is_file()]
    if missing:
        raise UserError(
            f"images {folder}: {len(missing)} of {2 * len(images)} files of {split} are missing, "
            f"first {missing[0]}"
        )
    return Pairs(layout, split, tuple(images), tuple(labels))


def _voc(folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    root = _first(folder, ("", "VOC2012", "VOCdevkit/VOC2012"), "JPEGImages")
    file = root / "ImageSets/Segmentation" / f"{split}.txt"
    if not file.is_file():
        more = ""
        if split == "train_aug":
            more = (
                "; it lists the 10,582 images of VOC 2012 train and of the Semantic Boundaries "
                "Dataset, whose labels belong into SegmentationClassAug/; or set train_split train"
            )
        raise UserError(f"images {file}: no such list{more}")
    names = file.read_text(encoding="utf-8").split()
    if not names:
        raise UserError(f"images {file}: names no image")
    augmented = "SegmentationClassAug" if split.endswith("_aug") else "SegmentationClass"
    images = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    return images, [root / augmented / f"{name}.png" for name in names]


def _cityscapes(folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    root = _first(folder, ("", "cityscapes"), "leftImg8bit")
    if not (root / "gtFine" / split).is_dir():
        raise UserError(
            f"images {root}: has no gtFine/{split}; want Cityscapes' fine annotations beside "
            "leftImg8bit"
        )
    images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    if not images:
        raise UserError(f"images {root}/leftImg8bit/{split}: holds no CITY/*_leftImg8bit.png")
    labels = [
        root / "gtFine" / split / image.parent.name / image.name.replace("leftImg8bit", _CITY_LABEL)
        for image in images
    ]
    return images, labels


def _first(folder: Path, places: Sequence[str], wanted: str) -> Path:
    for place in places:
        if (folder / place / wanted).is_dir():
            return folder / place
    raise UserError(f"images {folder}: has no {wanted}/ in it; is it another layout?")


_CITY_LABEL = "gtFine_labelIds"
