"""Pictures of what a detector found, beside what is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from numpy.typing import NDArray
from PIL import Image, ImageOps

from convert.files import atomic_write

SCORE = 0.5  # what is drawn of the detections
MOST = 20  # boxes drawn in an image
COLOURS = ("#ffd92f", "#4dd2ff", "#ff6f91", "#7cfc7c", "#ff9f40", "#c79cff")


@dataclass(frozen=True)
class Shown:
    """An image, its truth and what was found in it.

    Attributes:
        file: the image.
        true_boxes: (T, 4) x0, y0, x1, y1 in pixels of the image.
        true_outlines: for each object its polygons, flat x, y lists; empty where there are none.
        boxes: (D, 4) as `true_boxes`.
        scores: (D,) 0..1.
        masks: (D, H, W) bool, or None for a detector without masks.
    """

    file: Path
    true_boxes: NDArray[np.float64]
    true_outlines: list[list[list[float]]]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    masks: NDArray[np.bool_] | None


def draw_detections(path: Path, shown: Sequence[Shown]) -> None:
    """Draw images in columns: the truth above, what was found below.

    Args:
        path: the PNG to write.
        shown: the images.
    """
    count = len(shown)
    figure = Figure(figsize=(2.6 * count, 5.6), dpi=100, layout="constrained")
    grid = figure.subplots(2, count, squeeze=False)
    for place, one in enumerate(shown):
        picture = np.asarray(ImageOps.exif_transpose(Image.open(one.file)).convert("RGB"))
        _draw_truth(grid[0, place], picture, one)
        _draw_found(grid[1, place], picture, one)
    grid[0, 0].set_ylabel("ground truth")
    grid[1, 0].set_ylabel(f"detections, score over {SCORE}")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_truth(axes: Axes, picture: NDArray[np.uint8], one: Shown) -> None:
    _blank(axes, picture)
    axes.set_title(one.file.name, fontsize=7)
    for place, outlines in enumerate(one.true_outlines):
        for outline in outlines:
            corners = np.reshape(outline, (-1, 2))
            axes.add_patch(Polygon(corners, color=_colour(place), alpha=0.45, linewidth=0))
    for place, box in enumerate(one.true_boxes):
        _box(axes, box, _colour(place))


def _draw_found(axes: Axes, picture: NDArray[np.uint8], one: Shown) -> None:
    order = [i for i in np.argsort(-one.scores) if one.scores[i] >= SCORE][:MOST]
    canvas = picture.astype(float) / 255
    for place, i in enumerate(order):
        if one.masks is not None:
            ink = np.array([int(_colour(place)[k : k + 2], 16) for k in (1, 3, 5)]) / 255
            canvas[one.masks[i]] = 0.55 * canvas[one.masks[i]] + 0.45 * ink
    _blank(axes, canvas)
    for place, i in enumerate(order):
        _box(axes, one.boxes[i], _colour(place))
        x, y = one.boxes[i, :2]
        axes.text(x, y, f"{one.scores[i]:.2f}", fontsize=6, color="black", va="bottom",
                  bbox={"facecolor": _colour(place), "pad": 0.6, "linewidth": 0})  # fmt: skip


def _blank(axes: Axes, picture: NDArray[Any]) -> None:
    axes.imshow(picture)
    axes.set_xticks([])
    axes.set_yticks([])


def _box(axes: Axes, box: NDArray[np.float64], colour: str) -> None:
    x0, y0, x1, y1 = box
    patch = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2)
    axes.add_patch(patch)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
