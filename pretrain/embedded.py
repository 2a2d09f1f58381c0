"""The embedded set: real images without a download.

scikit-learn ships 1,797 scanned handwritten digits (8x8) and two photographs. From them come single
digits, for pretraining and classification, and scenes of several digits, for detection. Everything
is drawn from generators seeded with (seed, part, index), so the set is the same on every machine
with the same versions of NumPy, Pillow and scikit-learn.

Train and validation share neither a digit nor a pixel of a photograph.

Legend: H, W: height and width in pixels; x to the right, y down, both from the top left corner.
A further layout (keypoints, masks, folders of another benchmark) is one function that takes a root
and the scenes, and its name in `SCENE_LAYOUTS`.
"""

import hashlib
import json
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convert.errors import UserError
from convert.files import CACHE_VARIABLE, cache_folder, write_json

Split = Literal["train", "val"]
Box = tuple[int, int, int, int]  # x, y, width, height
Mask = NDArray[np.bool_]  # (H, W)
Pixels = NDArray[np.float32]  # (H, W, 3) RGB or (H, W), 0..1

SPLITS: tuple[Split, ...] = ("train", "val")
CATEGORY = "digit"  # the one class that detectors learn; the ten values stay beside it
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
FINE = 8  # a scanned pixel's side while its digit is turned and cut out


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the set looks like; the cache folder's name is its hash."""

    seed: int = 20191113  # the day MoCo v1 was submitted
    val_share: float = 0.25  # of the digits of each value
    val_columns: tuple[float, float] = (0.42, 0.67)  # of each photograph, shares of its width

    single_side: int = 64  # px
    single_extent: tuple[float, float] = (
        0.55,
        0.90,
    )  # longer side of the digit, share of the image

    scene_side: int = 128  # px
    train_scenes: int = 240
    val_scenes: int = 60
    scene_digits: tuple[int, int] = (1, 6)
    scene_extent: tuple[float, float] = (16.0, 56.0)  # longer side of a digit, px
    box_iou: float = 0.3  # boxes of one scene overlap less
    visible: float = 0.75  # of a digit's pixels at least, under the later ones
    jpeg_quality: int = 95

    degrees: float = 20.0  # digits turn by up to this, either way
    photo_crop: tuple[int, int] = (64, 148)  # side of the patch before it is resized, px
    background_range: tuple[float, float] = (0.3, 0.65)  # what is left of the patch's contrast
    tint_value: tuple[float, float] = (0.3, 1.0)  # how light the colour over a patch is
    ink_contrast: float = 0.35  # luma between a digit and the mean of what it covers


RECIPE = Recipe()


@dataclass(frozen=True)
class Sources:
    """What scikit-learn ships.

    Attributes:
        scans: (1797, 8, 8) float32, 0 paper to 1 ink.
        values: (1797,) int, 0..9.
        photos: each (427, 640, 3) float32 RGB, 0..1.
    """

    scans: NDArray[np.float32]
    values: NDArray[np.int64]
    photos: tuple[Pixels, ...]


@dataclass(frozen=True)
class Single:
    """One digit on a patch of a photograph.

    Attributes:
        index: the digit's place in scikit-learn's list.
        value: 0..9.
        image: (H, W, 3) uint8 RGB.
    """

    index: int
    value: int
    image: NDArray[np.uint8]


@dataclass(frozen=True)
class Digit:
    """One digit of a scene.

    Attributes:
        value: 0..9.
        index: its place in scikit-learn's list.
        mask: (H, W) bool, the part that later digits leave visible.
    """

    value: int
    index: int
    mask: Mask

    @cached_property
    def box(self) -> Box:
        """The tight box of the visible part: x, y, width, height in pixels."""
        return tight_box(self.mask)


@dataclass(frozen=True)
class Scene:
    """Several digits on a patch of a photograph.

    Attributes:
        image_id: unique over both splits, from 1.
        image: (H, W, 3) uint8 RGB.
        digits: in the order of drawing: later ones cover earlier ones.
    """

    image_id: int
    image: NDArray[np.uint8]
    digits: tuple[Digit, ...]


