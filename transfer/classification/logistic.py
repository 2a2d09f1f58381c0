"""Multinomial logistic regression on frozen features: the suite of small sets.

Protocol: SimCLR, arXiv:2002.05709, Appendix B.8.1: L-BFGS, no augmentation, l2 of 45 values chosen
on a validation split, refitted on training and validation images. Which set reports what: Ericsson
et al., arXiv:2011.13377, Sec. 3.

Legend: N: training images; Q: test images; D: width of a feature; C: classes.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from convert.errors import UserError
from convert.progress import Progress
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
from transfer.classification.support_vectors import mean_average_precision
from transfer.classification.svm import tags_of
from transfer.classification.tags import ABSENT, DIFFICULT, PRESENT

METRICS = ("top1", "mean_per_class", "mAP")
AUTO = "auto"
GRID = (-6, 5)  # powers of ten between which l2 is tried
APART_SHARE = 0.2  # of the training images, where the set's makers name no validation part


@dataclass(frozen=True)
class LogisticConfig(ProbeConfig):
    """The keys of a logistic regression.

    Attributes:
        l2_values: how many strengths are tried, evenly spaced in the logarithm from 1e-6 to 1e5.
        max_iter: steps of L-BFGS after which a fit that has not converged is stopped.
        metric: what l2 is chosen by; auto: the set's own, top1 for class folders.
        apart: share of the training images that l2 is chosen on, drawn from the seed class by
            class, where the set's makers name no validation part.
    """

    l2_values: int = 45
    max_iter: int = 1000
    metric: str = AUTO
    apart: float = APART_SHARE

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        super().__post_init__()
        for key in ("l2_values", "max_iter"):
            require_at_least(key, getattr(self, key), 1)
        require_one_of("metric", self.metric, (AUTO, *METRICS))
        if not 0 < self.apart < 1:
            raise UserError(f"apart is {self.apart}, want a share between 0 and 1, as apart .2")

    @property
    def grid(self) -> np.ndarray:
        """The strengths, from the strongest down: each fit starts from the one before it."""
        return np.logspace(*GRID, self.l2_values)[::-1]


@dataclass(frozen=True)
class Answers:
    """A set's classes as a fit and its score want them.

    Attributes:
        tags: (N, C) PRESENT, DIFFICULT or ABSENT. several: whether an image may have several.
    """

    tags: np.ndarray
    several: bool

    def take(self, places: np.ndarray) -> "Answers":
        """Return those of some images."""
        return Answers(self.tags[places], self.several)

    @property
    def labels(self) -> np.ndarray:
        """(N,) the class of each image, where it has one."""
        return np.asarray(self.tags.argmax(axis=1))


class Regression:
    """One regression over the classes or, where an image may have several, one a class.

    Args:
        max_iter: of L-BFGS.

    Attributes:
        unfinished, fits: how many were stopped before they converged, of how many.
    """

    def __init__(self, max_iter: int) -> None:
        self.max_iter = max_iter
        self.models: list[LogisticRegression] = []
        self.unfinished = self.fits = 0

    def fit(self, x: np.ndarray, answers: Answers, l2: float) -> None:
        """Minimise the summed cross-entropy plus l2 / 2 times the squared weights.

        The weights of the last fit are where this one starts.
        """
        columns = list(answers.tags.T) if answers.several else [None]
        if not self.models:
            make = {"max_iter": self.max_iter, "warm_start": True, "tol": 1e-4}
            self.models = [LogisticRegression(**make) for _ in columns]
        for model, column in zip(self.models, columns, strict=True):
            kept = slice(None) if column is None else column != DIFFICULT
            y = answers.labels if column is None else column[kept] == PRESENT
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
                model.set_params(C=1 / l2).fit(x[kept], y)
            self.fits += 1
            self.unfinished += int(np.max(model.n_iter_)) >= self.max_iter

    def score(self, x: np.ndarray, answers: Answers) -> dict[str, float]:
        """Return percent by every metric that the set has."""
        if answers.several:
            scores = np.stack([model.decision_function(x) for model in self.models], axis=1)
            area, points = mean_average_precision(answers.tags, scores)
            return {"mAP": points, "mAP_area": area}  # VOC 2007's own measure is the suite's
        labels, found = answers.labels, self.models[0].predict(x)
        right = found == labels
        each = [right[labels == label].mean() for label in np.unique(labels)]
        return {"top1": 100 * float(right.mean()), "mean_per_class": 100 * float(np.mean(each))}


def evaluate(config: LogisticConfig, request: Request) -> dict[str, Any]:
    """Fit a checkpoint's frozen features and write `results.json`.

    With several seeds each chooses l2 on a validation split of its own (where the set has none),
    and random initialisation is drawn anew.

    Raises:
        UserError: bad input, a class that cannot be split, or an output folder in use.
    """
    probe = Probe("logreg", config, request, _protocol, tagged=True)
    several = isinstance(probe.sets.train, TaggedImages)
    answers = Answers(tags_of(probe.sets.train), several)
    test_answers = Answers(tags_of(probe.sets.val), several)
    metric = _metric(config, probe)
    splits = {seed: _split(probe, config, answers, seed) for seed in config.all_seeds}
    done = probe.finished()
    if done is not None:
        return done

    def one_seed(seed: int, train: Features, val: Features) -> dict[str, float]:
        x, test = train.values.double().numpy(), val.values.double().numpy()
        learnt, apart = splits[seed]
        with Progress(config.l2_values, "logreg", "fit", quiet=request.quiet) as progress:
            l2, best = choose(x, answers, learnt, apart, config, metric, lambda: progress.add(1))
        final = Regression(config.max_iter)
        final.fit(x, answers, l2)
        request.say(f"seed {seed}: l2 {l2:.3g} chosen, {metric} {best:.2f} on the images set apart")
        found = {f"logreg/{k}": v for k, v in final.score(test, test_answers).items()}
        return found | {"logreg/log10_l2": math.log10(l2)}

    return probe.measure(one_seed)


def choose(
    x: np.ndarray,
    answers: Answers,
    learnt: np.ndarray,
    apart: np.ndarray,
    config: LogisticConfig,
    metric: str,
    tick: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Return the l2 that scores best on the images set apart, and its score in percent.

    Of equal ones the weakest wins, as in ssl-transfer's code.
    """
    regression = Regression(config.max_iter)
    best = (float(config.grid[0]), -1.0)
    for l2 in config.grid:
        regression.fit(x[learnt], answers.take(learnt), l2)
        found = regression.score(x[apart], answers.take(apart))[metric]
        if found >= best[1]:
            best = (float(l2), found)
        tick()
    return best


