"""Detection data: names -> files -> records, checked before anything heavy begins.

Three kinds of names stand in DATASETS.TRAIN and DATASETS.TEST. Detectron2 knows COCO, VOC, LVIS and
Cityscapes by name, below the folder in `DETECTRON2_DATASETS`. The embedded scenes and the drawn
figures have names of their own; they are built when one is asked for. And a name that is a path is
one's own set: a COCO file and its image folder, `annotations.json:images/`, or a folder in VOC's
layout and one of its lists, `VOC2007:trainval`; its classes are read from it.

Detectron2 is imported only inside functions, so that everything else works without it.
"""

import hashlib
import json
import logging
import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from convert.errors import UserError, nearest
from pretrain import figures
from pretrain.embedded import CATEGORY, embedded_root

ROOT_VARIABLE = "DETECTRON2_DATASETS"
COCO, VOC = "coco", "pascal_voc"  # as Detectron2 calls the layouts
LVIS, CITYSCAPES = "lvis", "cityscapes_instance"
SUFFIXES = (".jpg", ".jpeg", ".JPG", ".JPEG", ".png", ".PNG")  # of a VOC folder's images

# name -> (kind, split of its layout)
EMBEDDED = {
    "embedded_coco_train": (COCO, "train2017"),
    "embedded_coco_val": (COCO, "val2017"),
    "embedded_voc_trainval": (VOC, "trainval"),
    "embedded_voc_test": (VOC, "test"),
    "embedded_lvis_train": (LVIS, "train"),
    "embedded_lvis_val": (LVIS, "val"),
    "embedded_cityscapes_train": (CITYSCAPES, "train"),
    "embedded_cityscapes_val": (CITYSCAPES, "val"),
}
# Drawn figures with keypoints, in COCO's layout: name -> split
FIGURES = {"embedded_keypoints_train": "train2017", "embedded_keypoints_val": "val2017"}
# Where a standard set's files come from, for the line that misses them.
ORIGINS = {
    COCO: "download train2017, val2017 and annotations from cocodataset.org into coco/",
    VOC: "download VOCtrainval and VOCtest from host.robots.ox.ac.uk/pascal/VOC, they unpack to "
    "VOCdevkit/VOC2007 and VOCdevkit/VOC2012",
    LVIS: "download its annotations from lvisdataset.org into lvis/; images are COCO's, in coco/",
    CITYSCAPES: "download leftImg8bit and gtFine from cityscapes-dataset.com into cityscapes/",
}
OWN = "name one's own as annotations.json:images/ or as VOCFOLDER:LIST"


@dataclass(frozen=True)
class Source:
    """One's own set, as it is typed.

    Attributes:
        kind: coco or pascal_voc.
        path: the annotation file, or the folder that holds Annotations and JPEGImages.
        part: the image folder ('': the file's own), or the list in ImageSets/Main ('': there are
            no lists, and every annotation counts).
    """

    kind: str
    path: Path
    part: str

    @property
    def images(self) -> Path:
        """The folder of the images."""
        if self.kind == VOC:
            return self.path / "JPEGImages"
        return Path(self.part) if self.part else self.path.parent

    @property
    def label(self) -> str:
        """What it is called in a protocol: the same wherever the data lie."""
        part = Path(self.part).name if self.kind == COCO else self.part
        return f"{self.path.name}:{part}" if part else self.path.name


