"""Many linear classifiers in one pass, and an honest choice among them.

A grid of learning rates, weight decays and features is trained twice at once, on the same forward
pass: on the training images without a held-out share, to choose, and on all of them, to be judged
if chosen. So the chosen classifier is refitted on all training images when the choice falls, and
the test set is looked at once.

Legend: B: images of a batch; D: width of a feature; C: classes; H: classifiers on one feature.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from convert.errors import UserError
from convert.files import atomic_write, write_text
from transfer.classification.features import Features
from transfer.classification.heads import Batch, LinearConfig, initial_weight

FILE_NAME = "grid.json"
PLOT_NAME = "grid.png"
SCORED_AT_ONCE = 1024


@dataclass(frozen=True)
class Cell:
    """One classifier of the grid: its feature and how it learns."""

    source: str
    lr: float
    weight_decay: float

    def __str__(self) -> str:
        return f"{self.source}, lr {self.lr:g}, weight decay {self.weight_decay:g}"


@dataclass(frozen=True)
class Outcome:
    """A classifier and how it did on the held-out images.

    Attributes:
        cell: the classifier. top1: in percent. loss: mean cross-entropy; infinite if it diverged.
    """

    cell: Cell
    top1: float
    loss: float

    def as_dict(self) -> dict[str, Any]:
        """Return what the record of the grid says; JSON has no infinity."""
        loss = self.loss if math.isfinite(self.loss) else None
        return asdict(self.cell) | {"held_out_top1": self.top1, "held_out_loss": loss}


class Stack:
    """H classifiers on the same feature, trained as one matrix by SGD with momentum.

    Equal to H optimizers of `torch.optim.SGD`, to rounding.

    Args:
        cells: their learning rates and weight decays.
        width: D. num_classes: C.
        momentum: of all.
        seed: of the initial weights, which are the same for all.
        device: where they are.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        width: int,
        num_classes: int,
        momentum: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.cells, self.momentum = list(cells), momentum
        self.shape = (len(self.cells), num_classes, width)
        first = initial_weight(width, num_classes, seed)
        self.weight = first.repeat(len(self.cells), 1).to(device)  # (H C, D)
        self.bias = torch.zeros(len(self.weight), device=device)
        self.velocity = torch.zeros_like(self.weight)
        self.bias_velocity = torch.zeros_like(self.bias)
        self.lr = torch.tensor([cell.lr for cell in self.cells], device=device)
        self.decay = torch.tensor([cell.weight_decay for cell in self.cells], device=device)

    def step(self, x: Tensor, labels: Tensor, lr_factor: float) -> None:
        """Take one step of all on features (B, D) and classes (B,)."""
        heads, classes, _ = self.shape
        error = torch.addmm(self.bias, x, self.weight.T).view(len(x), heads, classes)
        error = error.softmax(dim=2)
        place = labels[:, None, None].expand(-1, heads, 1)
        error.scatter_add_(2, place, error.new_full((1, 1, 1), -1.0).expand(place.shape))
        error = error.div_(len(x)).view(len(x), -1)  # of the mean cross-entropy, by the logits
        self.velocity.addmm_(error.T, x, beta=self.momentum)
        self.bias_velocity.mul_(self.momentum).add_(error.sum(dim=0))
        step = -lr_factor * self.lr[:, None]
        for parameter, velocity in (
            (self.weight.view(heads, -1), self.velocity.view(heads, -1)),
            (self.bias.view(heads, -1), self.bias_velocity.view(heads, -1)),
        ):
            if any(cell.weight_decay for cell in self.cells):
                velocity.addcmul_(parameter, self.decay[:, None])
            parameter.addcmul_(velocity, step)

    def outcomes(self, features: Features) -> list[Outcome]:
        """Score every classifier on held-out features."""
        heads, classes, _ = self.shape
        right = torch.zeros(heads, dtype=torch.int64)
        loss = torch.zeros(heads, dtype=torch.float64)
        count = len(features.labels)
        for first in range(0, count, SCORED_AT_ONCE):
            part = features.take(torch.arange(first, min(first + SCORED_AT_ONCE, count)))
            values, labels = part.values.to(self.weight.device), part.labels.to(self.weight.device)
            logits = torch.addmm(self.bias, values, self.weight.T).view(-1, heads, classes)
            right += (logits.argmax(dim=2) == labels[:, None]).sum(dim=0).cpu()
            each = labels[:, None].expand(-1, heads)
            losses = cross_entropy(logits.transpose(1, 2), each, reduction="none")
            loss += losses.double().sum(dim=0).cpu()
        found = zip(self.cells, right.tolist(), (loss / count).tolist(), strict=True)
        return [
            Outcome(cell, 100 * hits / count, mean)
            if math.isfinite(mean)
            else Outcome(cell, 0.0, math.inf)
            for cell, hits, mean in found
        ]

    def classifier(self, cell: Cell) -> nn.Linear:
        """Return one of them."""
        heads, classes, width = self.shape
        place = self.cells.index(cell)
        fc = nn.Linear(width, classes, device=self.weight.device)
        fc.weight.data.copy_(self.weight.view(heads, classes, width)[place])
        fc.bias.data.copy_(self.bias.view(heads, classes)[place])
        return fc

    def state(self) -> dict[str, Tensor]:
        """Return what moves, uncopied."""
        names = ("weight", "bias", "velocity", "bias_velocity")
        return {name: getattr(self, name) for name in names}