def _metric(config: LogisticConfig, probe: Probe) -> str:
    several = isinstance(probe.sets.train, TaggedImages)
    metric = probe.sets.metric if config.metric == AUTO else config.metric
    if (metric == "mAP") != several:
        images = "several classes an image" if several else "one class an image"
        raise UserError(f"metric {metric}: {probe.sets.name} has {images}; leave metric auto")
    return metric


def _split(
    probe: Probe, config: LogisticConfig, answers: Answers, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return places to learn from and places to choose l2 on; no test image is among them."""
    apart = np.array(probe.sets.apart, int)
    if not len(apart):
        apart = draw_apart(answers, config.apart, seed)
    learnt = np.setdiff1d(np.arange(len(answers.tags)), apart)
    words = {PRESENT: "of", ABSENT: "without"}
    absent = answers.several  # a regression for each class wants images without it too
    for part, wanted in ((learnt, PRESENT), (apart, PRESENT), *([(learnt, ABSENT)] * absent)):
        seen = (answers.tags[part] == wanted).any(axis=0)
        if not seen.all():
            name = probe.sets.train.classes[int(np.flatnonzero(~seen)[0])]
            raise UserError(
                f"images {probe.sets.name}: too few training images {words[wanted]} class '{name}' "
                "to learn from some and choose l2 on others; want two or more"
            )
    return learnt, apart


def draw_apart(answers: Answers, share: float, seed: int) -> np.ndarray:
    """Draw a share of the images of each class, one at least; where they have several, of all."""
    draw = np.random.default_rng(generator(seed, "apart").initial_seed())

    def some(places: Sequence[int] | np.ndarray) -> np.ndarray:
        count = max(round(share * len(places)), 1)
        return np.asarray(draw.permutation(places)[:count])

    if answers.several:
        return np.sort(some(np.arange(len(answers.tags))))
    labels = answers.labels
    return np.sort(np.concatenate([some(np.flatnonzero(labels == c)) for c in np.unique(labels)]))


def _protocol(config: LogisticConfig) -> dict[str, Any]:
    return {
        "task": "logreg",
        "features": f"{config.stage}, average-pooled",
        "view": f"resize {config.resize}, centre crop {config.image_size}",
        "precision": config.precision,
        "solver": f"L-BFGS, at most {config.max_iter} steps",
        "l2": f"{config.l2_values} from 1e{GRID[0]} to 1e{GRID[1]}",
        "metric": config.metric,
        "apart": config.apart,
    }
