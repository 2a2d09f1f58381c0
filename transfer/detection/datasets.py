"""Detection data: names -> files, checked before anything heavy begins.

Detectron2 knows COCO and VOC by name, below the folder in `DETECTRON2_DATASETS`. The embedded
scenes are added to its catalogs under four names; they are built when one of them is asked for.
Detectron2 is imported only inside functions, so that everything else works without it.
"""

import hashlib
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import UserError, nearest
from pretrain.embedded import CATEGORY, embedded_root

ROOT_VARIABLE = "DETECTRON2_DATASETS"

# name -> (kind, split of its layout)
EMBEDDED = {
    "embedded_coco_train": ("coco", "train2017"),
    "embedded_coco_val": ("coco", "val2017"),
    "embedded_voc_trainval": ("pascal_voc", "trainval"),
    "embedded_voc_test": ("pascal_voc", "test"),
}
# Where a standard set's files come from, for the line that misses them.
ORIGINS = {
    "coco": "download train2017, val2017 and annotations from cocodataset.org into coco/",
    "voc": "download VOCtrainval and VOCtest from host.robots.ox.ac.uk/pascal/VOC, they unpack to "
    "VOCdevkit/VOC2007 and VOCdevkit/VOC2012",
}


@dataclass(frozen=True)
class Loaded:
    """A detection set in memory.

    Attributes:
        names: as DATASETS.TRAIN or DATASETS.TEST has them.
        dicts: Detectron2's records, one an image.
        classes: names in the order of the detector's outputs.
    """

    names: tuple[str, ...]
    dicts: list[dict[str, Any]]
    classes: tuple[str, ...]

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
            "listing_hash": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12],
        }


def register() -> None:
    """Add the embedded scenes to Detectron2's catalogs; a second call does nothing."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name, (kind, split) in EMBEDDED.items():
        if name in DatasetCatalog.list():
            continue
        DatasetCatalog.register(name, _loader(name, kind, split))
        MetadataCatalog.get(name).set(evaluator_type=kind, thing_classes=[CATEGORY])
        if kind == "pascal_voc":  # 2007 selects the 11-point metric that the papers report
            MetadataCatalog.get(name).set(year=2007, split=split)


def missing_files(names: Sequence[str]) -> list[str]:
    """Say, a line each, which of the named sets are not on disk and what brings them.

    Raises:
        UserError: a name is in no catalog.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    register()
    lines = []
    for name in names:
        if name in EMBEDDED:
            continue  # builds itself
        if name not in DatasetCatalog.list():
            near = nearest(name, DatasetCatalog.list())
            raise UserError(f"DATASETS: unknown set '{name}'; known ones near it: {near}")
        meta = MetadataCatalog.get(name)
        lost = next((path for path in _wanted_paths(meta) if not path.exists()), None)
        if lost is not None:
            origin = ORIGINS.get("coco" if meta.get("json_file") else "voc", "")
            lines.append(
                f"{name}: {lost} is missing; set {ROOT_VARIABLE} (now "
                f"'{os.environ.get(ROOT_VARIABLE, 'datasets')}') to the folder that holds it, "
                f"or {origin}"
            )
    return lines


def load(names: Sequence[str], *, training: bool, filter_empty: bool = True) -> Loaded:
    """Read the records of one or several sets.

    Args:
        names: of one kind.
        training: leave out images without a usable box.
        filter_empty: in training only; as DATALOADER.FILTER_EMPTY_ANNOTATIONS.

    Raises:
        UserError: a listing cannot be read, names a class or an image that is not there.
    """
    from detectron2.data import MetadataCatalog, get_detection_dataset_dicts

    register()
    where = ", ".join(names)
    try:
        dicts = get_detection_dataset_dicts(list(names), filter_empty=training and filter_empty)
    except (AssertionError, AttributeError, KeyError, OSError, ValueError, ET.ParseError) as error:
        raise UserError(f"data {where}: cannot be read ({error})") from error
    lost = [image["file_name"] for image in dicts if not Path(image["file_name"]).is_file()]
    if lost:
        raise UserError(f"data {where}: {len(lost)} of {len(dicts)} images are missing: {lost[0]}")
    return Loaded(tuple(names), dicts, tuple(MetadataCatalog.get(names[0]).thing_classes))


def evaluator_type(name: str) -> tuple[str, int]:
    """Return a set's way of being measured, and the year that decides VOC's metric (else 0)."""
    from detectron2.data import MetadataCatalog

    meta = MetadataCatalog.get(name)
    return str(meta.get("evaluator_type", "")), int(meta.get("year", 0))


def _loader(name: str, kind: str, split: str) -> Callable[[], list[dict[str, Any]]]:
    """Make the function that a catalog calls when the set is asked for."""

    def load_coco() -> list[dict[str, Any]]:
        from detectron2.data import MetadataCatalog
        from detectron2.data.datasets import load_coco_json

        root = embedded_root() / "coco"
        json_file, images = root / "annotations" / f"instances_{split}.json", root / split
        MetadataCatalog.get(name).set(json_file=str(json_file), image_root=str(images))
        return list(load_coco_json(str(json_file), str(images), name))

    def load_voc() -> list[dict[str, Any]]:
        from detectron2.data import MetadataCatalog
        from detectron2.data.datasets import load_voc_instances

        folder = str(embedded_root() / "VOC2007")
        MetadataCatalog.get(name).set(dirname=folder)
        return list(load_voc_instances(folder, split, (CATEGORY,)))

    return {"coco": load_coco, "pascal_voc": load_voc}[kind]


def _wanted_paths(meta: Any) -> list[Path]:
    """Return what must exist before a standard set can be read."""
    if meta.get("json_file"):
        return [Path(meta.json_file), Path(meta.image_root)]
    if meta.get("dirname"):
        folder = Path(meta.dirname)
        listing = folder / "ImageSets" / "Main" / f"{meta.split}.txt"
        return [listing, folder / "Annotations", folder / "JPEGImages"]
    return []