@dataclass(frozen=True)
class Reading:
    """A set as its files have it.

    Attributes:
        name: as DATASETS.TRAIN or DATASETS.TEST has it.
        dicts: Detectron2's records, one an image; VOC's annotations say `difficult` too.
        classes: names in the order of the detector's outputs.
        faults: what makes it unusable, a line each.
        notes: what Detectron2 warned of while it read.
    """

    name: str
    dicts: list[dict[str, Any]]
    classes: tuple[str, ...]
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A detection set in memory.

    Attributes:
        names: as DATASETS.TRAIN or DATASETS.TEST has them.
        dicts: Detectron2's records, one an image.
        classes: names in the order of the detector's outputs.
        readings: what they were chosen from, a set each.
        dropped: boxes that nothing can be learnt from, a line each.
    """

    names: tuple[str, ...]
    dicts: list[dict[str, Any]]
    classes: tuple[str, ...]
    readings: tuple[Reading, ...] = ()
    dropped: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Say which data these are: names, counts, and a hash of files and boxes."""
        boxes = [[a["bbox"] for a in image.get("annotations", [])] for image in self.dicts]
        lines = sorted(
            f"{Path(image['file_name']).name} {[[float(x) for x in box] for box in own]}"
            for image, own in zip(self.dicts, boxes, strict=True)
        )
        return {
            "names": list(self.names),
            "images": len(self.dicts),
            "instances": sum(map(len, boxes)),
            "classes": len(self.classes),
            "dropped_boxes": len(self.dropped),
            "listing_hash": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12],
        }


# --- names ----------------------------------------------------------------------------------------


def own_source(name: str) -> Source | None:
    """Return what a name means if it is a path, else None.

    Raises:
        UserError: it names a folder whose lists leave open which is meant.
    """
    head, colon, tail = name.rpartition(":")
    path, part = (Path(head), tail) if colon else (Path(name), "")
    if path.suffix == ".json":
        return Source(COCO, path.expanduser(), str(Path(part).expanduser()) if part else "")
    if os.sep not in str(path) and not path.exists():
        return None  # a name in a catalog
    source = Source(VOC, path.expanduser(), part)
    lists = _voc_lists(source.path)
    if part not in lists and (part or lists):
        raise UserError(
            f"data {name}: found {f'no list {part}' if part else 'no list'} of ImageSets/Main, "
            f"want one of {', '.join(f'{path}:{known}' for known in lists) or 'its lists'}"
        )
    return source


def _voc_lists(folder: Path) -> list[str]:
    """Return the lists of a VOC folder; those of a single class (cat_train) are left out."""
    names = [path.stem for path in sorted((folder / "ImageSets" / "Main").glob("*.txt"))]
    return [name for name in names if "_" not in name] or names


def register(names: Sequence[str] = ()) -> None:
    """Add the embedded scenes, and whichever of the names are paths, to Detectron2's catalogs."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name, (kind, split) in EMBEDDED.items():
        if name in DatasetCatalog.list():
            continue
        DatasetCatalog.register(name, _loader(name, kind, split))
        MetadataCatalog.get(name).set(evaluator_type=kind)
        if kind in (COCO, VOC):
            MetadataCatalog.get(name).set(thing_classes=[CATEGORY])
        if kind == VOC:  # 2007 selects the 11-point metric that the papers report
            MetadataCatalog.get(name).set(year=2007, split=split)
    for name, split in FIGURES.items():
        if name not in DatasetCatalog.list():
            DatasetCatalog.register(name, partial(_load_figures, name, split))
            MetadataCatalog.get(name).set(evaluator_type=COCO, thing_classes=[figures.CATEGORY])
    for name in names:
        if name in DatasetCatalog.list():
            continue
        source = own_source(name)
        if source is not None:
            _register_own(name, source)


def _load_figures(name: str, split: str) -> list[dict[str, Any]]:
    from detectron2.data import MetadataCatalog
    from detectron2.data.datasets import load_coco_json

    root = figures.figures_root()
    file, images = str(root / "annotations" / f"person_keypoints_{split}.json"), str(root / split)
    MetadataCatalog.get(name).set(json_file=file, image_root=images)
    return list(load_coco_json(file, images, name))


def _register_own(name: str, source: Source) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import load_coco_json

    meta = MetadataCatalog.get(name)
    meta.set(evaluator_type=source.kind)
    if source.kind == VOC:
        meta.set(dirname=str(source.path), split=source.part, year=0)
        DatasetCatalog.register(name, lambda: read(name).dicts)
        return
    file, images = str(source.path), str(source.images)
    meta.set(json_file=file, image_root=images)
    DatasetCatalog.register(name, lambda: load_coco_json(file, images, name))


def missing_files(names: Sequence[str]) -> list[str]:
    """Say, a line each, which of the named sets are not on disk and what brings them.

    Raises:
        UserError: a name is in no catalog.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    register(names)
    lines = []
    for name in names:
        if name in EMBEDDED or name in FIGURES:
            continue  # builds itself
        if name not in DatasetCatalog.list():
            near = nearest(name, DatasetCatalog.list())
            raise UserError(f"DATASETS: unknown set '{name}'; known ones near it: {near}; {OWN}")
        meta = MetadataCatalog.get(name)
        lost = next((path for path in _wanted_paths(meta) if not path.exists()), None)
        if lost is None:
            continue
        if own_source(name) is not None:
            lines.append(f"{name}: {lost} is missing; {OWN}")
            continue
        origin = ORIGINS.get(meta.get("evaluator_type"), ORIGINS[COCO])
        lines.append(
            f"{name}: {lost} is missing; set {ROOT_VARIABLE} (now "
            f"'{os.environ.get(ROOT_VARIABLE, 'datasets')}') to the folder that holds it, "
            f"or {origin}"
        )
    return lines


