"""Small detection sets as a user brings them: a VOC folder, a COCO file and its images."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.figures import KEYPOINTS

# image -> (class, x0, y0, x1, y1, difficult), VOC's pixels
VocObjects = Mapping[str, Sequence[tuple[str, int, int, int, int, int]]]
SIDE = 64
VOC_OBJECTS: VocObjects = {
    "one": [("cat", 11, 11, 30, 30, 0), ("dog", 5, 5, 20, 20, 1)],
    "two": [("dog", 1, 1, 64, 64, 0)],
    "three": [],
}


def write_image(path: Path, width: int = SIDE, height: int = SIDE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 150)).save(path)


def write_voc(folder: Path, objects: VocObjects = VOC_OBJECTS, suffix: str = ".jpg") -> Path:
    """Write Annotations and JPEGImages, and lists of all (`all`) and of the first (`few`)."""
    for name, own in objects.items():
        write_image(folder / "JPEGImages" / f"{name}{suffix}")
        root = ET.Element("annotation")
        size = ET.SubElement(root, "size")
        for key in ("width", "height"):
            ET.SubElement(size, key).text = str(SIDE)
        for word, *corners, difficult in own:
            entry = ET.SubElement(root, "object")
            ET.SubElement(entry, "name").text = word
            ET.SubElement(entry, "difficult").text = str(difficult)
            box = ET.SubElement(entry, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                ET.SubElement(box, key).text = str(value)
        file = folder / "Annotations" / f"{name}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        ET.ElementTree(root).write(file)
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    names = list(objects)
    for word, members in (("all", names), ("few", names[:1])):
        (lists / f"{word}.txt").write_text("".join(f"{n}\n" for n in members), encoding="utf-8")
    return folder


def coco_content(**changes: Any) -> dict[str, Any]:
    """Three images, two classes with ids that leave gaps, a crowd, an image without objects."""
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    base = {"iscrowd": 0, "area": 400.0, "segmentation": square}
    content = {
        "images": [
            {"id": i, "file_name": f"{i:03d}.png", "width": SIDE, "height": SIDE} for i in (1, 2, 3)
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], **base},
            {"id": 2, "image_id": 2, "category_id": 7, "bbox": [10, 10, 20, 20], **base},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    return content | changes


def keypoint_content(names: Sequence[str] = KEYPOINTS, **changes: Any) -> dict[str, Any]:
    """Three images: a person each in two, its keypoints on a diagonal, and nobody."""
    points = [n for place in range(len(names)) for n in (10 + place, 20 + place, 2)]
    person = {
        "category_id": 1,
        "bbox": [10, 20, len(names), len(names)],
        "area": 400.0,
        "iscrowd": 0,
        "keypoints": points,
        "num_keypoints": len(names),
    }
    content = coco_content(
        annotations=[person | {"id": i, "image_id": i, "keypoints": points[:]} for i in (1, 2)],
        categories=[{"id": 1, "name": "person", "keypoints": list(names)}],
    )
    return content | changes


def write_coco(folder: Path, content: Mapping[str, Any] | None = None) -> str:
    """Write a file and its images; return it as --train-data wants it."""
    content = coco_content() if content is None else content
    for image in content["images"]:
        write_image(folder / "images" / image["file_name"], SIDE, SIDE)
    (folder / "own.json").write_text(json.dumps(content), encoding="utf-8")
    return f"{folder / 'own.json'}:{folder / 'images'}"
