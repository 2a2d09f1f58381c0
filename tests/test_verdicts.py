"""Each verdict provoked: by a run of a few steps, or by the numbers that a long one would log."""

import time
from dataclasses import replace

import pytest

from convert.errors import UserError
from pretrain.loop import train
from pretrain.monitor import read_log
from pretrain.sources import ImageList, image_folder
from pretrain.verdicts import VERDICTS, Judge
from tests.test_main_moco import go_on, pictures, small_config  # noqa: F401


def said(folder, name=""):
    """What a run's log says, and at which steps."""
    return [
        (line["step"], words)
        for line in read_log(folder)
        for words in line.get("verdicts", [])
        if words.startswith(name)
    ]


def test_without_learning_the_loss_is_chance_once_the_random_keys_are_gone(
    pictures,  # noqa: F811
    tmp_path,
    capsys,
):
    config = small_config(pictures, lr=0.0, epochs=3)
    train(config, image_folder(pictures / "train"), tmp_path, quiet=True)
    rise, rise_ends, chance = said(tmp_path)
    assert rise[0] == 2
    assert rise[1].startswith("rise: the loss went from 0.2")
    assert "normal" in rise[1]
    assert rise_ends[1].startswith("rise: over after 1 steps (0.5 epochs): all keys are real")
    assert chance[0] == 4  # three lines in a row whose keys are real
    assert "since step 2, and a guess has log(K + 1) = 3.497" in chance[1]
    lines = capsys.readouterr().out.splitlines()
    assert [lines.count(words) for _, words in said(tmp_path)] == [1, 1, 1]
    assert lines[-1] == "chance: still holds after 4 steps (2 epochs)"


def test_a_weight_decay_that_empties_the_network_is_a_collapse(pictures, tmp_path):  # noqa: F811
    # The weights go to zero faster than the head's bias, which is then all that an embedding is.
    config = small_config(pictures, weight_decay=30.0, lr=0.03, momentum=0.0, epochs=8)
    train(config, image_folder(pictures / "train"), tmp_path, quiet=True)
    ((step, words),) = said(tmp_path, "collapse")
    assert step < 16
    assert words.startswith("collapse: the embeddings of all images are one since step")
    assert read_log(tmp_path)[-1]["effective_rank"] < 1.1


def test_a_run_of_the_same_images_that_learns_has_neither(pictures, tmp_path):  # noqa: F811
    images = image_folder(pictures / "train")
    train(
        small_config(pictures, epochs=6, lr=0.01, mlp=True, tau=0.5), images, tmp_path, quiet=True
    )
    assert not said(tmp_path, "collapse")
    assert not said(tmp_path, "not finite")
    assert not said(tmp_path, "starved")


class Slow(ImageList):
    """Images on a slow disk."""

    def data(self, index):
        time.sleep(0.03)
        return super().data(index)


def test_images_that_come_slowly_starve_the_device(pictures, tmp_path):  # noqa: F811
    images = image_folder(pictures / "train")
    slow = Slow(images.root, images.paths, images.labels, images.classes)
    train(small_config(pictures, epochs=2), slow, tmp_path, quiet=True)
    ((step, words),) = said(tmp_path, "starved")
    assert step == 3
    assert "% of the time the device waits for images" in words
    assert "raise --workers" in words
    assert all(line["data_wait"] > 25 for line in read_log(tmp_path))


def test_a_rate_far_too_high_ends_in_no_number_and_the_log_says_so(pictures, tmp_path):  # noqa: F811
    config = small_config(pictures, lr=1e12, epochs=8)
    with pytest.raises(UserError, match="loss is not finite at step"):
        train(config, image_folder(pictures / "train"), tmp_path, quiet=True)
    ((step, words),) = said(tmp_path, "not finite")
    assert words.startswith(f"not finite: the loss of step {step} is no number")
    assert step > 1
    assert "loss" not in read_log(tmp_path)[-1]
    with pytest.raises(UserError, match="loss is not finite at step"):  # the log is cut back
        go_on(config, image_folder(pictures / "train"), tmp_path)
    assert len(said(tmp_path, "not finite")) == 1


# The numbers of MoCo v1's Figure A.1 without shuffling, (pretext accuracy, kNN) every few epochs.
LEAKING = [(60, 15), (95, 22), (99.5, 28), (99.95, 27.8), (99.95, 26), (99.96, 25), (99.96, 23)]


def hear(judge, votes, lines=4):
    """Feed a judge with votes and the lines between them; return what it said."""
    judge.hear({"step": 0, "knn_top1": votes[0][1]} if votes[0][1] else {"step": 0})
    heard = []
    step = 0
    for top1, knn in votes:
        for _ in range(lines):
            step += 10
            line = {"step": step, "epoch": step / 100, "top1": top1, "loss": 5.0}
            heard += [(step, words) for words in judge.hear(line | {"chance_loss": 11.1})]
        if knn is not None:
            heard += [(step, words) for words in judge.hear({"step": step, "knn_top1": knn})]
    return heard


def test_a_solved_task_with_a_falling_vote_is_a_leak_or_weak_augmentation():
    ((step, words),) = hear(Judge(), LEAKING)
    assert step == 230  # the third line after the vote that was two points below the best
    assert "99.96% of queries find their key since step 210" in words
    assert "the kNN vote fell from 28.0 to 26.0%" in words
    assert "--leak-meter" in words
    judge = Judge()
    judge.hear({"step": 0, "leak_shuffled": 90.0, "leak_apart": 20.0})
    ((_, words),) = hear(judge, LEAKING)
    assert "The leak meter finds 90.0% of keys encoded as this run does it and 20.0%" in words
    better = [*LEAKING[:6], (97, 30), (97, 31)]
    assert [words[:15] for _, words in hear(Judge(), better)] == [
        "leak: 99.96% of",
        "leak: over afte",
    ]


def test_a_solved_task_whose_vote_rises_is_none_and_without_votes_it_may_be_one():
    assert not hear(Judge(), [(99.95, 20), (99.95, 25), (99.95, 24.5), (99.96, 30)])
    assert not hear(Judge(), [(96, 28), (97, 20)])
    ((_, words),) = hear(Judge(), [(99.95, None)])
    assert "no kNN vote says whether the features get worse (--knn-dir)" in words


@pytest.mark.parametrize("verdict", VERDICTS)
def test_one_line_is_noise_where_a_run_has_many(verdict):
    assert verdict.patience == (1 if verdict.name in {"rise", "not finite"} else 3)


def test_a_verdict_that_comes_and_goes_says_so_each_time():
    judge = Judge()
    line = {"chance_loss": 8.0, "batch_top1": 1.0, "queue_random": 0.0}
    losses = [8.0] * 5 + [7.9, 7.0] + [8.0] * 3 + [7.0] * 5 + [8.0] * 3
    heard = []
    for step, loss in enumerate(losses, 1):
        heard += [(step, w[:25]) for w in judge.hear(line | {"step": step, "loss": loss})]
    assert heard == [
        (3, "chance: the loss has been"),
        (13, "chance: over after 10 ste"),  # one line at 7.0 was not enough
        (18, "chance: the loss has been"),
    ]


def test_the_first_line_of_a_short_queue_is_no_verdict(pictures, tmp_path):  # noqa: F811
    config = replace(small_config(pictures, epochs=1), print_freq=10)
    train(config, image_folder(pictures / "train"), tmp_path, quiet=True)
    assert not said(tmp_path)
