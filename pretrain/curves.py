"""A run's curves, from its log alone: one picture and one page that needs nothing beside it."""

import base64
import html
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import UserError
from convert.files import atomic_write, write_text
from pretrain.monitor import LOG_NAME, read_log

PNG_NAME, HTML_NAME = "report.png", "report.html"
# Okabe and Ito's, which colour-blind readers can tell apart; lines differ in style too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
SPAN_COLOURS = ("#F0E442", "#CC79A7", "#56B4E9", "#E69F00", "#009E73", "#999999")
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Curve:
    """A line of a panel: a logged value, how it is drawn, its name in the legend."""

    key: str
    name: str
    colour: str = BLUE
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """A set of axes.

    Attributes:
        title, unit: what is drawn, in what.
        curves: on the left axis.
        right: on an axis of its own, with its name as the unit.
        from_zero: whether the left axis begins at 0.
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    right: Curve | None = None
    from_zero: bool = False


LEAK = (
    Curve("leak_same", "key encoded in the query's group", GREY, ":"),
    Curve("leak_shuffled", "as this run encodes it", ORANGE, "--"),
    Curve("leak_apart", "among any images"),
)
PANELS = (
    Panel(
        "Contrastive loss",
        "nats",
        (Curve("loss", "loss"), Curve("chance_loss", "chance, log(K + 1)", ORANGE, "--")),
    ),
    Panel(
        "Pretext accuracy: queries that find their key",
        "percent",
        (
            Curve("top1", "among K negatives"),
            Curve("batch_top1", "among the batch's keys", ORANGE, "--"),
        ),
    ),
    Panel("kNN vote on backbone features", "top-1, percent", (Curve("knn_top1", "kNN"),)),
    Panel(
        "Leak meter: queries that find their key",
        "percent",
        LEAK,
    ),
    Panel(
        "Spread of embeddings",
        "alignment; uniformity",
        (
            Curve("alignment", "alignment (0: positives are one)"),
            Curve("uniformity", "uniformity (0: all are one)", ORANGE, "--"),
        ),
        Curve("effective_rank", "effective rank", GREEN, ":"),
    ),
    Panel("Age of the oldest key", "steps", (Curve("queue_age_steps", "age"),), from_zero=True),
    Panel(
        "Learning rate and gradient",
        "learning rate",
        (Curve("lr", "learning rate"),),
        Curve("gradient_norm", "gradient norm", ORANGE, "--"),
    ),
    Panel(
        "Throughput",
        "images/s",
        (Curve("images_per_s", "images/s"),),
        Curve("data_wait", "wait for images, percent", ORANGE, "--"),
        from_zero=True,
    ),
)
SMOOTH = ("loss", "top1", "batch_top1", "gradient_norm", "images_per_s", "data_wait")


@dataclass(frozen=True)
class Span:
    """A verdict and where it held, in epochs; `until` is the run's last epoch if it still does."""

    name: str
    since: float
    until: float


def report(folder: Path) -> list[Path]:
    """Draw a run's curves again.

    Args:
        folder: the run's output.

    Returns:
        The picture and the page, in the folder.

    Raises:
        UserError: the folder holds no log, or one without a line.
    """
    lines = read_log(folder)
    if not lines:
        raise UserError(
            f"--report {folder}: found no line of a {LOG_NAME}; name the output folder of a run"
        )
    picture = draw(lines, folder.absolute().name)
    with atomic_write(folder / PNG_NAME) as temporary:
        temporary.write_bytes(picture)
    write_text(folder / HTML_NAME, page(folder, lines, picture))
    return [folder / PNG_NAME, folder / HTML_NAME]