def evaluator_type(name: str) -> tuple[str, int]:
    """Return a set's way of being measured, and the year that decides VOC's metric (else 0)."""
    from detectron2.data import MetadataCatalog

    register([name])
    meta = MetadataCatalog.get(name)
    return str(meta.get("evaluator_type", "")), int(meta.get("year", 0))


def label(name: str) -> str:
    """Return a set's name for a protocol, which does not say where one's own data lie."""
    source = own_source(name)
    return name if source is None else source.label


def own_classes(names: Sequence[str]) -> tuple[str, ...] | None:
    """Return the classes of one's own sets, or None if none of the names is a path.

    Raises:
        UserError: a set cannot be read, or two of them have other classes.
    """
    own = [name for name in names if own_source(name) is not None]
    if not own or missing_files(own):
        return None  # what is missing is said where all that is missing is said
    found = [_classes(name) for name in own]
    for name, classes in zip(own, found, strict=True):
        check_classes(own[0], found[0], name, classes)
    return found[0]


def check_classes(one: str, first: Sequence[str], other: str, second: Sequence[str]) -> None:
    """Refuse two sets whose classes are not the same, in the same order.

    Raises:
        UserError: says which set lacks what.
    """
    if tuple(first) == tuple(second):
        return
    lost, more = sorted(set(first) - set(second)), sorted(set(second) - set(first))
    sides = ((lost, one), (more, other))
    parts = [f"{', '.join(names[:5])} only in {where}" for names, where in sides if names]
    raise UserError(
        f"data {other}: its classes are not those of {one}: {'; '.join(parts) or 'another order'}; "
        "both need the same list"
    )


# --- files ----------------------------------------------------------------------------------------


