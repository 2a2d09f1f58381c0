"""The embedded figures: drawn people whose joints are known, for keypoint detection.

Mannequins on the patches of photographs that the embedded digits stand on, with COCO's seventeen
keypoints, one to three an image. They face the viewer, so that a figure's left is on the image's
right, as a mirrored image has it too. Some are cut off by the image's edge (those keypoints are not
labelled), some are covered by a later one (labelled, not visible). As with the digits, everything
is drawn from generators seeded with (seed, part, index), and training and validation share no
pixel of a photograph.

Legend: P = 17 keypoints; x to the right, y down, in pixels from the top left corner of the image;
a keypoint in a file is the place of a pixel, as COCO has it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from convert.files import write_json
from pretrain import embedded
from pretrain.embedded import SPLITS, Box, Mask, Pixels, Split, box_iou, outline, paint, tight_box

CATEGORY = "figure"
_SIDES = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
KEYPOINTS = ("nose", *(f"{side}_{part}" for part in _SIDES for side in ("left", "right")))
SKELETON = tuple(
    (KEYPOINTS.index(one), KEYPOINTS.index(other))
    for side in ("left", "right")
    for one, other in (
        ("nose", f"{side}_eye"),
        (f"{side}_eye", f"{side}_ear"),
        (f"{side}_shoulder", f"{side}_elbow"),
        (f"{side}_elbow", f"{side}_wrist"),
        (f"{side}_shoulder", f"{side}_hip"),
        (f"{side}_hip", f"{side}_knee"),
        (f"{side}_knee", f"{side}_ankle"),
    )
)
VISIBLE, COVERED, UNLABELLED = 2, 1, 0  # COCO's third number of a keypoint
FINE = 4  # a pixel's side while a figure is drawn

Points = NDArray[np.float64]  # (P, 2) x, y


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the set looks like, beside the digits' own recipe."""

    seed: int = 20191113
    side: int = 128  # px
    train_images: int = 200
    val_images: int = 50
    figures: tuple[int, int] = (1, 3)
    height: tuple[float, float] = (64.0, 116.0)  # from head to ankles where it stands, px
    degrees: float = 15.0  # figures lean by up to this, either way
    outside: float = 0.15  # of a figure's width and height at most, beyond an edge
    visible: float = 0.6  # of a figure's pixels at least, under the later ones
    box_iou: float = 0.4  # boxes of one image overlap less


RECIPE = Recipe()

# Of a figure that stands one unit tall, from between its hips; x of its left side, y down.
_HEAD, _HEAD_RADII = (0.0, -0.43), (0.062, 0.078)
_FIXED = {"ear": (0.064, -0.43), "shoulder": (0.125, -0.30), "hip": (0.07, 0.0)}
_EYE, _NOSE = (0.028, -0.445), (0.0, -0.415)
_TURN = 0.018  # the face's shift when a head is turned, at most
# joint -> (the one it hangs on, length, least and most angle outward from straight down; for the
# outer one from the inner one's direction)
_LIMBS = {
    "elbow": ("shoulder", 0.17, (5.0, 150.0)),
    "wrist": ("elbow", 0.15, (-30.0, 100.0)),
    "knee": ("hip", 0.24, (-5.0, 45.0)),
    "ankle": ("knee", 0.23, (-40.0, 10.0)),
}
_WIDTHS = {"arm": 0.050, "leg": 0.070, "ear": 0.030, "face": 0.024}


@dataclass(frozen=True)
class Figure:
    """One figure of an image.

    Attributes:
        points: (P, 2) where its keypoints are, also those outside the image.
        mask: (H, W) bool, the part that later figures leave visible.
        covered: (P,) bool, keypoints behind later figures.
    """

    points: Points
    mask: Mask
    covered: NDArray[np.bool_]

    @cached_property
    def box(self) -> Box:
        """The tight box of the visible part: x, y, width, height in pixels."""
        return tight_box(self.mask)

    def keypoints(self) -> list[int]:
        """Return COCO's `[x, y, v, ...]`, 3 P numbers, zeros outside the image."""
        height, width = self.mask.shape
        found = []
        for (x, y), covered in zip(np.floor(self.points).astype(int), self.covered, strict=True):
            inside = 0 <= x < width and 0 <= y < height
            word = COVERED if covered else VISIBLE
            found += [int(x), int(y), word] if inside else [0, 0, UNLABELLED]
        return found


@dataclass(frozen=True)
class Picture:
    """Figures on a patch of a photograph.

    Attributes:
        image_id: unique over both splits, from 1.
        image: (H, W, 3) uint8 RGB.
        figures: in the order of drawing: later ones cover earlier ones.
    """

    image_id: int
    image: NDArray[np.uint8]
    figures: tuple[Figure, ...]