Scenes = Mapping[Split, Sequence[Scene]]


# --- the cache ------------------------------------------------------------------------------------


def embedded_root() -> Path:
    """Return the embedded set's folder; the first call builds it, in a few seconds.

    The folder has the shape that `DETECTRON2_DATASETS` wants, and the single digits beside it:
    `digits/{train,val}/<value>/<index>.png`, `VOC2007/`, `coco/`, `lvis/`,
    `cityscapes/`.

    Processes that start at once may all build; the first to finish wins, the others discard theirs.

    Raises:
        UserError: the cache folder cannot be written.
    """
    name = f"embedded-{recipe_hash(RECIPE)}"
    return cached(name, lambda folder: build(folder, load_sources(), RECIPE))


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """Return a set's folder in the cache, whole; the first call builds it.

    Args:
        name: of the folder; another content has another name.
        write: what fills a new folder.

    Raises:
        UserError: the cache folder cannot be written.
    """
    root = cache_folder() / name
    if root.is_dir():
        return root
    temporary = None
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        # Its owner alone may enter it, hence a folder inside: that one becomes the set.
        temporary = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
        print(f"embedded set: building in {root}", file=sys.stderr, flush=True)
        write(temporary / "set")
        _install(temporary / "set", root)
    except OSError as error:
        raise UserError(
            f"cache folder {root.parent}: cannot be written ({error.strerror or error}); "
            f"name another one in the environment variable {CACHE_VARIABLE}"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return root


def recipe_hash(recipe: Recipe) -> str:
    """Hash all that decides the set's bytes to twelve hexadecimal digits."""
    return content_hash(asdict(recipe), Path(__file__))


def content_hash(decides: Any, *code: Path) -> str:
    """Hash what decides a set's bytes to twelve hexadecimal digits.

    Beside the recipe these are the libraries' versions and the code: whoever edits a function
    there, or shares a cache with an older environment, gets a new folder, not an old set.
    """
    versions = {name: metadata.version(name) for name in ("numpy", "Pillow", "scikit-learn")}
    content = json.dumps([decides, versions]).encode() + b"".join(f.read_bytes() for f in code)
    return hashlib.sha256(content).hexdigest()[:12]


def _install(built: Path, root: Path) -> None:
    try:
        built.rename(root)
    except OSError:
        if not root.is_dir():
            raise  # not a lost race: another process would have left a whole set here


# --- the sources ----------------------------------------------------------------------------------


def load_sources() -> Sources:
    """Read the digits and the photographs that scikit-learn ships."""
    from sklearn.datasets import load_digits, load_sample_image  # half a second

    digits = load_digits()
    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return Sources(
        scans=(digits.images / 16).astype(np.float32),
        values=digits.target.astype(np.int64),
        photos=tuple(photo.astype(np.float32) / 255 for photo in photos),
    )


def split_digits(values: NDArray[np.int64], recipe: Recipe) -> dict[Split, list[int]]:
    """Part the digits into train and validation, each value in the same proportion.

    Args:
        values: (N,) the digits' values.
        recipe: its `val_share` and `seed` decide.

    Returns:
        Places in the list, ascending.
    """
    parts: dict[Split, list[int]] = {"train": [], "val": []}
    for value in range(10):
        places = _generator(recipe, "split", value).permutation(np.flatnonzero(values == value))
        count = round(recipe.val_share * len(places))
        parts["val"] += places[:count].tolist()
        parts["train"] += places[count:].tolist()
    return {split: sorted(places) for split, places in parts.items()}


def split_photos(photos: Sequence[Pixels], split: Split, recipe: Recipe) -> list[Pixels]:
    """Cut the photographs: a band of columns is for validation, what is beside it for training.

    The band runs through both motifs, so that either split holds plain and busy regions.
    """
    parts = []
    for photo in photos:
        left, right = (round(share * photo.shape[1]) for share in recipe.val_columns)
        outer, band = [photo[:, :left], photo[:, right:]], [photo[:, left:right]]
        parts += outer if split == "train" else band
    return parts


def _generator(recipe: Recipe, part: str, index: int) -> np.random.Generator:
    return np.random.default_rng([recipe.seed, *part.encode(), index])


# --- drawing --------------------------------------------------------------------------------------


def make_singles(sources: Sources, split: Split, recipe: Recipe) -> list[Single]:
    """Draw every digit of a split once."""
    photos = split_photos(sources.photos, split, recipe)
    places = split_digits(sources.values, recipe)[split]
    return [_draw_single(sources, photos, place, recipe) for place in places]


def _draw_single(sources: Sources, photos: Sequence[Pixels], place: int, recipe: Recipe) -> Single:
    rng = _generator(recipe, "single", place)
    canvas = draw_background(photos, recipe.single_side, rng, recipe)
    extent = recipe.single_side * rng.uniform(*recipe.single_extent)
    alpha = draw_stroke(sources.scans[place], extent, rng.uniform(-1, 1) * recipe.degrees)
    alpha = _place(alpha, recipe.single_side, rng)
    canvas = paint(canvas, alpha, rng, recipe)
    return Single(place, int(sources.values[place]), _as_bytes(canvas))


def make_scenes(sources: Sources, split: Split, recipe: Recipe) -> list[Scene]:
    """Draw the scenes of a split; their ids go on from training to validation."""
    photos = split_photos(sources.photos, split, recipe)
    places = split_digits(sources.values, recipe)[split]
    first, count = {
        "train": (1, recipe.train_scenes),
        "val": (1 + recipe.train_scenes, recipe.val_scenes),
    }[split]
    return [
        _draw_scene(sources, photos, places, image_id, recipe)
        for image_id in range(first, first + count)
    ]


def _draw_scene(
    sources: Sources, photos: Sequence[Pixels], places: list[int], image_id: int, recipe: Recipe
) -> Scene:
    rng = _generator(recipe, "scene", image_id)
    canvas = draw_background(photos, recipe.scene_side, rng, recipe)
    low, high = recipe.scene_digits
    wanted = int(rng.integers(low, high + 1))
    digits: list[Digit] = []
    sizes: list[int] = []  # pixels of each digit before others covered it
    for place in rng.choice(places, 8 * wanted, replace=False).tolist():
        extent = np.exp(rng.uniform(*np.log(recipe.scene_extent)))
        alpha = draw_stroke(sources.scans[place], extent, rng.uniform(-1, 1) * recipe.degrees)
        alpha = _place(alpha, recipe.scene_side, rng)
        mask = alpha >= 0.5
        covered = [replace(digit, mask=digit.mask & ~mask) for digit in digits]
        candidate = [*covered, Digit(int(sources.values[place]), place, mask)]
        if crowded(candidate, [*sizes, int(mask.sum())], recipe):
            continue
        digits, sizes = candidate, [*sizes, int(mask.sum())]
        canvas = paint(canvas, alpha, rng, recipe)
        if len(digits) == wanted:
            break
    return Scene(image_id, _as_bytes(canvas), tuple(digits))


def crowded(digits: Sequence[Digit], sizes: Sequence[int], recipe: Recipe) -> bool:
    """Say whether a digit is hidden too far or two boxes overlap too much.

    Args:
        digits: of one scene, as far as they are visible.
        sizes: pixels of each before others covered it.
        recipe: its `visible` and `box_iou` are the limits.
    """
    if any(d.mask.sum() < recipe.visible * n for d, n in zip(digits, sizes, strict=True)):
        return True
    boxes = [digit.box for digit in digits]
    return any(
        box_iou(one, other) >= recipe.box_iou for i, one in enumerate(boxes) for other in boxes[:i]
    )


def draw_background(
    photos: Sequence[Pixels], side: int, rng: np.random.Generator, recipe: Recipe
) -> Pixels:
    """Cut a random patch, mirror and tint it, and darken or lighten it.

    Returns:
        (side, side, 3).
    """
    crops = [_crop(photos[int(rng.integers(len(photos)))], rng, recipe) for _ in range(3)]
    patch = max(crops, key=lambda crop: float(crop.std()))  # sky and blur are easy: prefer motifs
    if rng.random() < 0.5:
        patch = patch[:, ::-1]
    patch = _resize(patch, side, side)[..., rng.permutation(3)]
    kept = rng.uniform(*recipe.background_range)
    tint = (1 - kept) * rng.uniform(*recipe.tint_value) * draw_hues(rng, 1)[0]
    background: Pixels = (patch * kept + tint).astype(np.float32)
    return background


def draw_hues(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Draw saturated colours, (count, 3): one channel full, one empty, one between, in any order.

    Instances are told apart by colour first, and it survives most augmentations.
    """
    hues = np.stack([np.ones(count), rng.uniform(0, 1, count), np.zeros(count)], axis=1)
    return rng.permuted(hues, axis=1).astype(np.float32)


def _crop(photo: Pixels, rng: np.random.Generator, recipe: Recipe) -> Pixels:
    height, width = photo.shape[:2]
    low, high = recipe.photo_crop
    side = int(rng.integers(low, min(high, height, width) + 1))
    y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
    return photo[y : y + side, x : x + side]


def draw_stroke(scan: NDArray[np.float32], extent: float, degrees: float) -> Pixels:
    """Turn a scanned digit into a smooth stroke of a given size.

    Args:
        scan: (8, 8), 0 paper to 1 ink.
        extent: longer side of the stroke's box, px.
        degrees: rotation, counter-clockwise.

    Returns:
        Its opacity, cropped to the stroke: (h, w) with max(h, w) about `extent`.
    """
    from scipy import ndimage  # comes with scikit-learn

    padded = np.pad(scan, 3)
    # A scan's grey is blur. Ink is what is darker than its surroundings: so faint strokes stay in
    # one piece and the loops of 0, 6, 8 and 9 stay open, which no single threshold does.
    sharp = padded - 0.7 * ndimage.gaussian_filter(padded, 1.0)
    fine = Image.fromarray(sharp).resize((len(padded) * FINE,) * 2, Image.Resampling.BICUBIC)
    turned = np.asarray(fine.rotate(degrees, Image.Resampling.BICUBIC))
    stroke = np.clip((turned - 0.05) / 0.1, 0, 1).astype(np.float32)
    x, y, width, height = tight_box(stroke >= 0.5)
    scale = extent / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.clip(_resize(stroke[y : y + height, x : x + width], *size), 0, 1)


def paint(canvas: Pixels, alpha: Pixels, rng: np.random.Generator, recipe: Recipe) -> Pixels:
    """Draw a stroke in a random colour that stands out from what it covers.

    Args:
        canvas: (H, W, 3).
        alpha: (H, W) opacity.
        rng: where the colour comes from.
        recipe: its `ink_contrast` is the least difference in luma.
    """
    inks = draw_hues(rng, 64) * rng.uniform(0, 1, size=(64, 1)).astype(np.float32)
    below = float((canvas @ LUMA * alpha).sum() / alpha.sum())
    contrast = np.abs(inks @ LUMA - below)
    enough = np.flatnonzero(contrast >= recipe.ink_contrast)
    ink = inks[enough[0] if len(enough) else contrast.argmax()]
    painted: Pixels = canvas + alpha[..., None] * (ink - canvas)
    return painted


def _place(alpha: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """Put a stroke somewhere on an empty square, (side, side), whole."""
    height, width = alpha.shape
    y, x = rng.integers(side - height + 1), rng.integers(side - width + 1)
    square = np.zeros((side, side), np.float32)
    square[y : y + height, x : x + width] = alpha
    return square


def _resize(pixels: Pixels, width: int, height: int) -> Pixels:
    # Pillow resizes float images of one channel only; thrice that keeps the photographs unrounded.
    channels = [np.ascontiguousarray(c) for c in np.moveaxis(np.atleast_3d(pixels), 2, 0)]
    resized = [
        np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC))
        for c in channels
    ]
    stacked: Pixels = np.stack(resized, axis=-1)
    return stacked if pixels.ndim == 3 else resized[0]


def _as_bytes(canvas: Pixels) -> NDArray[np.uint8]:
    return (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8)


# --- boxes and outlines ---------------------------------------------------------------------------


def tight_box(mask: Mask) -> Box:
    """Return the smallest box around a mask that is not empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1


def box_iou(one: Box, other: Box) -> float:
    """Return the intersection of two boxes over their union."""
    ends = [min(one[i] + one[i + 2], other[i] + other[i + 2]) for i in (0, 1)]
    sides = [max(0, ends[i] - max(one[i], other[i])) for i in (0, 1)]
    shared = sides[0] * sides[1]
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def outline(mask: Mask) -> list[list[int]]:
    """Trace a mask along the borders of its pixels, exactly.

    COCO's polygons know no holes, so that a ring is cut in two where its hole begins.

    Args:
        mask: (H, W), not empty.

    Returns:
        COCO polygons `[x, y, x, y, ...]`, each around one hole-free piece; rasterised together they
        give the mask back.
    """
    return [_trace(piece) for piece in _pieces(mask)]


def _pieces(mask: Mask) -> list[Mask]:
    """Part a mask into pieces that hang together by pixel sides and have no holes."""
    from scipy import ndimage  # comes with scikit-learn

    labels, count = ndimage.label(mask)
    pieces: list[Mask] = []
    for label in range(1, count + 1):
        piece = labels == label
        # Around pieces that hang together by sides, the outside does by corners too. The frame of
        # padding makes it label 1; what it does not reach is a hole.
        outside = ndimage.label(np.pad(~piece, 1, constant_values=True), np.ones((3, 3)))[0]
        holes = outside[1:-1, 1:-1] > 1
        if not holes.any():
            pieces.append(piece)
            continue
        cut = tight_box(holes)[0] + 1  # the hole's first column ends the left part
        columns = np.arange(mask.shape[1]) < cut
        pieces += _pieces(piece & columns) + _pieces(piece & ~columns)
    return pieces


def _trace(piece: Mask) -> list[int]:
    """Walk once around a piece, clockwise, its pixels on the right hand; keep the corners."""
    padded = np.pad(piece, 1)
    y, x = divmod(int(piece.argmax()), piece.shape[1])  # the top row's first pixel
    start = (x, y)
    dx, dy = 1, 0
    corners = [x, y]
    while True:
        x, y = x + dx, y + dy
        if (x, y) == start:
            return corners
        # The two pixels ahead. Corner (x, y) touches padded[y : y + 2, x : x + 2]; each index
        # below is that slice's first or second one, as the direction says.
        right = padded[y + (dx + dy + 1) // 2, x + (dx - dy + 1) // 2]
        left = padded[y + (dy - dx + 1) // 2, x + (dx + dy + 1) // 2]
        if not right:  # also where pieces touch by a corner only: stay on this one
            corners += [x, y]
            dx, dy = -dy, dx
        elif left:
            corners += [x, y]
            dx, dy = dy, -dx


# --- the layouts ----------------------------------------------------------------------------------


def build(root: Path, sources: Sources, recipe: Recipe) -> None:
    """Write the whole set into a new folder."""
    for split in SPLITS:
        write_image_folder(root / "digits" / split, make_singles(sources, split, recipe))
    scenes: Scenes = {split: make_scenes(sources, split, recipe) for split in SPLITS}
    for write_layout in SCENE_LAYOUTS:
        write_layout(root, scenes, recipe)


def write_image_folder(folder: Path, singles: Sequence[Single]) -> None:
    """Write `<value>/<index>.png`, what torchvision's ImageFolder reads."""
    for single in singles:
        path = folder / str(single.value) / f"{single.index:04d}.png"
        Image.fromarray(single.image).save(_ready(path))


def write_coco(root: Path, scenes: Scenes, recipe: Recipe) -> None:
    """Write `coco/{train2017,val2017}` and their instances; `value` tells a digit's 0..9."""
    for split, part in scenes.items():
        images, annotations = [], []
        for scene in part:
            name = f"{scene.image_id:012d}.jpg"
            _save_jpeg(scene, root / "coco" / f"{split}2017" / name, recipe)
            height, width = scene.image.shape[:2]
            images.append(
                {"id": scene.image_id, "file_name": name, "height": height, "width": width}
            )
            annotations += _coco_annotations(scene)
        content = {
            "info": {"description": "MoCo Transfer's embedded digits", "version": "1.0"},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": CATEGORY, "supercategory": CATEGORY}],
        }
        write_json(root / "coco" / "annotations" / f"instances_{split}2017.json", content)


def _coco_annotations(scene: Scene) -> list[dict[str, Any]]:
    return [
        {
            "id": 100 * scene.image_id + place,  # COCO's evaluation takes an id of 0 for no match
            "image_id": scene.image_id,
            "category_id": 1,
            "bbox": list(digit.box),
            "area": int(digit.mask.sum()),
            "segmentation": outline(digit.mask),
            "iscrowd": 0,
            "value": digit.value,
        }
        for place, digit in enumerate(scene.digits)
    ]


# LVIS's categories: values with loops, strokes, and one value each. Annotators of a category looked
# at so many training images, in order: hence it is rare, common or frequent.
LVIS_CATEGORIES: tuple[tuple[str, str, tuple[int, ...], int], ...] = (
    ("loop", "f", (0, 6, 8, 9), 240),
    ("stroke", "f", (1, 4, 7), 240),
    ("two", "c", (2,), 240),
    ("three", "c", (3,), 120),
    ("five", "r", (5,), 16),
)


def write_lvis(root: Path, scenes: Scenes, recipe: Recipe) -> None:
    """Write `lvis/lvis_v0.5_{train,val}.json`, of the images in `coco/`.

    As in LVIS, an image says which categories were looked for in it and are not there, and of which
    not every object is annotated: of every third image's loops that is one.
    """
    for split, part in scenes.items():
        images, annotations = [], []
        for scene in part:
            looked = {
                number
                for number, (_, _, _, most) in enumerate(LVIS_CATEGORIES, start=1)
                if split == "val" or scene.image_id <= most
            }
            objects, partly = _lvis_objects(scene, looked)
            height, width = scene.image.shape[:2]
            name = f"{scene.image_id:012d}.jpg"
            images.append(
                {
                    "id": scene.image_id,
                    "file_name": name,
                    "coco_url": f"embedded://{split}2017/{name}",
                    "height": height,
                    "width": width,
                    "neg_category_ids": sorted(looked - {e["category_id"] for e in objects}),
                    "not_exhaustive_category_ids": sorted(partly),
                }
            )
            annotations += objects
        counts = [
            len({e["image_id"] for e in annotations if e["category_id"] == number})
            for number in range(1, 1 + len(LVIS_CATEGORIES))
        ]
        words = [
            {"id": number, "name": name, "frequency": frequency, "image_count": count}
            for number, ((name, frequency, _, _), count) in enumerate(
                zip(LVIS_CATEGORIES, counts, strict=True), start=1
            )
        ]
        content = {
            "info": {"description": "MoCo Transfer's embedded digits", "version": "0.5"},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": words,
        }
        write_json(root / "lvis" / f"lvis_v0.5_{split}.json", content)


def _lvis_objects(scene: Scene, looked: set[int]) -> tuple[list[dict[str, Any]], set[int]]:
    """Return a scene's objects of the categories looked for, and those partly annotated."""
    numbers = {
        value: number
        for number, (_, _, values, _) in enumerate(LVIS_CATEGORIES, start=1)
        for value in values
    }
    objects: list[dict[str, Any]] = []
    partly: set[int] = set()
    for entry in _coco_annotations(scene):
        number = numbers[entry["value"]]
        again = number == 1 and any(e["category_id"] == 1 for e in objects)
        if number in looked and again and scene.image_id % 3 == 0:
            partly.add(number)
        elif number in looked:
            objects.append(
                {k: v for k, v in entry.items() if k != "iscrowd"} | {"category_id": number}
            )
    return objects, partly


# Cityscapes' labels of things, by a digit's value; a 9 is a group of cars (`cargroup`).
CITY_LABELS = (24, 25, 26, 27, 28, 31, 32, 33, 24)
CITY_ROAD, CITY_BORDER, CITY_GROUP = 7, 3, 26
CITY_BORDER_ROWS = 8  # out of the region of interest, as above Cityscapes' photographs


def write_cityscapes(root: Path, scenes: Scenes, recipe: Recipe) -> None:
    """Write `cityscapes/{leftImg8bit,gtFine}/{train,val}/digits/`: photographs, ids and labels."""
    for split, part in scenes.items():
        for scene in part:
            ids = _city_ids(scene)
            labels = np.where(ids >= 1000, ids // 1000, ids)
            images = {
                "leftImg8bit": Image.fromarray(scene.image),
                "gtFine_instanceIds": Image.fromarray(ids.astype(np.uint16)),
                "gtFine_labelIds": Image.fromarray(labels.astype(np.uint8)),
            }
            for kind, image in images.items():
                folder = root / "cityscapes" / kind.split("_")[0] / split / "digits"
                file = folder / f"digits_{scene.image_id:06d}_000019_{kind}.png"
                image.save(_ready(file), compress_level=1)  # photographs hardly shrink


def _city_ids(scene: Scene) -> NDArray[np.int64]:
    ids = np.full(scene.image.shape[:2], CITY_ROAD, np.int64)
    ids[:CITY_BORDER_ROWS] = CITY_BORDER
    for number, digit in enumerate(scene.digits):
        single = digit.value < len(CITY_LABELS)
        ids[digit.mask] = 1000 * CITY_LABELS[digit.value] + number if single else CITY_GROUP
    return ids


def write_voc(root: Path, scenes: Scenes, recipe: Recipe) -> None:
    """Write `VOC2007/`: trainval is our training split, test our validation split."""
    folder = root / "VOC2007"
    for split, listing in (("train", "trainval"), ("val", "test")):
        names = []
        for scene in scenes[split]:  # type: ignore[index]
            name = f"{scene.image_id:06d}"
            _save_jpeg(scene, folder / "JPEGImages" / f"{name}.jpg", recipe)
            tree = ET.ElementTree(_voc_annotation(scene, name))
            ET.indent(tree)
            tree.write(_ready(folder / "Annotations" / f"{name}.xml"))
            names.append(name + "\n")
        path = _ready(folder / "ImageSets" / "Main" / f"{listing}.txt")
        path.write_text("".join(names), encoding="ascii")


def _voc_annotation(scene: Scene, name: str) -> ET.Element:
    height, width, depth = scene.image.shape
    root = ET.Element("annotation")
    _add(root, folder="VOC2007", filename=f"{name}.jpg")
    _add(ET.SubElement(root, "size"), width=width, height=height, depth=depth)
    _add(root, segmented=0)
    for digit in scene.digits:
        entry = ET.SubElement(root, "object")
        _add(entry, name=CATEGORY, pose="Unspecified", truncated=0, difficult=0, value=digit.value)
        x, y, w, h = digit.box
        # PASCAL counts pixels from 1, and the last one belongs to the box.
        _add(ET.SubElement(entry, "bndbox"), xmin=x + 1, ymin=y + 1, xmax=x + w, ymax=y + h)
    return root


def _add(parent: ET.Element, **fields: object) -> None:
    for name, value in fields.items():
        ET.SubElement(parent, name).text = str(value)


def _save_jpeg(scene: Scene, path: Path, recipe: Recipe) -> None:
    Image.fromarray(scene.image).save(_ready(path), quality=recipe.jpeg_quality)


def _ready(path: Path) -> Path:
    # Files are written plainly here: the folder as a whole appears at once, or not at all.
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


SCENE_LAYOUTS = (write_coco, write_voc, write_lvis, write_cityscapes)
