"""Cityscapes' folders -> records, from the very images that its measure compares with.

`leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` are the photographs, and `gtFine/SPLIT/CITY/
*_gtFine_instanceIds.png` hold at every pixel a label times 1000 and an object's number; or a label
alone: of a group of objects, or of something that is not counted. Detectron2's own reader draws the
polygons of the `.json` beside them, with two more packages; cut against each other as there, they
are these masks. So recipes say INPUT.MASK_FORMAT bitmask.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from convert.errors import UserError
from transfer.detection.cityscapes_metric import LABELS, OF_OBJECTS, Ids
from transfer.segmentation.sets import CITY_CLASSES, CITY_IDS

FIRST = CITY_CLASSES.index("person")  # things are the classes from here on
CLASSES = CITY_CLASSES[FIRST:]
THINGS = CITY_IDS[FIRST:]
UNCOUNTED = (29, 30)  # caravans and trailers have numbers too
PHOTOGRAPH, TRUTH = "leftImg8bit.png", "gtFine_instanceIds.png"
THREADS = 4


def read(images: Path, truth: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Read a split.

    Args:
        images: `leftImg8bit/SPLIT`.
        truth: `gtFine/SPLIT`.

    Returns:
        Detectron2's records, in the order of names, each with the file of its ids; and what is
        wrong with the folders, a line each.
    """
    files = [
        (file, truth / file.parent.name / file.name.replace(PHOTOGRAPH, TRUTH))
        for file in sorted(images.glob(f"*/*_{PHOTOGRAPH}"))
    ]
    if not files:
        return [], (f"{images} holds no CITY/*_{PHOTOGRAPH}",)
    lost = [str(ids) for _, ids in files if not ids.is_file()]
    if lost:
        return [], (f"{len(lost)} of {len(files)} label images are missing, first {lost[0]}",)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(_record, files))
    faults = [one for one in found if isinstance(one, str)]
    if faults:
        return [], (f"{len(faults)} of {len(files)} label images are broken: {faults[0]}",)
    return [one for one in found if not isinstance(one, str)], ()


def _record(files: tuple[Path, Path]) -> dict[str, Any] | str:
    """Return a record, or what is wrong with its label image."""
    try:
        ids = read_ids(files[1])
    except UserError as error:
        return str(error)
    return {
        "file_name": str(files[0]),
        "instance_ids_file": str(files[1]),
        "image_id": files[0].name.removesuffix(f"_{PHOTOGRAPH}"),
        "height": ids.shape[0],
        "width": ids.shape[1],
        "annotations": list(_objects(ids)),
    }


def read_ids(file: Path) -> Ids:
    """Read a label image.

    Raises:
        UserError: it cannot be read, or holds an id outside Cityscapes' list.
    """
    try:
        with Image.open(file) as opened:
            ids: Ids = np.asarray(opened).astype(np.int32)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"label image {file}: cannot be read ({error})") from error
    if ids.ndim != 2:
        raise UserError(f"label image {file}: has shape {ids.shape}, want one id a pixel")
    for number in np.flatnonzero(np.bincount(ids.ravel())).tolist():
        label, numbered = number, number >= OF_OBJECTS
        if numbered:
            label = number // OF_OBJECTS
        if label not in (THINGS + UNCOUNTED if numbered else LABELS):
            raise UserError(
                f"label image {file}: holds id {number}, want labels {LABELS[0]} to {LABELS[-1]}, "
                f"or 1000 times one of {', '.join(map(str, THINGS))} and an object's number"
            )
    return ids


def _objects(ids: Ids) -> Iterator[dict[str, Any]]:
    """Yield the objects and groups of an image, in the order of their ids."""
    height, width = ids.shape
    column = ids.T.ravel()  # COCO's run lengths go down the columns
    starts = np.concatenate([[0], np.flatnonzero(np.diff(column)) + 1])
    ends = np.append(starts[1:], column.size)
    values = column[starts]
    for number in np.unique(values).tolist():
        label = number // OF_OBJECTS if number >= OF_OBJECTS else number
        if label not in THINGS:
            continue
        own = values == number
        mask = rle.frPyObjects(_runs(starts[own], ends[own], column.size, ids.shape), height, width)
        yield {
            "bbox": rle.toBbox(mask).tolist(),
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": THINGS.index(label),
            "iscrowd": int(number < OF_OBJECTS),
            "segmentation": mask,
        }


def _runs(
    starts: NDArray[np.int64], ends: NDArray[np.int64], total: int, shape: Sequence[int]
) -> dict[str, Any]:
    """Write an object's runs as COCO's counts: outside, inside, outside and so on."""
    borders = np.stack([starts, ends], axis=1).ravel()
    counts = np.diff(np.concatenate([[0], borders, [total]]))
    return {"counts": counts.tolist(), "size": list(shape)}
