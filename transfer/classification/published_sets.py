"""Published classification sets, found on disk as their makers or torchvision lay them out.

Nothing is downloaded. A reader takes a folder and returns its parts, or None where the folder is
no such set; a set that is there but incomplete is refused in one line.
"""

import hashlib
import json
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convert.errors import UserError
from convert.reading import read_file
from pretrain.sources import ImageList, image_folder
from pretrain.views import generator
from transfer.classification.tags import ABSENT, DIFFICULT, PRESENT

CALTECH_TRAIN = 30  # images a class, drawn; the rest is judged (SimCLR, arXiv:2002.05709, B.8.1)
CALTECH_BACKGROUND = "BACKGROUND_Google"


@dataclass(frozen=True)
class ListedImages(ImageList):
    """Images whose classes stand in a list and not in their folders' names."""

    def listing_hash(self) -> str:
        """Hash names, classes and sizes of all files."""
        lines = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            name = path.relative_to(self.root)
            lines.update(f"{name}\t{path.stat().st_size}\t{self.classes[label]}\n".encode())
        return lines.hexdigest()


@dataclass(frozen=True, kw_only=True)
class TaggedImages(ImageList):
    """Images with any number of classes each.

    Attributes:
        labels: the place of each image, 0, 1, ...: the row of `tags` that is its own.
        tags: (N, C) PRESENT, DIFFICULT (every object of the class is marked so) or ABSENT.
    """

    tags: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def listing_hash(self) -> str:
        """Hash names, sizes and tags."""
        names = "".join(f"{p.relative_to(self.root)}\t{p.stat().st_size}\n" for p in self.paths)
        return hashlib.sha256(names.encode() + self.tags.astype(np.int8).tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PackedImages(ImageList):
    """Images that lie together in a few files.

    Attributes:
        paths: the file of each image. pixels: (N, H, W, 3) uint8, RGB.
    """

    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 1, 3), np.uint8))

    def read(self, index: int) -> Image.Image:
        """Return one image."""
        return Image.fromarray(self.pixels[index])

    def listing_hash(self) -> str:
        """Hash pixels and classes."""
        found = hashlib.sha256(np.ascontiguousarray(self.pixels).data)
        found.update(np.array(self.labels, np.int64).data)
        return found.hexdigest()


@dataclass(frozen=True)
class Parts:
    """What a reader found.

    Attributes:
        name: the set's. train, val: what is learnt from, what is judged on.
        apart: places in `train` that its makers set apart for choosing; empty: none.
        metric: what its protocol reports: top1, mean_per_class or mAP.
    """

    name: str
    train: ImageList
    val: ImageList
    apart: tuple[int, ...] = ()
    metric: str = "top1"


def voc07(root: Path) -> Parts | None:
    """VOC2007 classification: trainval is learnt from, test is judged (arXiv:1905.01235, Sec. 6).

    `root` is VOC2007 itself, or holds it, or holds VOCdevkit. Tags come from the annotations: a
    class whose every object in an image is marked difficult is neither present nor absent there.
    """
    likely = [root, root / "VOC2007", root / "VOCdevkit" / "VOC2007"]
    found = next((p for p in likely if (p / "ImageSets" / "Main").is_dir()), None)
    if found is None:
        return None
    names = {part: _lines(found / "ImageSets" / "Main" / f"{part}.txt") for part in VOC_PARTS}
    objects = {n: _voc_objects(found, n) for part in VOC_PARTS for n in names[part]}
    classes = [sorted({c for n in names[part] for c in objects[n]}) for part in VOC_PARTS]
    if classes[0] != classes[1]:
        only = sorted(set(classes[0]) ^ set(classes[1]))
        raise UserError(
            f"images {found}: class '{only[0]}' is in one of trainval and test only; want the "
            "same classes in both"
        )
    train, val = (_tagged(found, names[part], objects, classes[0]) for part in VOC_PARTS)
    chosen = _optional_lines(found / "ImageSets" / "Main" / "val.txt")
    place = {name: i for i, name in enumerate(names["trainval"])}
    apart = tuple(place[name] for name in chosen if name in place)
    return Parts("VOC2007", train, val, apart, "mAP")


