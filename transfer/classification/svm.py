"""Linear SVMs on frozen features: VOC07 classification, its low-shot curve, class folders.

Protocol: Goyal et al., arXiv:1905.01235, Sec. 6 and Appendix B, as VISSL's code runs it; the
feature is the average-pooled one that MoCo's linear protocol takes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from convert.errors import UserError
from convert.files import atomic_write
from convert.progress import Progress
from pretrain.sources import ImageList
from pretrain.views import generator
from transfer.classification.features import Features
from transfer.classification.probe import Probe
from transfer.classification.published_sets import TaggedImages
from transfer.classification.request import (
    ProbeConfig,
    Request,
    require_at_least,
    require_one_of,
)
from transfer.classification.support_vectors import (
    Machine,
    draw_few,
    few_scores,
    in_processes,
    mean_average_precision,
    train_all,
    unit_length,
)
from transfer.classification.tags import ABSENT, DIFFICULT, PRESENT

# Goyal et al.: 2^-19 to 2^-4 and 10^-7 to 10^2.
COSTS = tuple(sorted([0.5**n for n in range(4, 20)] + [10.0**n for n in range(-7, 3)]))
TRAIN_SHARE = 0.9  # of the training images, drawn anew for each of several seeds
CURVE_NAME = "low_shot.png"


@dataclass(frozen=True)
class SvmConfig(ProbeConfig):
    """The keys of an SVM recipe; the defaults are VISSL's.

    Attributes:
        costs: C of the machines, chosen for each class by cross-validation.
        folds: of the cross-validation.
        positive_weight: of a class against the rest.
        max_iter: passes of the solver.
        difficult: training images whose every object of a class is difficult are, for that class,
            `ignored` (VOC's rule), or `negative` (what VISSL's code does). In the test they are
            ignored always.
        low_shot: numbers of images a class for the low-shot curve; empty: no curve.
        samples: independent draws for each of them.
        jobs: processes that fit, one a core at most; 0: one a core. Changes no number.
    """

    costs: tuple[float, ...] = COSTS
    folds: int = 3
    positive_weight: float = 2.0
    max_iter: int = 2000
    difficult: str = "ignored"
    low_shot: tuple[int, ...] = ()
    samples: int = 5
    jobs: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        super().__post_init__()
        if not self.costs or not all(0 < cost < math.inf for cost in self.costs):
            raise UserError(f"costs is {list(self.costs)}, want numbers above 0, as costs .1,1,10")
        require_at_least("folds", self.folds, 2)
        for key in ("max_iter", "samples", *(["low_shot"] if self.low_shot else [])):
            value = getattr(self, key)
            require_at_least(key, min(value) if isinstance(value, tuple) else value, 1)
        require_at_least("jobs", self.jobs, 0)
        if not 0 < self.positive_weight < math.inf:
            raise UserError(f"positive_weight is {self.positive_weight}, want a number above 0")
        require_one_of("difficult", self.difficult, ("ignored", "negative"))

    def machine(self, seed: int) -> Machine:
        """Return how the machines of one seed are trained."""
        return Machine(self.positive_weight, self.max_iter, seed)


def evaluate(config: SvmConfig, request: Request) -> dict[str, Any]:
    """Train the machines on a checkpoint's frozen features and write `results.json`.

    With one seed this is the exact protocol. With more, each seed learns from another random nine
    tenths of the training images, for a spread; random initialisation is also drawn anew.

    Raises:
        UserError: bad input, a class with too few images, or an output folder in use.
    """
    probe = Probe("svm", config, request, _protocol, tagged=True)
    tags, test_tags = tags_of(probe.sets.train), tags_of(probe.sets.val)
    _refuse_few(config, tags, probe.sets.train.classes)
    done = probe.finished()
    if done is not None:
        return done

    def one_seed(seed: int, train: Features, val: Features) -> dict[str, float]:
        kept = np.arange(len(tags))
        if config.seeds > 1:
            kept = share_of(tags, TRAIN_SHARE, _least(config), seed)
        return _one_seed(probe, config, seed, train, val, kept, tags, test_tags)

    record = probe.measure(one_seed)
    if config.low_shot and record:
        _draw_curve(config.low_shot, record, request.output_dir)
    return record


def tags_of(images: ImageList) -> np.ndarray:
    """Return (N, C) PRESENT, DIFFICULT or ABSENT of a set with one class an image, or several."""
    if isinstance(images, TaggedImages):
        return images.tags
    tags = np.full((len(images), len(images.classes)), ABSENT)
    tags[np.arange(len(images)), images.labels] = PRESENT
    return tags


def share_of(tags: np.ndarray, share: float, least: int, seed: int) -> np.ndarray:
    """Draw a share of the training images that leaves no class with fewer than `least`.

    Args:
        tags: (N, C).
        share: 0 to 1.
        least: images a class that stay, or as many as there were.
        seed: of the draw.

    Returns:
        Places, in order.
    """
    draw = np.random.default_rng(generator(seed, "share").initial_seed())
    present = tags == PRESENT
    left, gone = present.sum(axis=0), np.zeros(len(tags), bool)
    spare = len(tags) - round(share * len(tags))
    for place in draw.permutation(len(tags)):
        if gone.sum() == spare:
            break
        if (left[present[place]] > least).all():
            gone[place] = True
            left = left - present[place]
    return np.flatnonzero(~gone)


def _one_seed(
    probe: Probe,
    config: SvmConfig,
    seed: int,
    train: Features,
    val: Features,
    kept: np.ndarray,
    tags: np.ndarray,
    test_tags: np.ndarray,
) -> dict[str, float]:
    """Return the metrics of one seed: the full protocol's, then the low-shot curve's."""
    several = isinstance(probe.sets.train, TaggedImages)
    name = "voc07_svm" if several else "svm"
    x, test, tags = (
        unit_length(train.values.numpy()[kept]),
        unit_length(val.values.numpy()),
        tags[kept],
    )
    learnt = np.where(tags == DIFFICULT, ABSENT, tags) if config.difficult == "negative" else tags
    machine, jobs = config.machine(seed), config.jobs or -1
    total = tags.shape[1] * len(config.costs)
    with Progress(total, "svm", "fit", quiet=probe.request.quiet) as progress:
        chosen = train_all(
            x, learnt, test, config.costs, config.folds, machine, jobs, lambda: progress.add(1)
        )
    if chosen.unfinished:
        probe.request.say(
            f"{chosen.unfinished:.1%} of the fits stopped at max_iter {config.max_iter}, as in the "
            "protocol, most of them at the largest costs"
        )
    area, points = mean_average_precision(test_tags, chosen.scores)
    found = {f"{name}/mAP": area, f"{name}/mAP_11point": points}
    if not several:
        right = chosen.scores.argmax(axis=1) == np.array(probe.sets.val.labels)
        found = {f"{name}/top1": 100 * float(right.mean())} | found
    for k in config.low_shot:
        curve = _low_shot(config, seed, k, x, tags, test, test_tags, exclusive=not several)
        found |= {f"{name}_k{k}/{key}": value for key, value in curve.items()}
    return found


def _low_shot(
    config: SvmConfig,
    seed: int,
    k: int,
    x: np.ndarray,
    tags: np.ndarray,
    test: np.ndarray,
    test_tags: np.ndarray,
    *,
    exclusive: bool,
) -> dict[str, float]:
    """Return mean and standard deviation over the samples of one number of images a class.

    A cost is chosen for each sample on the training images that it left out. VISSL's code takes
    the cost that is best on the test set; that number stands beside, as `mAP_cost_by_test`.
    """
    machine, classes = config.machine(seed), tags.shape[1]
    draws = [
        draw_few(
            tags, k, np.random.default_rng(generator(seed, "few", k, s).initial_seed()), exclusive
        )
        for s in range(config.samples)
    ]
    calls = (
        joblib.delayed(few_scores)(
            x, tags[:, c], rows[c], test, test_tags[:, c], config.costs, machine
        )
        for rows in draws
        for c in range(classes)
    )
    both = np.array(list(in_processes(calls, config.jobs or -1)))
    beside, judged = both.reshape(config.samples, classes, 2, -1).transpose(2, 0, 1, 3)
    judged = 100 * judged.mean(axis=1)  # (samples, costs): percent mAP
    places = np.nanmean(beside, axis=1).argmax(axis=1)
    found = judged[np.arange(config.samples), places]
    spread = float(found.std(ddof=1)) if config.samples > 1 else 0.0
    best = float(judged.mean(axis=0).max())
    return {"mAP": float(found.mean()), "mAP_std": spread, "mAP_cost_by_test": best}


def _least(config: SvmConfig) -> int:
    """Images that every class needs: one a fold, and one more than are drawn, to choose a cost."""
    return max(config.folds, *(k + 1 for k in config.low_shot), 1)


def _refuse_few(config: SvmConfig, tags: np.ndarray, classes: Sequence[str]) -> None:
    counts = (tags == PRESENT).sum(axis=0)
    rarest = int(counts.argmin())
    where = f"class '{classes[rarest]}' has {counts[rarest]} training images"
    if counts[rarest] < config.folds:
        raise UserError(f"{where}, and cross-validation in {config.folds} folds wants one a fold")
    others = (tags == ABSENT).sum(axis=0)
    fullest = int(others.argmin())
    if others[fullest] < config.folds:
        raise UserError(
            f"class '{classes[fullest]}' is absent from {others[fullest]} training images, and "
            f"cross-validation in {config.folds} folds wants one a fold"
        )
    if config.low_shot and counts[rarest] < max(config.low_shot):
        raise UserError(f"{where}, fewer than low_shot {max(config.low_shot)}; name smaller ones")
    if config.low_shot and counts.max() <= max(config.low_shot):
        raise UserError(
            f"low_shot {max(config.low_shot)}: no class has a training image more, and a cost is "
            "chosen on those left out; name smaller ones"
        )


def _draw_curve(low_shot: Sequence[int], record: dict[str, Any], folder: Path) -> None:
    from matplotlib.figure import Figure

    name = next(key for key in record["metrics"] if key.endswith(f"_k{low_shot[0]}/mAP"))
    prefix = name.rsplit("_k", 1)[0]
    values = [record["metrics"][f"{prefix}_k{k}/mAP"] for k in low_shot]
    errors = [record["metrics"][f"{prefix}_k{k}/mAP_std"] for k in low_shot]
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(low_shot, values, errors, marker="o", capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(low_shot, [str(k) for k in low_shot])
    axes.set(xlabel="images a class", ylabel="mAP, %", title=record["checkpoint"]["name"])
    with atomic_write(folder / CURVE_NAME) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _protocol(config: SvmConfig) -> dict[str, Any]:
    return {
        "task": "svm",
        "features": f"{config.stage}, average-pooled, L2-normalised",
        "view": f"resize {config.resize}, centre crop {config.image_size}",
        "precision": config.precision,
        "machine": "LIBLINEAR, squared hinge, l2, dual, one against the rest",
        "costs": list(config.costs),
        "folds": config.folds,
        "positive_weight": config.positive_weight,
        "max_iter": config.max_iter,
        "difficult": config.difficult,
        "low_shot": list(config.low_shot),
        "samples": config.samples,
        "train": "whole" if config.seeds == 1 else f"random {TRAIN_SHARE:.0%} for each seed",
    }
