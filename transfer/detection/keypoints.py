"""Keypoints: their names, what a mirrored image does to them, and whether data have them whole.

A detector learns places 0 .. P - 1; which joint a place is stands in the files alone. Two sets that
list the same joints in another order would train and measure without an error, so files, catalog
and recipe are held against each other before a run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES

from convert.errors import UserError

COUNT_KEY = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
SIGMAS_KEY = "TEST.KEYPOINT_OKS_SIGMAS"
OTHER_SIDE = {"left": "right", "right": "left"}


def prepare(cfg: CfgNode, names: Sequence[str]) -> tuple[str, ...]:
    """Hold the keypoints of sets against each other and against a recipe.

    Detectron2 is told the names, and which change places in a mirrored image, of sets whose file
    alone knows them.

    Args:
        cfg: a recipe with MODEL.KEYPOINT_ON.
        names: the sets, in COCO's layout, whose files exist.

    Returns:
        The P names.

    Raises:
        UserError: a file names no keypoints, others than another or than Detectron2 knows of its
            set, or not as many as the recipe's detector finds.
    """
    lists = {name: _names(name) for name in names}
    first = lists[names[0]]
    for name, found in lists.items():
        meta = MetadataCatalog.get(name)
        check_same(names[0], first, name, found)
        known = meta.get("keypoint_names")
        if known is not None:
            check_same(f"Detectron2's {name}", known, meta.json_file, found)
            continue
        meta.set(keypoint_names=list(found), keypoint_flip_map=_mirrored(name, found))
    _check_recipe(cfg, names[0], first)
    return first


def check_same(one: str, first: Sequence[str], other: str, second: Sequence[str]) -> None:
    """Refuse two lists of keypoints that are not the same, in the same order.

    Raises:
        UserError: says where they differ first.
    """
    if tuple(first) == tuple(second):
        return
    place = next(
        (i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(second)),
    )
    words = ["nothing" if place >= len(part) else f"'{part[place]}'" for part in (first, second)]
    raise UserError(
        f"data {other}: its {len(second)} keypoints are not the {len(first)} of {one}: place "
        f"{place + 1} is {words[1]} and not {words[0]}; both need the same names in the same order"
    )


def faults(dicts: Iterable[Mapping[str, Any]], count: int) -> tuple[list[str], list[str]]:
    """Look at every object's keypoints.

    Args:
        dicts: Detectron2's records.
        count: of the keypoints that an object has.

    Returns:
        What a run cannot live with: places of objects without `count` keypoints, each x, y and a
        visibility of 0, 1 or 2; and what it lives with: places of keypoints outside their image,
        which training takes as not labelled.
    """
    broken, outside = [], []
    for image in dicts:
        where, width, height = Path(image["file_name"]).name, image["width"], image["height"]
        for place, entry in enumerate(image.get("annotations", [])):
            points = entry.get("keypoints") or []
            if len(points) != 3 * count or not {0, 1, 2}.issuperset(points[2::3]):
                broken.append(f"{where} object {place + 1} ({len(points)} numbers)")
                continue
            triples = zip(points[::3], points[1::3], points[2::3], strict=True)
            seen = [(x, y) for x, y, visible in triples if visible]
            lost = [(x, y) for x, y in seen if not (0 <= x <= width and 0 <= y <= height)]
            outside += [f"{where} ({x:g}, {y:g})" for x, y in lost]
    return broken, outside


def _names(name: str) -> tuple[str, ...]:
    """Read the keypoints that a set's file names.

    Raises:
        UserError: it names none, twice the same, or its categories have different ones.
    """
    file = MetadataCatalog.get(name).get("json_file")
    if not file:
        raise UserError(f"data {name}: has no keypoints; want a set in COCO's layout")
    try:
        categories = json.loads(Path(file).read_text(encoding="utf-8"))["categories"]
        lists = {tuple(map(str, category.get("keypoints") or ())) for category in categories}
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"data {name}: its keypoints cannot be read from {file} ({type(error).__name__}: "
            f"{error})"
        ) from error
    if len(lists) > 1:
        raise UserError(f"data {name}: its categories have different keypoints; want one list")
    found: tuple[str, ...] = next(iter(lists), ())
    if not found:
        raise UserError(
            f"data {name}: {file} names no keypoints; want a category's, as COCO's "
            "person_keypoints_*.json has them"
        )
    if len(set(found)) < len(found):
        twice = next(word for word in found if found.count(word) > 1)
        raise UserError(f"data {name}: {file} names the keypoint '{twice}' twice")
    return found


def _mirrored(name: str, found: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs that change places in a mirrored image, left ones first.

    Raises:
        UserError: a side lacks its other one.
    """
    pairs = []
    for word in found:
        for side, other in OTHER_SIDE.items():
            if side not in word:
                continue
            partner = word.replace(side, other)
            if partner not in found:
                raise UserError(
                    f"data {name}: its keypoint '{word}' has no '{partner}', which it becomes in a "
                    "mirrored image"
                )
            if side == "left":
                pairs.append((word, partner))
    return pairs


def _check_recipe(cfg: CfgNode, name: str, found: Sequence[str]) -> None:
    wanted, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    if wanted != len(found):
        raise UserError(
            f"{COUNT_KEY}: found {wanted}, {name} names {len(found)}; set it to that, and "
            f"{SIGMAS_KEY} to one number for each"
        )
    if sigmas and len(sigmas) != len(found):
        raise UserError(f"{SIGMAS_KEY}: found {len(sigmas)} numbers, want {len(found)}")
    if not sigmas and tuple(found) != tuple(COCO_PERSON_KEYPOINT_NAMES):
        raise UserError(
            f"{SIGMAS_KEY}: is empty, which means those of COCO's 17; {name} has other keypoints "
            f"({', '.join(found[:3])}, ...): give {len(found)} numbers"
        )