def figures_root() -> Path:
    """Return the figures' folder; the first call builds it, in a few seconds.

    It has COCO's shape: `train2017/`, `val2017/`, `annotations/person_keypoints_*.json`.

    Raises:
        UserError: the cache folder cannot be written.
    """
    decides = [asdict(RECIPE), asdict(embedded.RECIPE)]
    name = f"figures-{embedded.content_hash(decides, Path(__file__), Path(embedded.__file__))}"
    return embedded.cached(name, lambda folder: build(folder, RECIPE))


def build(root: Path, recipe: Recipe) -> None:
    """Write the whole set into a new folder."""
    photos = embedded.load_sources().photos
    for split in SPLITS:
        pictures = make_pictures(photos, split, recipe)
        _write(root, split, pictures)


def make_pictures(photos: Sequence[Pixels], split: Split, recipe: Recipe) -> list[Picture]:
    """Draw the images of a split; their ids go on from training to validation."""
    own = embedded.split_photos(photos, split, embedded.RECIPE)
    first, count = {
        "train": (1, recipe.train_images),
        "val": (1 + recipe.train_images, recipe.val_images),
    }[split]
    return [_draw_picture(own, i, recipe) for i in range(first, first + count)]


def _draw_picture(photos: Sequence[Pixels], image_id: int, recipe: Recipe) -> Picture:
    rng = np.random.default_rng([recipe.seed, *b"figures", image_id])
    canvas = embedded.draw_background(photos, recipe.side, rng, embedded.RECIPE)
    low, high = recipe.figures
    wanted = int(rng.integers(low, high + 1))
    figures: list[Figure] = []
    sizes: list[int] = []  # pixels of each figure before others covered it
    for _ in range(8 * wanted):
        points, head = draw_pose(rng, recipe)
        parts = _parts(points, head, recipe.side)
        mask = np.max([alpha for _, alpha in parts], axis=0) >= 0.5
        candidate = [*(_behind(figure, mask) for figure in figures), _alone(points, mask)]
        if _crowded(candidate, [*sizes, int(mask.sum())], recipe):
            continue
        figures, sizes = candidate, [*sizes, int(mask.sum())]
        for _, alpha in parts:
            if alpha.any():
                canvas = paint(canvas, alpha, rng, embedded.RECIPE)
        if len(figures) == wanted:
            break
    return Picture(image_id, (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8), tuple(figures))


def _alone(points: Points, mask: Mask) -> Figure:
    return Figure(points, mask, np.zeros(len(points), bool))


def _behind(figure: Figure, mask: Mask) -> Figure:
    """Return a figure as far as another, drawn later, leaves it visible."""
    height, width = mask.shape
    x, y = np.floor(figure.points).astype(int).T
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    hidden = inside & mask[y.clip(0, height - 1), x.clip(0, width - 1)]
    return replace(figure, mask=figure.mask & ~mask, covered=figure.covered | hidden)


def _crowded(figures: Sequence[Figure], sizes: Sequence[int], recipe: Recipe) -> bool:
    seen = zip(figures, sizes, strict=True)
    if any(size == 0 or f.mask.sum() < recipe.visible * size for f, size in seen):
        return True
    boxes = [figure.box for figure in figures]
    return any(
        box_iou(one, other) >= recipe.box_iou for i, one in enumerate(boxes) for other in boxes[:i]
    )


def draw_pose(rng: np.random.Generator, recipe: Recipe) -> tuple[Points, dict[str, Any]]:
    """Draw a pose, a size and a place.

    Returns:
        The keypoints (P, 2), and of the head: centre (2,), radii (2,), turn; with the figure's
        `scale`, px a unit, and `angle`, radians.
    """
    places: dict[str, tuple[float, float]] = {}
    turn = rng.uniform(-_TURN, _TURN)
    places["nose"] = (_NOSE[0] + 1.5 * turn, _NOSE[1])
    for sign, side in ((1, "left"), (-1, "right")):
        places |= {f"{side}_{part}": (sign * x, y) for part, (x, y) in _FIXED.items()}
        places[f"{side}_eye"] = (sign * _EYE[0] + turn, _EYE[1])
        outward = 0.0
        for joint, (parent, length, angles) in _LIMBS.items():
            bent = math.radians(rng.uniform(*angles))
            outward = bent if parent in _FIXED else outward + bent
            x, y = places[f"{side}_{parent}"]
            step = (sign * length * math.sin(outward), length * math.cos(outward))
            places[f"{side}_{joint}"] = (x + step[0], y + step[1])
    unit = np.array([places[name] for name in KEYPOINTS])
    scale, angle = rng.uniform(*recipe.height), math.radians(rng.uniform(-1, 1) * recipe.degrees)
    turned = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points = scale * unit @ turned.T
    head = scale * np.array(_HEAD) @ turned.T
    reach = scale * _HEAD_RADII[1]
    corners = np.concatenate([points, [head - reach, head + reach]])
    low, size = corners.min(axis=0), np.ptp(corners, axis=0)
    least, most = -recipe.outside * size, recipe.side - (1 - recipe.outside) * size
    shift = rng.uniform(least, np.maximum(least, most)) - low
    return points + shift, {"centre": head + shift, "scale": scale, "angle": angle}