VOC_PARTS = ("trainval", "test")


def _voc_objects(root: Path, name: str) -> dict[str, int]:
    """Return the classes in an image, PRESENT or DIFFICULT."""
    path = root / "Annotations" / f"{name}.xml"
    try:
        boxes = xml.parse(path).getroot().findall("object")
        pairs = [(box.findtext("name", ""), int(box.findtext("difficult", "0"))) for box in boxes]
    except (OSError, ValueError, xml.ParseError) as error:
        raise UserError(
            f"annotation {path}: cannot be read ({error}); mend or remove it"
        ) from error
    seen: dict[str, int] = {}
    for label, difficult in pairs:
        seen[label] = max(seen.get(label, DIFFICULT), DIFFICULT if difficult else PRESENT)
    return seen


def _tagged(
    root: Path, names: Sequence[str], objects: dict[str, dict[str, int]], classes: list[str]
) -> TaggedImages:
    rows = [[objects[name].get(label, ABSENT) for label in classes] for name in names]
    tags = np.array(rows, np.int64)
    for place, label in enumerate(classes):
        if not (tags[:, place] == PRESENT).any():
            raise UserError(
                f"images {root}: class '{label}' has no image in one part where it is not difficult"
            )
    paths = tuple(root / "JPEGImages" / f"{name}.jpg" for name in names)
    places = tuple(range(len(paths)))
    return TaggedImages(root, _present(paths, root), places, tuple(classes), tags=tags)


def cifar(root: Path) -> Parts | None:
    """CIFAR-10 or -100 as its makers' Python batches, in `root` or where torchvision puts them."""
    for folder, files, key in CIFAR_LAYOUTS:
        for place in (root, root / folder):
            if (place / files[0][0]).is_file() and (place / files[2][0]).is_file():
                names = _batch(place / files[2][0])
                listed = names.get("fine_label_names") or names.get("label_names") or ()
                classes = tuple(n.decode() if isinstance(n, bytes) else str(n) for n in listed)
                train, val = (_packed(place, part, key, classes) for part in files[:2])
                return Parts("CIFAR-100" if "fine" in key else "CIFAR-10", train, val)
    return None


CIFAR_LAYOUTS = (
    (
        "cifar-10-batches-py",
        (tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), ("batches.meta",)),
        "labels",
    ),
    ("cifar-100-python", (("train",), ("test",), ("meta",)), "fine_labels"),
)


def _batch(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"images {path}: no such file; CIFAR's batches want it")
    values = read_file(path).values
    if not isinstance(values, dict):
        raise UserError(f"images {path}: is no batch of CIFAR")
    return {k.decode() if isinstance(k, bytes) else str(k): v for k, v in values.items()}


def _packed(root: Path, names: Sequence[str], key: str, classes: Sequence[str]) -> PackedImages:
    paths, labels, pixels = [], [], []
    for name in names:
        content = _batch(root / name)
        try:
            flat = np.asarray(content["data"], np.uint8).reshape(-1, 3, 32, 32)
            found = [int(label) for label in content[key]]
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"images {root / name}: is no batch of CIFAR ({error})") from error
        if len(found) != len(flat) or not set(found) <= set(range(len(classes))):
            raise UserError(f"images {root / name}: its labels do not fit its images and classes")
        paths += [root / name] * len(found)
        labels += found
        pixels.append(flat.transpose(0, 2, 3, 1))
    joined = np.concatenate(pixels)
    return PackedImages(root, tuple(paths), tuple(labels), tuple(classes), pixels=joined)


def inaturalist(root: Path) -> Parts | None:
    """Read iNaturalist 2018: its makers' train2018.json and val2018.json, images beside them."""
    files = [root / f"{part}2018.json" for part in ("train", "val")]
    if not files[0].is_file():
        return None
    train, val = (_coco_listed(root, file) for file in files)
    return Parts("iNaturalist 2018", *_same_classes(root, train, val))