def read(name: str) -> Reading:
    """Read a set as it is; whatever is wrong with it is in the reading, a line for each kind."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    register([name])
    meta = MetadataCatalog.get(name)
    if EMBEDDED.get(name, ("",))[0] == VOC:
        return _read_voc(name, embedded_root() / "VOC2007", EMBEDDED[name][1], own=False)
    if meta.get("dirname") and meta.get("split") is not None:
        return _read_voc(name, Path(meta.dirname), meta.split, own_source(name) is not None)
    try:
        if meta.get("evaluator_type") == LVIS:
            return _read_lvis(name)
        if meta.get("evaluator_type") == CITYSCAPES:
            return _read_cityscapes(name)
        with _warnings() as notes:
            dicts = DatasetCatalog.get(name)
    # What Detectron2 and pycocotools raise on a file that is not as they want it has no list.
    except (AssertionError, LookupError, AttributeError, TypeError, OSError, ValueError) as error:
        reason = str(error.args[0] if error.args else error)
        place = meta.get("json_file", "")
        return Reading(name, [], (), (f"{place} cannot be read ({reason})",))
    faults = [] if dicts else ["it lists no images"]
    return Reading(name, dicts, tuple(meta.thing_classes), tuple(faults), tuple(notes))


def load(
    names: Sequence[str],
    *,
    training: bool,
    filter_empty: bool = True,
    min_keypoints: int = 0,
    fraction: float = 1.0,
    split_seed: int = 0,
) -> Loaded:
    """Read the records of one or several sets.

    Args:
        names: of one kind.
        training: leave out images without a usable box, then boxes that are broken.
        filter_empty: in training only; as DATALOADER.FILTER_EMPTY_ANNOTATIONS.
        min_keypoints: in training only; leave out images with fewer labelled keypoints.
        fraction: in training only; see `choose`.
        split_seed: of the fraction.

    Raises:
        UserError: a listing cannot be read, names a class or an image that is not there.
    """
    from detectron2.data.build import (
        filter_images_with_few_keypoints,
        filter_images_with_only_crowd_annotations,
    )

    readings = tuple(read(name) for name in names)
    for reading in readings:
        if reading.faults:
            raise UserError(f"data {reading.name}: {'; '.join(reading.faults)}")
        check_classes(readings[0].name, readings[0].classes, reading.name, reading.classes)
    dicts = [image for reading in readings for image in reading.dicts]
    lost = [image["file_name"] for image in dicts if not os.path.isfile(image["file_name"])]  # noqa: PTH113 (ten times faster)
    if lost:
        where = ", ".join(names)
        raise UserError(f"data {where}: {len(lost)} of {len(dicts)} images are missing: {lost[0]}")
    dropped: list[str] = []
    if training:
        dicts = choose(dicts, fraction, split_seed)
        if filter_empty:
            dicts = filter_images_with_only_crowd_annotations(dicts)
        if min_keypoints:
            dicts = filter_images_with_few_keypoints(dicts, min_keypoints)
        dicts = [_without_broken(image, dropped) for image in dicts]
        if not dicts:
            labelled = f"{min_keypoints} keypoints" if min_keypoints else "a box"
            raise UserError(f"data {', '.join(names)}: has no image with {labelled} to train on")
    return Loaded(tuple(names), dicts, readings[0].classes, readings, tuple(dropped))


def choose(dicts: list[dict[str, Any]], fraction: float, seed: int) -> list[dict[str, Any]]:
    """Keep a share of the images, the same on every machine, in their order.

    Each image has a place in a line that the seed and its name decide; a fraction takes the head
    of that line, so that 1% lies inside 5% and 5% inside 10%. Images are drawn evenly from the
    whole list, before those without a box are left out; classes are not balanced.

    Args:
        dicts: Detectron2's records.
        fraction: above 0, up to 1.
        seed: another one draws other images.
    """
    if fraction == 1:
        return dicts

    def place(image: dict[str, Any]) -> str:
        word = f"{seed} {Path(image['file_name']).name}"
        return hashlib.sha256(word.encode()).hexdigest()

    head = sorted(range(len(dicts)), key=lambda i: place(dicts[i]))
    count = max(1, round(fraction * len(dicts)))
    return [dicts[i] for i in sorted(head[:count])]


def broken_boxes(image: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Yield place and fault of each box without area or outside its image."""
    from detectron2.structures import BoxMode

    width, height = image["width"], image["height"]
    for place, entry in enumerate(image.get("annotations", [])):
        x0, y0, x1, y1 = map(float, entry["bbox"])
        if entry["bbox_mode"] == BoxMode.XYWH_ABS:
            x1, y1 = x0 + x1, y0 + y1
        if not (x1 > x0 and y1 > y0):  # so that NaN is broken too
            yield place, "has no area"
        elif x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            yield place, f"lies outside {width} x {height}"


