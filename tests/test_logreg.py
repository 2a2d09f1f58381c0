import json
import re

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from convert.errors import UserError
from tests.small_sets import write_images, write_voc
from transfer import logreg
from transfer.classification.logistic import (
    Answers,
    LogisticConfig,
    Regression,
    choose,
    draw_apart,
)
from transfer.classification.tags import ABSENT, DIFFICULT, PRESENT

SMALL = ["l2_values", "5", "image_size", "32"]


def clouds(count, noise, seed=0, classes=3, width=5):
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = np.arange(count) % classes
    tags = np.where(labels[:, None] == np.arange(classes), PRESENT, ABSENT)
    return centres[labels] + noise * draw.normal(size=(count, width)), Answers(tags, False)


def run(weights, images, out, *words):
    named = ["--pretrained", str(weights), "--output-dir", str(out), "--device", "cpu", "--quiet"]
    assert logreg.main([str(images), *named, *SMALL, *map(str, words)]) == 0
    return json.loads((out / "results.json").read_text())


def test_a_fit_minimises_summed_loss_plus_half_l2_of_the_weights():
    x, answers = clouds(60, 1.0)
    l2 = 3.0
    found = Regression(1000)
    found.fit(x, answers, l2)

    def objective(weight, bias):
        logits = x @ weight.T + bias
        chosen = logits[np.arange(60), answers.labels]
        return np.sum(np.log(np.exp(logits).sum(1)) - chosen) + l2 / 2 * np.sum(weight**2)

    model = found.models[0]
    least = objective(model.coef_, model.intercept_)
    draw = np.random.default_rng(0)
    for step in (0.01, 0.1):
        moved = [
            objective(
                model.coef_ + step * draw.normal(size=model.coef_.shape),
                model.intercept_ + step * draw.normal(size=3),
            )
            for _ in range(20)
        ]
        assert min(moved) > least


def test_going_down_the_grid_ends_where_a_fresh_fit_does():
    x, answers = clouds(60, 1.5)
    warm = Regression(5000)
    for l2 in (1e3, 10, 0.1):
        warm.fit(x, answers, l2)
    fresh = LogisticRegression(C=10, max_iter=5000).fit(x, answers.labels)
    assert np.allclose(warm.models[0].predict_proba(x), fresh.predict_proba(x), atol=2e-3)


def test_l2_is_chosen_on_the_images_set_apart_alone():
    x, answers = clouds(120, 1.0)
    config = LogisticConfig(l2_values=9)
    apart = draw_apart(answers, 0.25, 0)
    learnt = np.setdiff1d(np.arange(120), apart)
    l2, best = choose(x, answers, learnt, apart, config, "top1")
    scores = {}
    for value in config.grid:
        fresh = LogisticRegression(C=1 / value, max_iter=1000).fit(
            x[learnt], answers.labels[learnt]
        )
        scores[value] = 100 * fresh.score(x[apart], answers.labels[apart])
    assert best == pytest.approx(max(scores.values()), abs=4)  # one image of 30 may be close
    assert scores[l2] >= max(scores.values()) - 4
    assert min(scores.values()) < best


def test_accuracy_and_its_mean_over_classes_are_told_apart():
    tags = np.full((10, 2), ABSENT)
    tags[:8, 0] = PRESENT
    tags[8:, 1] = PRESENT
    found = Regression(100)
    x = np.zeros((10, 1))
    found.fit(x, Answers(tags, False), 1.0)  # knows nothing: says the larger class
    assert found.score(x, Answers(tags, False)) == {"top1": 80.0, "mean_per_class": 50.0}


def test_difficult_images_neither_teach_nor_count():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 3))
    tags = np.where(x[:, :1] > 0, PRESENT, ABSENT)
    clean = Regression(1000)
    clean.fit(x[:30], Answers(tags[:30], True), 0.1)
    lied = tags.copy()
    lied[30:] = DIFFICULT
    with_difficult = Regression(1000)
    with_difficult.fit(x, Answers(lied, True), 0.1)
    assert np.allclose(clean.models[0].coef_, with_difficult.models[0].coef_)
    assert with_difficult.score(x, Answers(lied, True))["mAP"] == pytest.approx(100)


def test_every_class_gives_its_share_to_the_images_set_apart():
    _, answers = clouds(90, 1)
    apart = draw_apart(answers, 0.2, 0)
    assert (answers.tags[apart] == PRESENT).sum(axis=0).tolist() == [6, 6, 6]
    assert not np.array_equal(apart, draw_apart(answers, 0.2, 1))


def test_class_folders_give_both_accuracies_and_repeat_exactly(weights, images, tmp_path, capsys):
    first = run(weights, images, tmp_path / "a", "--seeds", "2")
    again = run(weights, images, tmp_path / "b", "--seeds", "2")
    assert list(first["metrics"]) == ["logreg/top1", "logreg/mean_per_class", "logreg/log10_l2"]
    assert first["metrics"]["logreg/top1"] > 50  # colours; chance is 33
    assert first["per_seed"] == again["per_seed"]
    assert capsys.readouterr().out.startswith("logreg/top1 ")


def test_voc_gives_its_own_years_map(weights, tmp_path):
    pets = [[("cat", 0)], [("dog", 0)], [("cat", 0), ("dog", 0)], []] * 8
    voc = write_voc(tmp_path / "VOC2007", pets).parent
    record = run(weights, voc, tmp_path / "out")
    assert record["metrics"]["logreg/mAP"] > 70
    assert set(record["metrics"]) == {"logreg/mAP", "logreg/mAP_area", "logreg/log10_l2"}


def test_the_published_grid_is_the_default():
    grid = LogisticConfig().grid
    assert len(grid) == 45
    assert (grid[0], grid[-1]) == pytest.approx((1e5, 1e-6))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["metric", "mAP"], "metric mAP: "),
        (["metric", "best"], "metric is 'best', want one of auto, top1"),
        (["apart", "1"], "apart is 1.0, want a share between 0 and 1"),
        (["l2_values", "0"], "l2_values is 0, want at least 1"),
        (["l2", "1"], "unknown key 'l2'"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    weights, images, tmp_path, monkeypatch, words, line
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        logreg.main([str(images), "--pretrained", str(weights), "image_size", "32", *words])
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_class_of_one_image_cannot_be_split(weights, tmp_path):
    images = write_images(tmp_path / "set", train=1, val=1)
    with pytest.raises(UserError, match="too few training images of class 'blue' to learn"):
        run(weights, images, tmp_path / "out")


def test_a_class_that_every_image_has_cannot_be_told_from_the_others(weights, tmp_path):
    objects = [[("cat", 0), ("dog", i % 2)] for i in range(16)]
    folder = write_voc(tmp_path / "VOC2007", objects)
    with pytest.raises(UserError, match="too few training images without class 'cat' to learn"):
        run(weights, folder, tmp_path / "out")