def _coco_listed(root: Path, file: Path) -> list[tuple[Path, str]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {row["id"]: str(row["name"]) for row in content["categories"]}
        images = {row["id"]: row["file_name"] for row in content["images"]}
        return [
            (root / images[row["image_id"]], names[row["category_id"]])
            for row in content["annotations"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"list {file}: cannot be read ({error})") from error


def places(root: Path) -> Parts | None:
    """Places365 as torchvision reads it: lists beside data_256_standard/ and val_256/."""
    names = root / "categories_places365.txt"
    if not names.is_file():
        return None
    classes = {int(n): name.strip("/") for name, n in map(str.split, _lines(names))}
    parts = []
    for file, folders in (
        ("places365_train_standard.txt", ("data_256_standard", "data_large_standard")),
        ("places365_val.txt", ("val_256", "val_large")),
    ):
        folder = next((root / f for f in folders if (root / f).is_dir()), root / folders[0])
        pairs = (line.rsplit(None, 1) for line in _lines(root / file))
        parts.append([(folder / path.strip("/"), classes[int(n)]) for path, n in pairs])
    return Parts("Places365", *_same_classes(root, *parts))


def dtd(root: Path) -> Parts | None:
    """Describable Textures, split 1: train and val are learnt from, test is judged."""
    if not (root / "labels" / "train1.txt").is_file():
        return None
    train, val, test = (
        [(root / "images" / line, line.split("/")[0]) for line in _lines(path)]
        for path in (root / "labels" / f"{part}1.txt" for part in ("train", "val", "test"))
    )
    return Parts("DTD", *_same_classes(root, train + val, test), _tail(train, val))


def aircraft(root: Path) -> Parts | None:
    """FGVC Aircraft, 100 variants: train and val are learnt from, test is judged."""
    data = root / "data"
    if not (data / "images_variant_train.txt").is_file():
        return None
    train, val, test = (
        [
            (data / "images" / f"{number}.jpg", variant)
            for number, variant in (line.split(" ", 1) for line in _lines(path))
        ]
        for path in (data / f"images_variant_{part}.txt" for part in ("train", "val", "test"))
    )
    parts = _same_classes(root, train + val, test)
    return Parts("FGVC Aircraft", *parts, _tail(train, val), "mean_per_class")


def flowers(root: Path) -> Parts | None:
    """Oxford 102 Flowers: train and val (10 a class each) are learnt from, test is judged."""
    if not (root / "setid.mat").is_file():
        return None
    labels = _mat(root / "imagelabels.mat")["labels"].ravel()
    ids = _mat(root / "setid.mat")
    train, val, test = (
        [(root / "jpg" / f"image_{i:05d}.jpg", f"{labels[i - 1]:03d}") for i in ids[part].ravel()]
        for part in ("trnid", "valid", "tstid")
    )
    parts = _same_classes(root, train + val, test)
    return Parts("Oxford Flowers", *parts, _tail(train, val), "mean_per_class")


def cars(root: Path) -> Parts | None:
    """Stanford Cars as torchvision wants it."""
    if not (root / "devkit" / "cars_train_annos.mat").is_file():
        return None
    names = [str(n[0]) for n in _mat(root / "devkit" / "cars_meta.mat")["class_names"].ravel()]
    parts = []
    for file, folder in (
        (root / "devkit" / "cars_train_annos.mat", root / "cars_train"),
        (root / "cars_test_annos_withlabels.mat", root / "cars_test"),
    ):
        rows = _mat(file)["annotations"].ravel()
        parts.append(
            [(folder / str(r["fname"][0]), names[int(r["class"].item()) - 1]) for r in rows]
        )
    return Parts("Stanford Cars", *_same_classes(root, *parts))


def pets(root: Path) -> Parts | None:
    """Oxford-IIIT Pets, 37 breeds: trainval is learnt from, test is judged."""
    if not (root / "annotations" / "trainval.txt").is_file():
        return None
    train, test = (
        [
            (root / "images" / f"{name}.jpg", name.rsplit("_", 1)[0])
            for name in (line.split()[0] for line in _lines(root / "annotations" / f"{part}.txt"))
        ]
        for part in ("trainval", "test")
    )
    return Parts("Oxford Pets", *_same_classes(root, train, test), metric="mean_per_class")


def food(root: Path) -> Parts | None:
    """Food-101."""
    if not (root / "meta" / "train.json").is_file():
        return None
    parts = []
    for part in ("train", "test"):
        file = root / "meta" / f"{part}.json"
        try:
            names = json.loads(file.read_text(encoding="utf-8"))
            parts.append(
                [(root / "images" / f"{i}.jpg", label) for label in names for i in names[label]]
            )
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"list {file}: cannot be read ({error})") from error
    return Parts("Food-101", *_same_classes(root, *parts))


def sun397(root: Path) -> Parts | None:
    """SUN397, the first of its ten splits: Training_01.txt and Testing_01.txt."""
    if not (root / "Training_01.txt").is_file():
        return None
    train, test = (
        [
            (root / name, str(Path(name).parent))
            for name in (line.strip("/") for line in _lines(root / f"{part}.txt"))
        ]
        for part in ("Training_01", "Testing_01")
    )
    return Parts("SUN397", *_same_classes(root, train, test))


def caltech101(root: Path) -> Parts | None:
    """Caltech-101 in one folder: 30 images a class are learnt from, drawn once, the rest judged."""
    folder = root / "101_ObjectCategories"
    if not folder.is_dir():
        return None
    images = image_folder(folder)
    train: list[tuple[Path, str]] = []
    test: list[tuple[Path, str]] = []
    for label, name in enumerate(images.classes):
        if name == CALTECH_BACKGROUND:
            continue
        paths = [p for p, own in zip(images.paths, images.labels, strict=True) if own == label]
        order = np.random.default_rng(generator(0, "caltech101", name).initial_seed())
        drawn = set(order.permutation(len(paths))[:CALTECH_TRAIN].tolist())
        train += [(p, name) for i, p in enumerate(paths) if i in drawn]
        test += [(p, name) for i, p in enumerate(paths) if i not in drawn]
    return Parts("Caltech-101", *_same_classes(root, train, test), metric="mean_per_class")


READERS: tuple[Callable[[Path], Parts | None], ...] = (
    voc07,
    cifar,
    inaturalist,
    places,
    dtd,
    aircraft,
    flowers,
    cars,
    pets,
    food,
    sun397,
    caltech101,
)


def read_published(root: Path) -> Parts | None:
    """Return the parts of the published set in a folder, None where it holds none.

    Raises:
        UserError: a part of the set is missing or damaged.
    """
    found = (reader(root) for reader in READERS)
    return next((parts for parts in found if parts is not None), None)


def _same_classes(
    root: Path, train: list[tuple[Path, str]], val: list[tuple[Path, str]]
) -> tuple[ListedImages, ListedImages]:
    """Make the two lists, whose classes must be the same."""
    names = [{name for _, name in part} for part in (train, val)]
    if names[0] != names[1]:
        only = sorted(names[0] ^ names[1])
        raise UserError(
            f"images {root}: class '{only[0]}' has images in one part only "
            f"({len(only)} such classes); want the same classes in both"
        )
    classes = tuple(sorted(names[0]))
    place = {name: i for i, name in enumerate(classes)}
    first, second = (
        ListedImages(
            root,
            _present([path for path, _ in part], root),
            tuple(place[name] for _, name in part),
            classes,
        )
        for part in (train, val)
    )
    return first, second


def _present(paths: Iterable[Path], root: Path) -> tuple[Path, ...]:
    """Return the paths, all of which must be files."""
    paths = tuple(paths)
    gone = [path for path in paths if not path.is_file()]
    if gone or not paths:
        found = f"{len(gone)} listed images are missing, {gone[0]} first" if gone else "no image"
        raise UserError(f"images {root}: {found}; want the whole set")
    return paths


def _tail(train: Sequence[object], val: Sequence[object]) -> tuple[int, ...]:
    return tuple(range(len(train), len(train) + len(val)))


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list {path}: cannot be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def _optional_lines(path: Path) -> list[str]:
    return _lines(path) if path.is_file() else []


def _mat(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    try:
        content: dict[str, Any] = loadmat(path)
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"list {path}: cannot be read ({error})") from error
    return content