class Grid:
    """All classifiers of a config's grid, each in two copies: for choosing, and for judging.

    Args:
        config: the grid, momentum.
        widths: source -> D.
        num_classes: C.
        seed: of the initial weights.
        device: where they are.
        images: in the training set, N.
        held: (n,) places of the held-out ones.
    """

    def __init__(
        self,
        config: LinearConfig,
        widths: Mapping[str, int],
        num_classes: int,
        seed: int,
        device: torch.device,
        images: int,
        held: Tensor,
    ) -> None:
        self.device = device
        self.learns = torch.ones(images, dtype=torch.bool)
        self.learns[held] = False

        def stacks() -> dict[str, Stack]:
            return {
                source: Stack(
                    cells_of(config, source), width, num_classes, config.momentum, seed, device
                )
                for source, width in widths.items()
            }

        self.choosing, self.judged = stacks(), stacks()

    def __len__(self) -> int:
        return sum(len(stack.cells) for stack in self.judged.values())

    @property
    def size(self) -> int:
        """How many weights there are in it."""
        stacks = (*self.choosing.values(), *self.judged.values())
        return sum(stack.weight.numel() for stack in stacks)

    @torch.no_grad()
    def step(self, batch: Batch, lr_factor: float) -> None:
        """Let every classifier learn from a batch; of the copies for choosing, from its share."""
        learns = self.learns[batch.places].nonzero().flatten().to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device)
        for source, stack in self.judged.items():
            x = batch.beside[source].to(self.device)
            stack.step(x, labels, lr_factor)
            if len(learns):
                self.choosing[source].step(x[learns], labels[learns], lr_factor)

    @torch.no_grad()
    def ranking(self, held: Mapping[str, Features]) -> list[Outcome]:
        """Rank all by their top-1 on held-out features, then by their loss; the best one first.

        Raises:
            UserError: all diverged.
        """
        found = [o for s, stack in self.choosing.items() for o in stack.outcomes(held[s])]
        ranked = sorted(found, key=lambda outcome: (-outcome.top1, outcome.loss))
        if not math.isfinite(ranked[0].loss):
            raise UserError(
                "grid: every classifier diverged; name smaller rates, as grid_lr 0.001,0.01,0.1"
            )
        return ranked

    def classifier(self, cell: Cell) -> nn.Linear:
        """Return a cell's classifier, fitted on all training images."""
        return self.judged[cell.source].classifier(cell)

    def snapshot(self) -> dict[str, Any]:
        """Copy everything that going on needs."""
        return {
            kind: {
                source: {k: v.cpu().clone() for k, v in stack.state().items()}
                for source, stack in stacks.items()
            }
            for kind, stacks in (("choosing", self.choosing), ("judged", self.judged))
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from a snapshot of the same grid."""
        for kind, stacks in (("choosing", self.choosing), ("judged", self.judged)):
            for source, stack in stacks.items():
                for name, tensor in stack.state().items():
                    tensor.copy_(saved[kind][source][name])


def cells_of(config: LinearConfig, source: str) -> list[Cell]:
    """Return the grid's classifiers on one feature."""
    return [Cell(source, lr, decay) for decay in config.grid_weight_decay for lr in config.grid_lr]


def edge_note(chosen: Cell, config: LinearConfig) -> str | None:
    """Say it when the choice fell on the grid's edge: a better one may lie beyond it."""
    rates = sorted(config.grid_lr)
    if len(rates) < 2 or chosen.lr not in (rates[0], rates[-1]):
        return None
    end, beyond = ("smallest", "smaller") if chosen.lr == rates[0] else ("largest", "larger")
    return (
        f"note: the chosen lr {chosen.lr:g} is the grid's {end}, and a {beyond} one may be better: "
        "widen grid_lr"
    )


def write_grid(folder: Path, ranking: Sequence[Outcome], held: int, reference: Cell) -> None:
    """Write the outcomes as JSON and as a plot.

    Args:
        folder: where.
        ranking: all, the best one first.
        held: held-out images.
        reference: the fixed protocol's settings, marked in the plot.
    """
    content = {
        "chosen": ranking[0].as_dict(),
        "held_out_images": held,
        "outcomes": [outcome.as_dict() for outcome in ranking],
    }
    write_text(folder / FILE_NAME, json.dumps(content, indent=1) + "\n")
    draw_sensitivity(folder / PLOT_NAME, ranking, reference)


def draw_sensitivity(path: Path, ranking: Sequence[Outcome], reference: Cell) -> None:
    """Draw held-out accuracy over the learning rate, a line for each feature and weight decay."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for name, line in curves(ranking).items():
        axis.plot(*zip(*line, strict=True), marker="o", markersize=3, linewidth=1, label=name)
    best = ranking[0]
    axis.plot([best.cell.lr], [best.top1], "*", color="black", markersize=10, label="chosen")
    axis.axvline(reference.lr, color="grey", linestyle=":", linewidth=1)
    axis.annotate(
        f"fixed protocol: {reference}",
        (reference.lr, 0.02),
        xycoords=("data", "axes fraction"),
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=7,
        color="grey",
    )
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("top-1 on held-out training images, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


def curves(ranking: Iterable[Outcome]) -> dict[str, list[tuple[float, float]]]:
    """Return each line of the plot: (lr, top-1) by rising learning rate."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for outcome in sorted(ranking, key=lambda o: (o.cell.source, o.cell.weight_decay, o.cell.lr)):
        name = f"{outcome.cell.source}, weight decay {outcome.cell.weight_decay:g}"
        lines.setdefault(name, []).append((outcome.cell.lr, outcome.top1))
    return lines