def _without_broken(image: dict[str, Any], dropped: list[str]) -> dict[str, Any]:
    broken = dict(broken_boxes(image))
    if not broken:
        return image
    entries = image["annotations"]
    dropped += [
        f"{image['file_name']}: box {entries[i]['bbox']} {why}" for i, why in broken.items()
    ]
    return image | {"annotations": [e for i, e in enumerate(entries) if i not in broken]}


def _read_voc(name: str, folder: Path, split: str, own: bool) -> Reading:
    """Read a VOC folder's annotations as Detectron2 does, and what is difficult beside."""
    from detectron2.data import MetadataCatalog

    annotations = folder / "Annotations"
    try:
        ids = _voc_ids(folder, split)
    except OSError as error:
        return Reading(name, [], (), (f"{error.filename} cannot be read ({error.strerror})",))
    classes = _classes(name) if own else tuple(MetadataCatalog.get(name).thing_classes)
    dicts, faults = [], []
    unknown: Counter[str] = Counter()
    for file_id in ids:
        file = annotations / f"{file_id}.xml"
        try:
            tree = ET.parse(file)
            dicts.append(_voc_record(tree, file_id, folder, classes, unknown, own))
        except OSError as error:
            faults.append(f"{file} cannot be read ({error.strerror})")
        except (AttributeError, TypeError, ValueError, ET.ParseError) as error:
            faults.append(f"{file} is no VOC annotation ({error})")
    lines = [f"{len(faults)} broken annotations, first: {faults[0]}"] if faults else []
    if unknown:
        counted = ", ".join(f"{count} of '{word}'" for word, count in unknown.most_common(5))
        lines.append(f"objects of classes that are not in its list: {counted}")
    if not ids:
        lines.append("it lists no images")
    return Reading(name, dicts, classes, tuple(lines))


def _voc_ids(folder: Path, split: str) -> list[str]:
    if not split:
        return sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))
    text = (folder / "ImageSets" / "Main" / f"{split}.txt").read_text(encoding="utf-8")
    return [line.split()[0] for line in text.splitlines() if line.strip()]


def _voc_record(
    tree: Any, file_id: str, folder: Path, classes: Sequence[str], unknown: Counter[str], own: bool
) -> dict[str, Any]:
    """Turn one annotation into Detectron2's record; 1-based pixels become corners from 0."""
    from detectron2.structures import BoxMode

    entries = []
    for entry in tree.findall("object"):
        word, box = entry.find("name").text, entry.find("bndbox")
        if word not in classes:
            unknown[str(word)] += 1
            continue
        x0, y0, x1, y1 = (float(box.find(x).text) for x in ("xmin", "ymin", "xmax", "ymax"))
        difficult = entry.find("difficult")
        entries.append(
            {
                "category_id": classes.index(word),
                "bbox": [x0 - 1, y0 - 1, x1, y1],
                "bbox_mode": BoxMode.XYXY_ABS,
                "difficult": difficult is not None and int(difficult.text) != 0,
            }
        )
    images = folder / "JPEGImages"
    file = images / f"{file_id}.jpg"
    if own and not file.exists():  # Detectron2 knows .jpg only
        others = (images / f"{file_id}{suffix}" for suffix in SUFFIXES)
        file = next((other for other in others if other.exists()), file)
    return {
        "file_name": str(file),
        "image_id": file_id,
        "height": int(tree.find("size/height").text),
        "width": int(tree.find("size/width").text),
        "annotations": entries,
    }


def _read_lvis(name: str) -> Reading:
    """Read an LVIS file; an embedded one says where it lies when it is read first."""
    from detectron2.data import MetadataCatalog

    from transfer.detection import lvis_sets

    meta = MetadataCatalog.get(name)
    if name in EMBEDDED:
        file = embedded_root() / "lvis" / f"lvis_v0.5_{EMBEDDED[name][1]}.json"
        meta.set(json_file=str(file), image_root=str(embedded_root() / "coco"))
    dicts, classes, faults = lvis_sets.read(Path(meta.json_file), Path(meta.image_root))
    lines = [f"{meta.json_file}: {line}" for line in faults]
    return Reading(name, dicts, classes, tuple(lines or ([] if dicts else ["it lists no images"])))


