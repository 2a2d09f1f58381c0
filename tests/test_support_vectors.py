import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from transfer.classification.support_vectors import (
    Machine,
    average_precision,
    cross_validate,
    draw_few,
    few_scores,
    mean_average_precision,
    train_all,
    unit_length,
)
from transfer.classification.tags import ABSENT, DIFFICULT, PRESENT

P, D, A = PRESENT, DIFFICULT, ABSENT


def clouds(count, classes=3, width=6, seed=0, noise=0.6):
    """Images of a class each, around centres of their own."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = np.arange(count) % classes
    tags = np.where(labels[:, None] == np.arange(classes), P, A)
    return unit_length(centres[labels] + noise * draw.normal(size=(count, width))), tags


# By hand. The first: precision 1, 1/2, 2/3, 1/2 at recall 1/2, 1/2, 1, 1; made monotone it
# is 1 up to recall 1/2 (six of eleven points) and 2/3 beyond (five).
@pytest.mark.parametrize(
    ("tags", "area", "points"),
    [
        ([P, A, P, A], 0.5 + 0.5 * 2 / 3, (6 + 5 * 2 / 3) / 11),
        ([P, P, A, A], 1, 1),
        ([A, A, P, P], 0.5, 0.5),
        ([A, P, A, P], 0.5, 0.5),
        ([P, A, A, P], 0.5 + 0.5 * 0.5, (6 + 5 * 0.5) / 11),
        ([P, D, P, A], 1, 1),  # the difficult one does not count, wherever it is ranked
        ([D, P, D, P, D, A], 1, 1),
        ([D, A, P], 0.5, 0.5),
        ([A, A, A, A, P], 0.2, 0.2),
    ],
)
def test_average_precision_of_handmade_scores(tags, area, points):
    scores = -np.arange(len(tags)) * 0.7
    assert average_precision(np.array(tags), scores) == pytest.approx((area, points))


def test_images_of_equal_score_stand_or_fall_together():
    for order in ([P, A, A, A], [A, A, A, P]):
        found = average_precision(np.array(order), np.zeros(4))
        assert found == pytest.approx((0.25, 0.25))


def test_mean_average_precision_is_over_classes_in_percent():
    tags = np.array([[P, A], [A, A], [P, D], [A, P]])
    scores = np.array([[4.0, 1], [3, 2], [2, 9], [1, 0]])
    area, points = mean_average_precision(tags, scores)
    assert area == pytest.approx(100 * (5 / 6 + 1 / 3) / 2)
    assert points == pytest.approx(100 * ((6 + 10 / 3) / 11 + 1 / 3) / 2)


def test_cross_validation_equals_scikit_learns():
    x, tags = clouds(90, noise=1.5)
    y = tags[:, 1]
    for cost in (0.01, 1.0):
        plain = LinearSVC(
            C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0
        )
        theirs = cross_val_score(plain, x, y, cv=3, scoring="average_precision").mean()
        ours, unfinished = cross_validate(x, y, cost, 3, Machine())
        assert ours == pytest.approx(theirs)
        assert 0.3 < ours < 1
        assert unfinished == 0


def test_all_classes_at_once_equal_one_after_another():
    x, tags = clouds(90, noise=1.2)
    test, _ = clouds(40, seed=1)
    costs = (0.001, 0.1, 10.0)
    ticks = []
    found = train_all(x, tags, test, costs, 3, Machine(), 1, lambda: ticks.append(1))
    assert len(ticks) == 9
    for c in range(3):
        validated = [cross_validate(x, tags[:, c], cost, 3, Machine())[0] for cost in costs]
        assert found.validated[c].tolist() == validated
        assert found.costs[c] == costs[int(np.argmax(validated))]
        fitted, _ = Machine().fit(x, tags[:, c], found.costs[c])
        assert np.array_equal(found.scores[:, c], fitted.decision_function(test))


def test_a_difficult_image_is_left_out_of_its_classs_training():
    x, tags = clouds(60)
    test, _ = clouds(20, seed=1)
    noisy = tags.copy()
    noisy[::3, 0] = D  # all of class 0's images but two
    noisy[[0, 3], 0] = P
    found = train_all(x, noisy, test, (1.0,), 2, Machine(), 1)
    kept = noisy[:, 0] != D
    fitted, _ = Machine().fit(x[kept], noisy[kept, 0], 1.0)
    assert np.array_equal(found.scores[:, 0], fitted.decision_function(test))
    as_negative = train_all(x, np.where(noisy == D, A, noisy), test, (1.0,), 2, Machine(), 1)
    assert not np.allclose(found.scores[:, 0], as_negative.scores[:, 0])


def test_fits_that_stop_early_are_counted():
    x, tags = clouds(90, noise=2)
    found = train_all(x, tags, x, (1e4,), 2, Machine(max_iter=1), 1)
    assert found.unfinished == 1


def test_separable_features_reach_100_percent():
    x, tags = clouds(60, noise=0.02)
    test, test_tags = clouds(30, noise=0.02, seed=5)
    found = train_all(x, tags, test, (0.1, 10.0), 3, Machine(), 1)
    assert mean_average_precision(test_tags, found.scores) == pytest.approx((100, 100))


def test_few_images_of_several_classes_are_drawn_for_each_class():
    draw = np.random.default_rng(0)
    tags = np.where(draw.random((200, 4)) < 0.3, P, A)
    tags[:30, 2] = D
    for c, rows in enumerate(draw_few(tags, 5, np.random.default_rng(1), exclusive=False)):
        assert len(set(rows)) == len(rows) == 20
        assert (tags[rows, c] == P).sum() == 5
        assert (tags[rows, c] == A).sum() == 15  # (C - 1) k; difficult ones never
    again = draw_few(tags, 5, np.random.default_rng(1), exclusive=False)
    other = draw_few(tags, 5, np.random.default_rng(2), exclusive=False)
    assert np.array_equal(rows, again[3])
    assert not np.array_equal(rows, other[3])


def test_few_images_of_one_class_each_are_the_same_for_all_classes():
    _, tags = clouds(60)
    first, second, third = draw_few(tags, 4, np.random.default_rng(0), exclusive=True)
    assert np.array_equal(first, second)
    assert np.array_equal(first, third)
    assert (tags[first] == P).sum(axis=0).tolist() == [4, 4, 4]


def test_few_images_are_judged_on_those_left_out_and_on_the_test_set():
    x, tags = clouds(60, noise=1)
    test, test_tags = clouds(30, noise=1, seed=3)
    rows = draw_few(tags, 3, np.random.default_rng(0), exclusive=True)[1]
    beside, judged = few_scores(x, tags[:, 1], rows, test, test_tags[:, 1], (0.1, 1.0), Machine())
    left = np.setdiff1d(np.arange(60), rows)
    fitted, _ = Machine().fit(x[rows], tags[rows, 1], 1.0)
    assert beside[1] == average_precision(tags[left, 1], fitted.decision_function(x[left]))[0]
    assert judged[1] == average_precision(test_tags[:, 1], fitted.decision_function(test))[0]
    assert average_precision_score(test_tags[:, 1] == P, fitted.decision_function(test)) < judged[1]
