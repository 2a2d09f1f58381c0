"""Test sets whose images have shifted away from the training set's: the same classifier is scored.

Layouts: one folder a class as in ImageNet-R, -A, -Sketch (a subset of the training set's classes),
folders of class numbers as in ImageNet-V2, and CORRUPTION/SEVERITY/CLASS as in ImageNet-C.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convert.errors import UserError
from pretrain.sources import ImageList, image_folder
from transfer.classification.features import Features
from transfer.classification.heads import score

SEVERITIES = ("1", "2", "3", "4", "5")  # of ImageNet-C
DEEPEST = 2  # folders above a corruption's: ImageNet-C's archives have groups such as blur/


@dataclass(frozen=True)
class Shifted:
    """A shifted test set, or one corruption of it at one severity.

    Attributes:
        name: in the metrics: the folder's name in lower letters.
        images: labelled by their place in `columns`.
        columns: (c,) the classes that it has, as places among the training set's; only these
            compete, as in ImageNet-R's and -A's protocol.
        corruption: its name; None where the set has none.
    """

    name: str
    images: ImageList
    columns: tuple[int, ...]
    corruption: str | None = None

    @property
    def ready(self) -> bool:
        """Whether images have been cut to the network's size already, as ImageNet-C's."""
        return self.corruption is not None


def open_shifted(folders: Sequence[Path], classes: Sequence[str]) -> list[Shifted]:
    """List the images of shifted test sets.

    Args:
        folders: one a set.
        classes: the training set's, in order.

    Raises:
        UserError: a folder is missing, or has class folders that the training set has not.
    """
    names = [_name(folder) for folder in folders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--also-test: two folders are called {twice}; their numbers would be too")
    return [part for folder in folders for part in _open(Path(folder), classes)]


def _name(folder: Path) -> str:
    return Path(folder).resolve().name.lower()


def _open(folder: Path, classes: Sequence[str]) -> Iterator[Shifted]:
    if not folder.is_dir():
        raise UserError(f"--also-test {folder}: no such folder")
    corruptions = [] if _columns(_folders(folder), classes) else [*_corruptions(folder, 0)]
    if not corruptions:
        yield _labelled(folder, classes, _name(folder))
    for corruption in corruptions:
        for severity in _folders(corruption):
            part = _labelled(corruption / severity, classes, _name(folder))
            yield replace(part, corruption=corruption.name)


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _corruptions(folder: Path, depth: int) -> Iterator[Path]:
    for name in _folders(folder):
        below = _folders(folder / name)
        if below and set(below) <= set(SEVERITIES):
            yield folder / name
        elif depth < DEEPEST:
            yield from _corruptions(folder / name, depth + 1)


def _columns(names: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Return the training set's place of each class folder, if it has them all."""
    places = {name: i for i, name in enumerate(classes)}
    if names and all(name in places for name in names):
        return [places[name] for name in names]
    if names and all(name.isdecimal() and int(name) < len(classes) for name in names):
        return [int(name) for name in names]  # ImageNet-V2's folders are places
    return None


def _labelled(folder: Path, classes: Sequence[str], name: str) -> Shifted:
    images = image_folder(folder)
    columns = _columns(images.classes, classes)
    if columns is None:
        unknown = [c for c in images.classes if c not in classes]
        raise UserError(
            f"--also-test {folder}: {len(unknown)} of its {len(images.classes)} class folders are "
            f"none of the training set's, first '{unknown[0]}'; want the same names, numbers below "
            f"{len(classes)}, or CORRUPTION/SEVERITY/CLASS"
        )
    return Shifted(name, images, tuple(columns))


def shifted_metrics(
    task: str, fc: nn.Linear, found: Sequence[tuple[Shifted, Features]]
) -> dict[str, float]:
    """Score a classifier on shifted sets: {"linear/imagenet-r/top1": 31.2, ...}.

    A set of corruptions has the mean over them of the mean over their severities, and each one's.
    """
    scores: dict[str, dict[str | None, list[tuple[float, float]]]] = {}
    for part, features in found:
        of_set = scores.setdefault(part.name, {})
        of_set.setdefault(part.corruption, []).append(score(restricted(fc, part.columns), features))
    metrics: dict[str, float] = {}
    for name, by_corruption in scores.items():
        means = {
            c: [statistics.fmean(k) for k in zip(*s, strict=True)] for c, s in by_corruption.items()
        }
        top1, top5 = (statistics.fmean(column) for column in zip(*means.values(), strict=True))
        metrics |= {f"{task}/{name}/top1": top1, f"{task}/{name}/top5": top5}
        metrics |= {
            f"{task}/{name}/{c}/top1": mean[0] for c, mean in means.items() if c is not None
        }
    return metrics


def restricted(fc: nn.Linear, columns: Sequence[int]) -> nn.Linear:
    """Return a classifier in which only some classes compete."""
    place = torch.tensor(columns, device=fc.weight.device)
    fewer = nn.Linear(fc.in_features, len(columns), device=fc.weight.device)
    fewer.weight.data.copy_(fc.weight.detach()[place])
    fewer.bias.data.copy_(fc.bias.detach()[place])
    return fewer


def describe(parts: Sequence[Shifted]) -> Mapping[str, Any]:
    """Say for the record what the sets hold."""
    described: dict[str, Any] = {}
    for part in parts:
        own = described.setdefault(part.name, {"images": 0, "classes": 0, "listings": []})
        own["images"] += len(part.images)
        own["classes"] = len(part.columns)
        own["listings"].append(part.images.listing_hash())
    return described
