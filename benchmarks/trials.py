"""What several seeds can say: mean, spread, interval, a paired test, runs that diverged.

Formulas: Student's t for the interval of a mean and for paired differences, Welch's t where the
seeds of two rows are not the same. All from scipy.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
POWER = 0.8
# A run that ends below half of the median of its siblings did not train: trials of one protocol
# spread by a few points (the papers': below one), a diverged detector ends near zero.
DIVERGED_SHARE = 0.5


@dataclass(frozen=True)
class Spread:
    """Some seeds of one number.

    Attributes:
        mean: over all of them, the diverged included.
        sd: sample standard deviation; None with one seed.
        ci95: half the width of the 95% confidence interval of the mean; None with one seed.
        seeds: how many.
        diverged: the seeds that did not train, with what they ended at.
        mean_without: mean over the others; None where none diverged.
    """

    mean: float
    sd: float | None
    ci95: float | None
    seeds: int
    diverged: Mapping[int, float]
    mean_without: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two rows of one number.

    Attributes:
        difference: of the means, first minus second.
        p: two-sided p value of no difference; None where seeds are too few to tell.
        smallest: the smallest true difference that so many seeds find with a power of 80% at the
            5% level, given their spread; None where that is unknown.
        paired: whether the same seeds stand on both sides.
    """

    difference: float
    p: float | None
    smallest: float | None
    paired: bool


def summarise(values: Mapping[int, float]) -> Spread:
    """Summarise a number over its seeds.

    Args:
        values: seed -> number; at least one, finite.
    """
    numbers = list(values.values())
    lost = diverged(values)
    kept = [value for seed, value in values.items() if seed not in lost]
    if len(numbers) < 2:
        return Spread(numbers[0], None, None, 1, lost)
    sd = statistics.stdev(numbers)
    half = _quantile(0.5 + CONFIDENCE / 2, len(numbers) - 1) * sd / math.sqrt(len(numbers))
    without = statistics.fmean(kept) if lost else None
    return Spread(statistics.fmean(numbers), sd, half, len(numbers), lost, without)


def diverged(values: Mapping[int, float]) -> dict[int, float]:
    """Return the seeds whose number is less than half of their median; none below three seeds."""
    if len(values) < 3:
        return {}
    least = DIVERGED_SHARE * statistics.median(values.values())
    return {seed: value for seed, value in values.items() if value < least}


def compare(first: Mapping[int, float], second: Mapping[int, float]) -> Comparison:
    """Compare two rows: by the differences of equal seeds where two or more are shared.

    Args:
        first: seed -> number.
        second: the same, of the baseline.
    """
    shared = sorted(first.keys() & second.keys())
    if len(shared) >= 2 and len(shared) == len(first) == len(second):
        return _paired([first[seed] - second[seed] for seed in shared])
    a, b = list(first.values()), list(second.values())
    difference = statistics.fmean(a) - statistics.fmean(b)
    if len(a) < 2 or len(b) < 2:
        return Comparison(difference, None, None, paired=False)
    return _welch(a, b, difference)


def _paired(differences: Sequence[float]) -> Comparison:
    mean, error = statistics.fmean(differences), _standard_error(differences)
    freedom = len(differences) - 1
    return Comparison(mean, _p(mean, error, freedom), _smallest(error, freedom), paired=True)


def _welch(a: Sequence[float], b: Sequence[float], difference: float) -> Comparison:
    parts = [_standard_error(numbers) ** 2 for numbers in (a, b)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return Comparison(difference, _p(difference, 0.0, 1), 0.0, paired=False)
    weights = [part**2 / (len(n) - 1) for part, n in zip(parts, (a, b), strict=True)]
    freedom = error**4 / sum(weights)
    return Comparison(difference, _p(difference, error, freedom), _smallest(error, freedom), False)


def _standard_error(numbers: Sequence[float]) -> float:
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


def _p(difference: float, error: float, freedom: float) -> float:
    from scipy.stats import t

    if error == 0:
        return 0.0 if difference else 1.0
    return float(2 * t.sf(abs(difference) / error, freedom))


def _smallest(error: float, freedom: float) -> float:
    return error * (_quantile(0.5 + CONFIDENCE / 2, freedom) + _quantile(POWER, freedom))


def _quantile(share: float, freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf(share, freedom))