def _read_cityscapes(name: str) -> Reading:
    from detectron2.data import MetadataCatalog

    from transfer.detection import cityscapes_sets

    meta = MetadataCatalog.get(name)
    if name in EMBEDDED:
        root, split = embedded_root() / "cityscapes", EMBEDDED[name][1]
        meta.set(image_dir=str(root / "leftImg8bit" / split), gt_dir=str(root / "gtFine" / split))
    dicts, faults = cityscapes_sets.read(Path(meta.image_dir), Path(meta.gt_dir))
    return Reading(name, dicts, cityscapes_sets.CLASSES, faults)


def _classes(name: str) -> tuple[str, ...]:
    """Read the classes of one's own set: a COCO file's by id, a VOC folder's by the alphabet.

    A VOC folder's are those of all its annotations, so that each of its lists has the same.

    Raises:
        UserError: the annotations cannot be read, or name no class.
    """
    source = own_source(name)
    assert source is not None
    try:
        if source.kind == COCO:
            with source.path.open(encoding="utf-8") as file:
                entries = json.load(file)["categories"]
            words = [str(e["name"]) for e in sorted(entries, key=lambda entry: entry["id"])]
        else:
            files = (source.path / "Annotations").glob("*.xml")
            found = (e.text for f in files for e in ET.parse(f).findall("object/name"))
            words = sorted({str(word) for word in found})
    except (OSError, KeyError, TypeError, ValueError, ET.ParseError) as error:
        where = f"data {name}: its classes cannot be read"
        raise UserError(f"{where} ({type(error).__name__}: {error})") from error
    if not words:
        raise UserError(f"data {name}: its annotations name no class")
    return tuple(words)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what Detectron2 warns of while it reads a COCO file."""
    notes: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if "apply a mapping" not in text:  # of ids with gaps, as COCO's own have
                notes.append(text)

    logger, ear = logging.getLogger("detectron2.data.datasets.coco"), Ear(logging.WARNING)
    before = logger.propagate
    logger.addHandler(ear)
    logger.propagate = False
    try:
        yield notes
    finally:
        logger.removeHandler(ear)
        logger.propagate = before


def _loader(name: str, kind: str, split: str) -> Callable[[], list[dict[str, Any]]]:
    """Make the function that a catalog calls when an embedded set is asked for."""

    def load_coco() -> list[dict[str, Any]]:
        from detectron2.data import MetadataCatalog
        from detectron2.data.datasets import load_coco_json

        root = embedded_root() / "coco"
        json_file, images = root / "annotations" / f"instances_{split}.json", root / split
        MetadataCatalog.get(name).set(json_file=str(json_file), image_root=str(images))
        return list(load_coco_json(str(json_file), str(images), name))

    def load_voc() -> list[dict[str, Any]]:
        from detectron2.data import MetadataCatalog

        MetadataCatalog.get(name).set(dirname=str(embedded_root() / "VOC2007"))
        return read(name).dicts

    def load_other() -> list[dict[str, Any]]:
        return read(name).dicts

    return {COCO: load_coco, VOC: load_voc}.get(kind, load_other)


def _wanted_paths(meta: Any) -> list[Path]:
    """Return what must exist before a set can be read."""
    if meta.get("json_file"):
        return [Path(meta.json_file), Path(meta.image_root)]
    if meta.get("dirname"):
        folder = Path(meta.dirname)
        listing = [folder / "ImageSets" / "Main" / f"{meta.split}.txt"] if meta.split else []
        return [*listing, folder / "Annotations", folder / "JPEGImages"]
    if meta.get("gt_dir"):
        return [Path(meta.image_dir), Path(meta.gt_dir)]
    return []
