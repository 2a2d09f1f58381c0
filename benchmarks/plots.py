"""The figures of the page, as SVG: drawn without a display, readable without colour.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; lines differ in style too.
"""

import io
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.findings import LEARNED, Curve, Pretraining
from benchmarks.records import RANDOM

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
GREEN, PURPLE = "#009E73", "#AA4499"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
OTHERS = (PURPLE, "#56B4E9", "#E69F00", GREY)  # of rows that have no colour of their own
STYLES = {
    "moco": (BLUE, "-", "MoCo"),
    "random": (ORANGE, "--", "random init"),
    "supervised": (GREEN, "-.", "supervised"),
}
MANY = 40  # classes that a figure of bars takes
MARKERS = "os^Dv*"
LINES = 12  # that one figure takes
ABREAST = 2  # panels: beyond that their letters are too small on a page


def pretraining_figure(found: Pretraining) -> str | None:
    """Draw loss against step with the chance line, and kNN top-1 against epoch; None if empty."""
    if not found.loss and not found.knn:
        return None
    figure, axes = _figure(1 + bool(found.knn and found.loss))
    if found.loss:
        _loss_axes(axes[0], found)
    if found.knn:
        axis = axes[-1]
        axis.plot(*_xy(found.knn), color=BLUE, marker="o", markersize=4)
        axis.set_xlabel("epoch")
        axis.set_ylabel("kNN top-1, percent")
        axis.set_title("kNN vote on frozen features while pretraining", loc="left")
    return _svg(figure)


def detector_figure(tasks: Mapping[str, Mapping[str, list[Curve]]]) -> str | None:
    """Draw the detectors' total loss, one panel a task, what they start from beside each other.

    Args:
        tasks: title -> INIT -> a curve each trial.
    """
    drawn = {title: inits for title, inits in tasks.items() if any(map(any, inits.values()))}
    if not drawn:
        return None
    figure, axes = _figure(len(drawn))
    for axis, (title, inits) in zip(axes, drawn.items(), strict=True):
        others = iter(OTHERS * len(inits))
        for init, curves in inits.items():
            colour, style, label = STYLES.get(init) or (next(others), ":", init)
            for place, curve in enumerate(filter(None, curves)):
                named = {} if place else {"label": label}
                axis.plot(*_xy(curve), color=colour, linewidth=0.7, alpha=0.35)
                axis.plot(*_xy(smooth(curve)), color=colour, linestyle=style, **named)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("iteration")
        axis.set_ylabel("total training loss")
        axis.set_title(title, loc="left", fontsize=10)
        axis.legend(frameon=False)
    return _svg(figure)


def curve_figure(curves: Mapping[str, Curve], x: str, y: str, *, ticks: bool) -> str | None:
    """Draw curves over a logarithmic axis; of many the first; None if there is none.

    Args:
        curves: label -> points.
        x: what stands under the axis.
        y: what stands beside it.
        ticks: whether every x is written at the axis, or powers of ten.
    """
    if not curves:
        return None
    figure, (axis,) = _figure(1)
    figure.set_size_inches(7.2, 4.0)
    for place, (label, curve) in enumerate(list(curves.items())[:LINES]):
        shown = label if len(label) <= 48 else f"{label[:47]}…"
        marker, colour = MARKERS[place % len(MARKERS)], COLOURS[place % len(COLOURS)]
        axis.plot(*_xy(curve), color=colour, marker=marker, markersize=4, label=_literal(shown))
    axis.set_xscale("log")
    if ticks:
        places = sorted({point for curve in curves.values() for point, _ in curve})
        axis.set_xticks(places, [f"{point:g}" for point in places])
        axis.minorticks_off()
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend(frameon=False, fontsize=8)
    return _svg(figure)


def class_figure(rows: Mapping[str, Mapping[str, float]], measure: str) -> str | None:
    """Draw a number of each class, a bar a row; of many classes the best and the worst.

    Args:
        rows: checkpoint -> class -> percent; the first row decides the order.
        measure: what the numbers are, `AP50`.
    """
    first = next(iter(rows.values()), {})
    names = sorted(first, key=lambda name: -first[name])
    if not names:
        return None
    if len(names) > MANY:
        names = [*names[: MANY // 2], *names[-MANY // 2 :]]
    figure, axes = _figure(1)
    figure.set_size_inches(max(5.4, 0.32 * len(names) + 1.5), 3.8)
    width = 0.8 / len(rows)
    others = iter((BLUE, GREEN, PURPLE, GREY) * len(rows))
    for place, (label, values) in enumerate(rows.items()):
        at = [index + (place - (len(rows) - 1) / 2) * width for index in range(len(names))]
        heights = [values.get(name, 0.0) for name in names]
        colour = ORANGE if label == RANDOM else next(others)
        axes[0].bar(at, heights, width, color=colour, label=_literal(label))
    ticks = [_literal(name if len(name) <= 18 else f"{name[:17]}…") for name in names]
    axes[0].set_xticks(range(len(names)), ticks, rotation=60, ha="right", fontsize=8)
    axes[0].set_ylabel(f"{measure}, percent")
    axes[0].legend(frameon=False)
    return _svg(figure)


def smooth(curve: Curve, share: float = 0.05) -> Curve:
    """Return a centred moving mean over a share of the curve; short curves stay as they are."""
    half = int(len(curve) * share / 2)
    smoothed = []
    for index, (x, _) in enumerate(curve):
        reach = min(half, index, len(curve) - 1 - index)
        window = curve[index - reach : index + reach + 1]
        smoothed.append((x, sum(y for _, y in window) / len(window)))
    return smoothed


def _loss_axes(axis: Any, found: Pretraining) -> None:
    axis.plot(*_xy(found.loss), color=BLUE, linewidth=0.7, alpha=0.4)
    axis.plot(*_xy(smooth(found.loss)), color=BLUE)
    if found.chance is not None:
        goal = found.chance * (1 - LEARNED / 100)
        marks = [
            (found.chance, ORANGE, "--", f"chance, log(K+1) = {found.chance:.2f}"),
            (goal, GREY, ":", f"{LEARNED:g}% under chance = {goal:.2f}"),
        ]
        for y, colour, style, text in marks:
            axis.axhline(y, color=colour, linestyle=style)
            place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "right"}
            axis.annotate(text, (1.0, y), xycoords=("axes fraction", "data"), color=colour, **place)
        axis.set_ylim(top=1.08 * max(found.chance, max(y for _, y in found.loss)))
    axis.set_xlabel("step")
    axis.set_ylabel("contrastive loss, nats")
    axis.set_title("Contrastive loss, Eq. (1); thick: moving mean", loc="left")


def _figure(panels: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    columns = min(panels, ABREAST)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.4 * columns, 3.5 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    axes = axes[:panels]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _literal(text: str) -> str:
    """Keep a name's dollar signs from being read as mathematics."""
    return text.replace("$", r"\$")


def _svg(figure: Any) -> str:
    """Render a figure; equal curves give equal bytes."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "moco-transfer"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _xy(curve: Curve) -> Iterable[list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]
