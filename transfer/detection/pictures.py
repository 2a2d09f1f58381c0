"""Pictures of a run: what a detector found beside what is there, and its curves."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import figure as drawing
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image, ImageOps

from convert.files import atomic_write

MOST = 20  # figures drawn in an image
BARS = 40  # classes drawn: the best and the worst of more
COLOURS = ("#ffd92f", "#4dd2ff", "#ff6f91", "#7cfc7c", "#ff9f40", "#c79cff")


@dataclass(frozen=True)
class Figure:
    """Objects of an image, true ones or found ones.

    Attributes:
        boxes: (N, 4) x0, y0, x1, y1 in pixels of the image.
        labels: (N,) what stands at each box.
        masks: (N, H, W) bool, or None.
        keypoints: (N, P, 3) x, y, and above 0 where it is to be drawn; or None.
    """

    boxes: NDArray[np.float64]
    labels: list[str]
    masks: NDArray[np.bool_] | None
    keypoints: NDArray[np.float64] | None


@dataclass(frozen=True)
class Shown:
    """An image, its truth and what was found in it.

    Attributes:
        title: why it is shown.
        file: the image.
        truth: what is there.
        found: what was found, the surest first.
    """

    title: str
    file: Path
    truth: Figure
    found: Figure


def draw_detections(path: Path, shown: Sequence[Shown], score: float) -> None:
    """Draw images in columns: the truth above, what was found below.

    Args:
        path: the PNG to write.
        shown: the images; none leave an empty picture.
        score: over which detections are shown, for the caption.
    """
    count = max(1, len(shown))
    canvas = drawing.Figure(figsize=(2.6 * count, 5.6), dpi=100, layout="constrained")
    grid = canvas.subplots(2, count, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for place, one in enumerate(shown):
        with Image.open(one.file) as image:
            picture = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        grid[0, place].set_title(f"{one.title}\n{one.file.name}", fontsize=7)
        _draw(grid[0, place], picture, one.truth)
        _draw(grid[1, place], picture, one.found)
    grid[0, 0].set_ylabel("ground truth")
    grid[1, 0].set_ylabel(f"detections, score over {score}")
    _save(canvas, path)


def draw_curves(
    path: Path,
    losses: Path,
    curves: Mapping[str, NDArray[np.float64]],
    per_class: Mapping[str, Mapping[str, float]],
) -> None:
    """Draw the losses of training, precision against recall, and each class's AP.

    Args:
        path: the PNG to write.
        losses: Detectron2's metrics.json, a JSON object a line; its panel is left out without it.
        curves: precision, 0..1, at evenly spaced recalls from 0 to 1, of each measure.
        per_class: measure -> class -> AP in percent; the first measure is drawn.
    """
    panels: list[tuple[Callable[..., None], Any]] = [
        (_draw_precision, curves),
        (_draw_classes, per_class),
    ]
    if losses.is_file():
        panels.insert(0, (_draw_losses, losses))
    canvas = drawing.Figure(figsize=(5.2 * len(panels), 4.6), dpi=100, layout="constrained")
    grid = canvas.subplots(1, len(panels), squeeze=False)[0]
    for axes, (draw, content) in zip(grid, panels, strict=True):
        draw(axes, content)
    _save(canvas, path)


def _save(canvas: drawing.Figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        canvas.savefig(temporary, format="png")


def _draw(axes: Axes, picture: NDArray[np.uint8], figure: Figure) -> None:
    canvas = picture.astype(float) / 255
    places = range(min(MOST, len(figure.boxes)))
    if figure.masks is not None:
        for place in places:
            mask = figure.masks[place]
            canvas[mask] = 0.55 * canvas[mask] + 0.45 * _ink(place)
    axes.imshow(canvas)
    axes.autoscale(enable=False)  # what lies beside the image does not widen the view
    for place in places:
        x0, y0, x1, y1 = figure.boxes[place]
        colour = COLOURS[place % len(COLOURS)]
        axes.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2)
        )
        axes.text(
            *(x0, y0, figure.labels[place]),
            fontsize=5,
            va="bottom",
            clip_on=True,
            bbox={"facecolor": colour, "pad": 0.5, "linewidth": 0, "alpha": 0.85},
        )
        if figure.keypoints is not None:
            seen = figure.keypoints[place][figure.keypoints[place][:, 2] > 0]
            axes.scatter(seen[:, 0], seen[:, 1], s=5, color=colour, edgecolor="black", lw=0.3)


def _ink(place: int) -> NDArray[np.float64]:
    colour = COLOURS[place % len(COLOURS)]
    return np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255


def _draw_losses(axes: Axes, file: Path) -> None:
    """Draw every loss that Detectron2 wrote, the sum in black."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    names = sorted({key for line in lines for key in line if "loss" in key})
    for name in names:
        points = [(line["iteration"], line[name]) for line in lines if name in line]
        style = {"color": "black", "linewidth": 1.6} if name == "total_loss" else {"linewidth": 1}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(title="training losses", xlabel="iteration", yscale="log")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _draw_precision(axes: Axes, curves: Mapping[str, NDArray[np.float64]]) -> None:
    for name, precision in curves.items():
        axes.plot(np.linspace(0, 1, len(precision)), precision, label=name)
    axes.set(title="precision, mean over classes", xlabel="recall", ylabel="precision")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _draw_classes(axes: Axes, per_class: Mapping[str, Mapping[str, float]]) -> None:
    measure, values = next(iter(per_class.items()))
    ranked = sorted(values.items(), key=lambda item: item[1])
    title = f"{measure} of each class"
    if len(ranked) > BARS:
        ranked = ranked[: BARS // 2] + ranked[-BARS // 2 :]
        title += f": the {BARS // 2} worst and best of {len(values)}"
    names, heights = [name for name, _ in ranked], [value for _, value in ranked]
    axes.barh(names, heights, color="#4d8bbd")
    axes.tick_params(axis="y", labelsize=max(4, 8 - len(names) // 10))
    axes.set(title=title, xlabel="AP, percent", xlim=(0, 100))
