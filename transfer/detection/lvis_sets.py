"""LVIS files -> records: COCO's, with two lists of categories for each image.

Detectron2's own reader imports the lvis package, which does not run on today's NumPy; its records
are these. Images are named by their addresses, `.../val2017/000000001268.jpg`, whose last two parts
stand below the image folder.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from transfer.detection.lvis_metric import FREQUENCIES

CATEGORY_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")
Listing = Mapping[str, Any]


def read(file: Path, images: Path) -> tuple[list[dict[str, Any]], tuple[str, ...], tuple[str, ...]]:
    """Read a file.

    Args:
        file: LVIS annotations, v0.5 or v1.
        images: the folder that holds train2017 and val2017.

    Returns:
        Detectron2's records, an image each, in the order of ids; the classes' names, in that order
        too; and what is wrong with the file, a line each.

    Raises:
        OSError, LookupError, TypeError, ValueError: it is no LVIS file.
    """
    listing = json.loads(file.read_text(encoding="utf-8"))
    words = sorted(listing["categories"], key=lambda entry: entry["id"])
    classes = tuple(str(entry["name"]) for entry in words)
    faults = tuple(_faults(listing))
    if faults:
        return [], classes, faults
    places = {entry["id"]: place for place, entry in enumerate(words)}
    objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in listing["images"]}
    for entry in listing["annotations"]:
        objects[entry["image_id"]].append(
            {
                "bbox": entry["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": places[entry["category_id"]],
                "segmentation": entry["segmentation"],
            }
        )
    records = [
        {
            "file_name": str(images / _path(image)),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            **{key: image[key] for key in CATEGORY_LISTS},
            "annotations": objects[image["id"]],
        }
        for image in sorted(listing["images"], key=lambda image: image["id"])
    ]
    return records, classes, ()


def _path(image: Listing) -> str:
    address = image.get("coco_url")
    return "/".join(str(address).split("/")[-2:]) if address else str(image["file_name"])


def _faults(listing: Listing) -> Iterator[str]:
    ids = {entry["id"] for entry in listing["categories"]}
    known = f"{min(ids)} to {max(ids)}" if ids else "some: the file has no categories"
    bare = [entry["id"] for entry in listing["categories"] if not _has_frequency(entry)]
    if bare:
        yield f"{len(bare)} categories have no frequency r, c or f, first id {bare[0]}"
    bare = [image["id"] for image in listing["images"] if not set(CATEGORY_LISTS) <= image.keys()]
    if bare:
        yield (
            f"{len(bare)} images have no {' or no '.join(CATEGORY_LISTS)}, first id {bare[0]}; "
            "LVIS has them, COCO does not"
        )
    uses = [(entry["category_id"], f"annotation {entry['id']}") for entry in listing["annotations"]]
    uses += [
        (number, f"{key} of image {image['id']}")
        for image in listing["images"]
        for key in CATEGORY_LISTS
        for number in image.get(key, ())
    ]
    strange = [(number, where) for number, where in uses if number not in ids]
    if strange:
        number, where = strange[0]
        yield f"{len(strange)} categories out of range, first {number} in {where}, want {known}"
    images = {image["id"] for image in listing["images"]}
    yield from _object_faults(listing["annotations"], images)


def _has_frequency(entry: Listing) -> bool:
    return entry.get("frequency") in FREQUENCIES


def _object_faults(annotations: Sequence[Listing], images: set[Any]) -> Iterator[str]:
    lost = [entry["id"] for entry in annotations if entry["image_id"] not in images]
    if lost:
        yield f"{len(lost)} annotations are of no listed image, first id {lost[0]}"
    flat = [
        entry["id"]
        for entry in annotations
        if not entry["segmentation"] or any(len(p) % 2 or len(p) < 6 for p in entry["segmentation"])
    ]
    if flat:
        yield f"{len(flat)} annotations have a polygon of fewer than 3 points, first id {flat[0]}"
