"""What several seeds can say, against numbers worked out by hand or by scipy."""

import math

import pytest
from scipy import stats

from benchmarks.trials import compare, summarise

FIVE = {
    0: 60.6,
    1: 60.6,
    2: 60.7,
    3: 60.9,
    4: 61.1,
}  # v1 in the reference's README


GAINS = (1, 1.2, 0.9, 1, 1.1)


def test_mean_deviation_and_interval_are_the_textbooks():
    found = summarise(FIVE)
    assert found.mean == pytest.approx(60.78)
    assert found.sd == pytest.approx(0.2168, abs=1e-4)  # its README prints 60.8 +- 0.2
    assert found.ci95 == pytest.approx(2.776 * 0.2168 / math.sqrt(5), abs=1e-3)
    assert (found.seeds, found.diverged, found.mean_without) == (5, {}, None)


def test_one_seed_has_no_spread():
    found = summarise({3: 57.0})
    assert (found.mean, found.sd, found.ci95, found.seeds) == (57.0, None, None, 1)


def test_a_diverged_run_is_named_and_counted():
    found = summarise({0: 81.0, 1: 81.4, 2: 2.1, 3: 81.2, 4: 81.3})
    assert found.diverged == {2: 2.1}
    assert found.mean == pytest.approx(65.4)
    assert found.mean_without == pytest.approx(81.225)


def test_the_same_seeds_are_paired():
    better = {seed: value + gain for (seed, value), gain in zip(FIVE.items(), GAINS, strict=True)}
    found = compare(better, FIVE)
    assert found.paired
    assert found.difference == pytest.approx(1.04)
    wanted = stats.ttest_rel(list(better.values()), list(FIVE.values())).pvalue
    assert found.p == pytest.approx(wanted)
    # One common spread of 10 points hides nothing from a paired test.
    spread = {seed: value + 10 * seed for seed, value in FIVE.items()}
    shifted = {seed: value + 10 * seed for seed, value in better.items()}
    assert compare(shifted, spread).p == pytest.approx(wanted)


def test_other_seeds_are_not_paired():
    other = {seed + 5: value - 0.4 for seed, value in FIVE.items()}
    found = compare(FIVE, other)
    assert not found.paired
    wanted = stats.ttest_ind(list(FIVE.values()), list(other.values()), equal_var=False).pvalue
    assert found.p == pytest.approx(wanted)


def test_the_smallest_difference_is_found_in_four_of_five_tries():
    import numpy as np

    smallest = compare(FIVE, {seed: v + (-1) ** seed * 0.1 for seed, v in FIVE.items()}).smallest
    assert smallest is not None
    draw = np.random.default_rng(0)
    sd = np.std([0.1 * (-1) ** seed for seed in range(5)], ddof=1)
    tries = draw.normal(smallest, sd, (4000, 5))
    found = stats.ttest_1samp(tries, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.06)


def test_single_runs_have_a_difference_and_no_test():
    found = compare({0: 57.0}, {0: 55.9})
    assert found.difference == pytest.approx(1.1)
    assert (found.p, found.smallest) == (None, None)


def test_equal_runs_are_no_error():
    assert compare({0: 5.0, 1: 5.0}, {0: 5.0, 1: 5.0}).p == 1.0
    assert compare({0: 6.0, 1: 6.0}, {2: 5.0, 3: 5.0}).p == 0.0