def draw(lines: Lines, title: str) -> bytes:
    """Draw every panel that a log has values for, against the epoch; return a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(points(lines, c.key)[0] for c in panel.curves)]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(12, 3.1 * rows + 0.5), layout="constrained")
    figure.suptitle(f"{title}: is it learning?", x=0.01, ha="left", weight="bold")
    spans = held(lines)
    for index, panel in enumerate(panels):
        axis = figure.add_subplot(rows, 2, index + 1)
        _shade(axis, spans, named=index == 0)
        _fill(axis, panel, lines)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def points(lines: Lines, key: str) -> tuple[list[float], list[float]]:
    """Return the epochs and values of a logged number."""
    found = [line for line in lines if key in line]
    return [float(line.get("epoch", 0.0)) for line in found], [float(line[key]) for line in found]


def held(lines: Lines) -> list[Span]:
    """Return where each verdict held, by the lines that said so."""
    spans: list[Span] = []
    begun: dict[str, float] = {}
    for line in lines:
        for words in line.get("verdicts", []):
            name, _, rest = words.partition(": ")
            if not rest.startswith("over after"):
                begun[name] = line.get("epoch", 0.0)
            elif name in begun:
                spans.append(Span(name, begun.pop(name), line.get("epoch", 0.0)))
    last = lines[-1].get("epoch", 0.0)
    return [*spans, *(Span(name, since, last) for name, since in begun.items())]


def page(folder: Path, lines: Lines, picture: bytes) -> str:
    """Write the page: what the run is, its verdicts, its curves, its numbers."""
    title = html.escape(f"{folder.absolute().name}: is it learning?")
    image = base64.b64encode(picture).decode()
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{html.escape(_settings(folder, lines))}</p>",
        "<h2>Verdicts</h2>",
        _verdicts(lines),
        "<h2>Curves</h2>",
        f'<img alt="the curves of the run" src="data:image/png;base64,{image}">',
        "<h2>Numbers</h2>",
        _numbers(lines),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;"
    "color:#222}img{max-width:100%}table{border-collapse:collapse}td,th{padding:.2rem .9rem;"
    "border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}"
    "li{margin:.3rem 0}h2{margin-top:2rem}"
)


def _fill(axis: Any, panel: Panel, lines: Lines) -> None:
    axis.set_title(panel.title, loc="left", fontsize=11)
    axis.set_xlabel("epoch")
    axis.set_ylabel(panel.unit)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    handles = [_plot(axis, curve, lines) for curve in panel.curves]
    if panel.right and points(lines, panel.right.key)[0]:
        other = axis.twinx()
        other.spines[["top"]].set_visible(False)
        other.set_ylabel(panel.right.name, color=panel.right.colour)
        handles.append(_plot(other, panel.right, lines))
        _room(other, lines, panel.right)
    if panel.from_zero:
        _room(axis, lines, panel.curves[0])
    axis.set_xlim(_ends(lines))
    if len(handles) > 1:
        axis.legend(handles=handles, frameon=False, fontsize=8, loc="best")


def _plot(axis: Any, curve: Curve, lines: Lines) -> Any:
    x, y = points(lines, curve.key)
    marker = "o" if len(x) <= 60 and curve.key not in SMOOTH else None
    drawn = {"color": curve.colour, "linestyle": curve.style, "label": curve.name}
    if curve.key in SMOOTH and len(x) > 20:
        axis.plot(x, y, color=curve.colour, linewidth=0.6, alpha=0.35)
        y = smooth(y)
    return axis.plot(x, y, marker=marker, markersize=3.5, **drawn)[0]


def _ends(lines: Lines) -> tuple[float, float]:
    """Return the first and the last epoch of a log, a little apart where they are one."""
    epochs = [float(line.get("epoch", 0.0)) for line in lines]
    margin = 0.02 * (max(epochs) - min(epochs)) or 0.01
    return min(epochs) - margin, max(epochs) + margin


def _room(axis: Any, lines: Lines, curve: Curve) -> None:
    """Let an axis begin at 0; a curve that is always 0 needs a top too."""
    highest = max(points(lines, curve.key)[1])
    axis.set_ylim(0, 1.1 * highest if highest > 0 else 1)


def smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Return a centred moving mean over a share of the values."""
    half = max(1, int(len(values) * share / 2))
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        means.append(sum(window) / len(window))
    return means


def _shade(axis: Any, spans: list[Span], *, named: bool) -> None:
    names = list(dict.fromkeys(span.name for span in spans))
    for span in spans:
        place = names.index(span.name)
        colour = SPAN_COLOURS[place % len(SPAN_COLOURS)]
        axis.axvspan(span.since, span.until, color=colour, alpha=0.18, linewidth=0)
        axis.axvline(span.since, color=colour, linewidth=1.2)
        if named:
            text = {"xycoords": ("data", "axes fraction"), "fontsize": 8, "va": "top"}
            axis.annotate(f" {span.name}", (span.since, 0.99 - 0.08 * place), **text)


def _settings(folder: Path, lines: Lines) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    keys = ("data", "dictionary", "arch", "K", "m", "tau", "batch_size", "bn_groups", "lr", "seed")
    known = [f"{key} {config[key]}" for key in keys if key in config]
    last = lines[-1]
    place = f"step {last['step']}" + (f", epoch {last['epoch']:.2f}" if "epoch" in last else "")
    return ", ".join([*known, f"logged until {place}"])


def _verdicts(lines: Lines) -> str:
    rows = [
        f"<li>epoch {line.get('epoch', 0):.2f}, step {line['step']}: {html.escape(words)}</li>"
        for line in lines
        for words in line.get("verdicts", [])
    ]
    if not rows:
        return "<p>None: nothing that the log shows is wrong.</p>"
    still = {span.name for span in held(lines) if span.until == lines[-1].get("epoch", 0.0)}
    holds = html.escape(", ".join(sorted(still)) or "none")
    return f"<ul>{''.join(rows)}</ul><p>Holding at the end of the log: {holds}.</p>"


def _numbers(lines: Lines) -> str:
    rows = "".join(_number_rows(lines))
    head = "<tr><th></th><th>first</th><th>lowest</th><th>highest</th><th>last</th></tr>"
    return f"<table>{head}{rows}</table>"


def _number_rows(lines: Lines) -> Iterator[str]:
    for panel in PANELS:
        for curve in [*panel.curves, *([panel.right] if panel.right else [])]:
            _, y = points(lines, curve.key)
            if y:
                cells = "".join(f"<td>{value:.4g}</td>" for value in (y[0], min(y), max(y), y[-1]))
                yield f"<tr><td>{html.escape(f'{panel.title}: {curve.name}')}</td>{cells}</tr>"