def _parts(points: Points, head: dict[str, Any], side: int) -> list[tuple[str, Pixels]]:
    """Return the opacity of each part, (side, side), in the order of drawing.

    Legs, torso, arms, head with ears, face: each has an ink of its own.
    """
    at, scale = dict(zip(KEYPOINTS, points, strict=True)), head["scale"]
    legs, torso, arms, skull, face = (_Canvas(side) for _ in range(5))
    for one in ("left", "right"):
        legs.line([at[f"{one}_{j}"] for j in ("hip", "knee", "ankle")], scale * _WIDTHS["leg"])
        arms.line(
            [at[f"{one}_{j}"] for j in ("shoulder", "elbow", "wrist")], scale * _WIDTHS["arm"]
        )
        skull.dot(at[f"{one}_ear"], scale * _WIDTHS["ear"])
        face.dot(at[f"{one}_eye"], scale * _WIDTHS["face"])
    face.dot(at["nose"], scale * _WIDTHS["face"])
    corners = ("left_shoulder", "left_hip", "right_hip", "right_shoulder")
    torso.polygon([at[name] for name in corners], scale * _WIDTHS["leg"])
    neck = (at["left_shoulder"] + at["right_shoulder"]) / 2
    skull.line([neck, head["centre"]], scale * _WIDTHS["arm"])
    skull.ellipse(head["centre"], scale * np.array(_HEAD_RADII), head["angle"])
    canvases = {"legs": legs, "torso": torso, "arms": arms, "head": skull, "face": face}
    return [(name, canvas.alpha()) for name, canvas in canvases.items()]


class _Canvas:
    """An opacity drawn finely and then reduced; all lengths in pixels of the image."""

    def __init__(self, side: int) -> None:
        self._image = Image.new("L", (side * FINE, side * FINE))
        self._draw = ImageDraw.Draw(self._image)

    def dot(self, centre: NDArray[np.float64], width: float) -> None:
        (x, y), r = FINE * centre, FINE * width / 2
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=255)

    def line(self, points: Sequence[NDArray[np.float64]], width: float) -> None:
        path = [tuple(FINE * p) for p in points]
        self._draw.line(path, fill=255, width=round(FINE * width))
        for point in points:
            self.dot(point, width)

    def polygon(self, points: Sequence[NDArray[np.float64]], width: float) -> None:
        self._draw.polygon([tuple(FINE * p) for p in points], fill=255)
        self.line([*points, points[0]], width)

    def ellipse(
        self, centre: NDArray[np.float64], radii: NDArray[np.float64], angle: float
    ) -> None:
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        x, y = radii[0] * np.cos(t), radii[1] * np.sin(t)
        turned = np.stack(
            [x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)]
        )
        self._draw.polygon([tuple(FINE * (centre + p)) for p in turned.T], fill=255)

    def alpha(self) -> Pixels:
        return np.asarray(self._image.reduce(FINE), np.float32) / np.float32(255)


def _write(root: Path, split: Split, pictures: Sequence[Picture]) -> None:
    """Write `{split}2017/` and its annotations."""
    images, annotations = [], []
    folder = root / f"{split}2017"
    folder.mkdir(parents=True)
    for picture in pictures:
        name = f"{picture.image_id:012d}.jpg"
        Image.fromarray(picture.image).save(folder / name, quality=embedded.RECIPE.jpeg_quality)
        height, width = picture.image.shape[:2]
        images.append({"id": picture.image_id, "file_name": name, "height": height, "width": width})
        annotations += [
            _annotation(picture.image_id, place, figure)
            for place, figure in enumerate(picture.figures)
        ]
    category = {
        "id": 1,
        "name": CATEGORY,
        "supercategory": CATEGORY,
        "keypoints": list(KEYPOINTS),
        "skeleton": [[one + 1, other + 1] for one, other in SKELETON],
    }
    content = {
        "info": {"description": "MoCo Transfer's embedded figures", "version": "1.0"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [category],
    }
    (root / "annotations").mkdir(exist_ok=True)
    write_json(root / "annotations" / f"person_keypoints_{split}2017.json", content)


def _annotation(image_id: int, place: int, figure: Figure) -> dict[str, Any]:
    keypoints = figure.keypoints()
    return {
        "id": 100 * image_id + place,
        "image_id": image_id,
        "category_id": 1,
        "bbox": list(figure.box),
        "area": int(figure.mask.sum()),
        "segmentation": outline(figure.mask),
        "iscrowd": 0,
        "keypoints": keypoints,
        "num_keypoints": sum(word != UNLABELLED for word in keypoints[2::3]),
    }
