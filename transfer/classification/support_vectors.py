"""One-vs-rest linear support vector machines, all classes at once on the cores at hand.

Only NumPy and scikit-learn are imported here: each of the processes that fit imports this file.

Legend: N: training images; Q: test images; D: width of a feature; C: classes.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from transfer.classification.tags import ABSENT, DIFFICULT, PRESENT

NORM_FLOOR = 1e-5  # added to a feature's length before it is divided by


@dataclass(frozen=True)
class Machine:
    """How a machine is trained: LIBLINEAR's dual solver, squared hinge, l2 (arXiv:1905.01235).

    Attributes:
        positive_weight: of the class against the rest.
        max_iter: passes after which a solver that has not converged is stopped.
        seed: of the order in which the solver visits images.
    """

    positive_weight: float = 2.0
    max_iter: int = 2000
    seed: int = 0

    def fit(self, x: np.ndarray, y: np.ndarray, cost: float) -> tuple[LinearSVC, bool]:
        """Train one on (n, D) features and (n,) PRESENT or ABSENT.

        Returns:
            The machine, and whether it was stopped before it converged.
        """
        machine = LinearSVC(
            C=cost,
            class_weight={PRESENT: self.positive_weight, ABSENT: 1.0},
            max_iter=self.max_iter,
            dual=True,
            random_state=self.seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
            machine.fit(x, y)
        return machine, int(np.max(machine.n_iter_)) >= self.max_iter


@dataclass(frozen=True)
class Chosen:
    """The costs that cross-validation chose.

    Attributes:
        costs: (C,) of each class. validated: (C, costs tried) mean AP over the folds, 0 to 1.
        scores: (Q, C) what the machines of these costs, trained on everything, say of the test.
        unfinished: share of all fits that were stopped before they converged.
    """

    costs: np.ndarray
    validated: np.ndarray
    scores: np.ndarray
    unfinished: float


def unit_length(x: np.ndarray) -> np.ndarray:
    """Divide (n, D) features by their lengths; double precision, as LIBLINEAR computes."""
    wide = x.astype(np.float64)
    return np.asarray(wide / (np.linalg.norm(wide, axis=1, keepdims=True) + NORM_FLOOR))


def average_precision(tags: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Score one class's ranking; images whose every object of it is difficult do not count.

    Args:
        tags: (Q,) PRESENT, DIFFICULT, ABSENT.
        scores: (Q,) the higher, the likelier; images of equal score stand or fall together.

    Returns:
        The area under precision made monotone, over recall (VOC 2010 on, and VISSL's), and its
        mean at the recalls 0, .1, ..., 1 (VOC 2007's own). Both 0 to 1.
    """
    counted = tags != DIFFICULT
    precision, recall, _ = precision_recall_curve(tags[counted] == PRESENT, scores[counted])
    # From recall 1 down: the best precision at this recall or a higher one. The curve's last point,
    # recall 0 at precision 1, is scikit-learn's own and no image's.
    best = np.maximum.accumulate(precision[:-1])
    area = float(np.sum((recall[:-1] - recall[1:]) * best))
    levels = np.arange(11) / 10
    points = [best[recall[:-1] >= level - 1e-12][-1] for level in levels]
    return area, float(np.mean(points))


