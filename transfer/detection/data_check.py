"""Is a detection set what it says it is? Looked at before a run, and by --check-data alone.

Before a run only the heads of image files are read; --check-data decodes every one.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from convert.errors import UserError
from convert.progress import Progress
from transfer.detection import datasets
from transfer.detection import keypoints as joints

# Images of the sets that the papers train and test on.
PUBLISHED = {
    "voc_2007_train": 2501,
    "voc_2007_val": 2510,
    "voc_2007_trainval": 5011,
    "voc_2007_test": 4952,
    "voc_2012_train": 5717,
    "voc_2012_val": 5823,
    "voc_2012_trainval": 11540,
    "coco_2017_train": 118287,
    "coco_2017_val": 5000,
    "keypoints_coco_2017_train": 118287,  # of which 64115 show a person
    "keypoints_coco_2017_val": 5000,
    "cityscapes_fine_instance_seg_train": 2975,
    "cityscapes_fine_instance_seg_val": 500,
}
ORIENTATION = 0x0112  # EXIF; Detectron2 turns an image as this tag says
TURNED = (5, 6, 7, 8)  # by a quarter: width and height change places
THREADS = 16  # more than cores: a file on a network makes one wait
NAMED = 3  # of a kind of fault
CHUNK = 256  # files a task
AT_ONCE = 1000  # fewer images are looked at without showing how far it is


@dataclass(frozen=True)
class Findings:
    """What was found in one set.

    Attributes:
        summary: one line of counts.
        stops: faults that a run cannot live with.
        notes: what a run lives with, and one wants to know.
    """

    summary: str
    stops: tuple[str, ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return it as text, a fault a line."""
        stops = [f"  stops a run: {line}" for line in self.stops]
        return [self.summary, *stops, *(f"  note: {line}" for line in self.notes)]


def look(
    reading: datasets.Reading,
    *,
    training: bool,
    decode: bool = False,
    keypoints: int = 0,
    quiet: bool = True,
) -> Findings:
    """Hold a set's listing against its image files and against itself.

    Args:
        reading: the set.
        training: broken boxes will be dropped from it, as nothing can be learnt from them.
        decode: read whole images, not only their heads.
        keypoints: that each object has; 0: they do not matter.
        quiet: show no progress.
    """
    dicts = reading.dicts
    stops = [*reading.faults, *_files(dicts, decode, quiet)]
    boxes = sum(len(image.get("annotations", [])) for image in dicts)
    empty = sum(not image.get("annotations") for image in dicts)
    summary = (
        f"data {reading.name}: {len(dicts)} images ({empty} without a box), {boxes} boxes, "
        f"{len(reading.classes)} classes"
    )
    notes = [*reading.notes, *_boxes(dicts, training), *_unused(reading)]
    if keypoints:
        broken, outside = joints.faults(dicts, keypoints)
        if broken:
            wanted = f"objects have no {keypoints} keypoints, each x, y and a visibility of 0 to 2"
            stops.append(_named(wanted, broken, boxes))
        if outside:
            notes.append(_named("labelled keypoints lie outside their image", outside))
    published = PUBLISHED.get(reading.name)
    if published not in (None, len(dicts)):
        notes.append(f"the published set has {published} images, this one {len(dicts)}")
    return Findings(summary, tuple(stops), tuple(notes))


def refuse(findings: Iterable[Findings]) -> None:
    """Stop if anything stops a run.

    Raises:
        UserError: names the first fault, and counts the others.
    """
    stops = [f"{one.summary.split(': ')[0]}: {line}" for one in findings for line in one.stops]
    if stops:
        more = f" (and {len(stops) - 1} more kinds of fault)" if len(stops) > 1 else ""
        raise UserError(f"{stops[0]}{more}; --check-data lists all")


def _files(dicts: Sequence[dict[str, Any]], decode: bool, quiet: bool) -> list[str]:
    """Say which files are missing, cannot be read or have another size, a line a kind."""
    chunks = [dicts[start : start + CHUNK] for start in range(0, len(dicts), CHUNK)]
    faults: dict[str, list[str]] = {}
    what = "decoding images" if decode else "looking at images"
    silent = quiet or len(dicts) < AT_ONCE
    with (
        ThreadPoolExecutor(THREADS) as pool,
        Progress(len(dicts), what, quiet=silent) as shown,
    ):
        found = pool.map(partial(_look_at, decode=decode), chunks)
        for chunk, part in zip(chunks, found, strict=True):
            shown.add(len(chunk))
            for kind, line in part:
                faults.setdefault(kind, []).append(line)
    return [_named(kind, lines, len(dicts)) for kind, lines in faults.items()]


def _look_at(dicts: Sequence[dict[str, Any]], decode: bool) -> list[tuple[str, str]]:
    """Return kind and place of each fault of some images."""
    faults = []
    for image in dicts:
        file = image["file_name"]
        if not os.path.isfile(file):  # noqa: PTH113 (ten times faster, and there are 100,000)
            faults.append(("images are missing", file))
            continue
        try:
            size = image_size(file, decode)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
            faults.append(("images cannot be read", f"{file} ({error})"))
            continue
        listed = (image["width"], image["height"])
        if size != listed:
            sizes = f"{size[0]} x {size[1]}, listed as {listed[0]} x {listed[1]}"
            faults.append(("images have another size than listed", f"{file} is {sizes}"))
    return faults


def image_size(file: str | Path, decode: bool = False) -> tuple[int, int]:
    """Return width and height in pixels, as Detectron2 will see the image.

    Raises:
        OSError: it is no image, or damaged.
    """
    with Image.open(file) as image:
        width, height = image.size
        turned = "exif" in image.info and image.getexif().get(ORIENTATION) in TURNED
        if decode:
            image.load()
    return (height, width) if turned else (width, height)


def _boxes(dicts: Sequence[dict[str, Any]], training: bool) -> list[str]:
    faults: dict[str, list[str]] = {}
    total = 0
    for image in dicts:
        total += len(image.get("annotations", []))
        for place, why in datasets.broken_boxes(image):
            kind = "have no area" if "area" in why else "lie outside their image"
            where = f"{Path(image['file_name']).name} {image['annotations'][place]['bbox']}"
            faults.setdefault(kind, []).append(where)
    after = "dropped" if training else "kept, as the measure has them"
    return [_named(f"boxes {kind} ({after})", lines, total) for kind, lines in faults.items()]


def _unused(reading: datasets.Reading) -> list[str]:
    used = {a["category_id"] for image in reading.dicts for a in image.get("annotations", [])}
    lost = [name for place, name in enumerate(reading.classes) if place not in used]
    if not lost:
        return []
    return [f"no box of {len(lost)} classes: {', '.join(lost[:5])}{', ...' * (len(lost) > 5)}"]


def _named(kind: str, lines: Sequence[str], total: int | None = None) -> str:
    more = ", ..." if len(lines) > NAMED else ""
    of = "" if total is None else f" of {total}"
    return f"{len(lines)}{of} {kind}: {', '.join(lines[:NAMED])}{more}"