def mean_average_precision(tags: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Average both measures over classes: (Q, C) tags and scores -> percent."""
    each = [average_precision(tags[:, c], scores[:, c]) for c in range(tags.shape[1])]
    area, points = np.mean(each, axis=0)
    return 100 * float(area), 100 * float(points)


def cross_validate(
    x: np.ndarray, y: np.ndarray, cost: float, folds: int, machine: Machine
) -> tuple[float, int]:
    """Return the mean average precision over stratified folds, and how many fits did not converge.

    The folds are scikit-learn's for `cv=folds`, unshuffled, and so is the measure.
    """
    found, unfinished = [], 0
    for train, held in StratifiedKFold(folds).split(x, y):
        fitted, stopped = machine.fit(x[train], y[train], cost)
        found.append(average_precision_score(y[held] == PRESENT, fitted.decision_function(x[held])))
        unfinished += stopped
    return float(np.mean(found)), unfinished


def train_all(
    x: np.ndarray,
    tags: np.ndarray,
    test: np.ndarray,
    costs: Sequence[float],
    folds: int,
    machine: Machine,
    jobs: int = -1,
    tick: Callable[[], None] = lambda: None,
) -> Chosen:
    """Choose a cost for each class by cross-validation, train on everything, score the test set.

    Args:
        x: (N, D) features of unit length.
        tags: (N, C); images that are DIFFICULT for a class are left out of its training.
        test: (Q, D).
        costs: to choose among; of equal ones the first wins.
        folds: of the cross-validation.
        machine: how each is trained.
        jobs: processes, one a core at most; -1: one a core.
        tick: called after each class and cost.
    """
    classes = tags.shape[1]
    # The largest costs take longest: they start first, so that no core waits for one at the end.
    order = sorted(range(len(costs)), key=lambda place: -costs[place])
    tasks = [(c, place) for place in order for c in range(classes)]
    validated = np.zeros((classes, len(costs)))
    calls = (
        joblib.delayed(_validated)(x, tags[:, c], costs[place], folds, machine)
        for c, place in tasks
    )
    unfinished = 0
    for (c, place), (found, stopped) in zip(tasks, in_processes(calls, jobs), strict=True):
        validated[c, place], unfinished = found, unfinished + stopped
        tick()
    chosen = np.array([costs[place] for place in validated.argmax(axis=1)])
    finals = (
        joblib.delayed(_scored)(x, tags[:, c], chosen[c], test, machine) for c in range(classes)
    )
    columns = []
    for scores, stopped in in_processes(finals, jobs):
        columns.append(scores)
        unfinished += stopped
    fits = classes * (len(costs) * folds + 1)
    return Chosen(chosen, validated, np.stack(columns, axis=1), unfinished / fits)


def in_processes(calls: Any, jobs: int) -> Any:
    """Run joblib's calls in processes of one thread each; yield what they return, in order.

    There are never more than cores, which would bring nothing and take memory.

    Not in threads: LIBLINEAR draws from one generator for the whole process.
    """
    most = joblib.cpu_count()
    with joblib.parallel_config("loky", n_jobs=min(jobs, most), inner_max_num_threads=1):
        yield from joblib.Parallel(return_as="generator")(calls)


def _validated(
    x: np.ndarray, tags: np.ndarray, cost: float, folds: int, machine: Machine
) -> tuple[float, int]:
    kept = tags != DIFFICULT
    return cross_validate(x[kept], tags[kept], cost, folds, machine)


def _scored(
    x: np.ndarray, tags: np.ndarray, cost: float, test: np.ndarray, machine: Machine
) -> tuple[np.ndarray, bool]:
    kept = tags != DIFFICULT
    fitted, stopped = machine.fit(x[kept], tags[kept], cost)
    return fitted.decision_function(test), stopped


# --- few images a class ---------------------------------------------------------------------------


def draw_few(
    tags: np.ndarray, k: int, draw: np.random.Generator, exclusive: bool
) -> list[np.ndarray]:
    """Draw k images of each class and the ones to tell them from.

    Args:
        tags: (N, C).
        k: images a class; each class is PRESENT in as many.
        draw: random numbers.
        exclusive: images have one class each, and all classes learn from the same C k images. Else
            each class is drawn for itself, with (C - 1) k images where it is ABSENT, or as many as
            there are (VISSL's low-shot samples of VOC07).

    Returns:
        For each class, places in the training set.
    """

    def some(places: np.ndarray, count: int) -> np.ndarray:
        return draw.permutation(places)[:count]

    present = [some(np.flatnonzero(column == PRESENT), k) for column in tags.T]
    if exclusive:
        together = np.sort(np.concatenate(present))
        return [together] * len(present)
    wanted = (tags.shape[1] - 1) * k
    absent = [some(np.flatnonzero(column == ABSENT), wanted) for column in tags.T]
    return [np.sort(np.concatenate(pair)) for pair in zip(present, absent, strict=True)]


def few_scores(
    x: np.ndarray,
    tags: np.ndarray,
    rows: np.ndarray,
    test: np.ndarray,
    test_tags: np.ndarray,
    costs: Sequence[float],
    machine: Machine,
) -> tuple[np.ndarray, np.ndarray]:
    """Train one class on a few images with each cost.

    Args:
        x: (N, D) all training images' features.
        tags: (N,) theirs.
        rows: places of those to learn from.
        test: (Q, D).
        test_tags: (Q,).
        costs: to try.
        machine: how each is trained.

    Returns:
        (costs,) AP on the training images that were not drawn (NaN where the class is not among
        them), and on the test set, 0 to 1.
    """
    left = np.ones(len(x), bool)
    left[rows] = False
    knows = (tags[left] == PRESENT).any()
    beside, judged = np.full(len(costs), np.nan), np.zeros(len(costs))
    for place, cost in enumerate(costs):
        fitted, _ = machine.fit(x[rows], tags[rows], cost)
        if knows:
            beside[place] = average_precision(tags[left], fitted.decision_function(x[left]))[0]
        judged[place] = average_precision(test_tags, fitted.decision_function(test))[0]
    return beside, judged
