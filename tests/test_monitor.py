import math

import pytest
import torch

from pretrain.monitor import Log, knn_top1, mean_of_last_tenth, read_log, verdict
from tests import reference


def clusters(count: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.eye(3, 8)
    return centres[labels] + spread * torch.randn(count, 8, generator=draw), labels


@pytest.mark.parametrize(("k", "tau"), [(1, 0.1), (5, 0.07), (20, 0.1), (60, 0.5)])
def test_the_vote_equals_the_slow_one(k, tau):
    bank, bank_labels = clusters(60, 0.8, 0)
    queries, labels = clusters(40, 0.8, 1)
    got = knn_top1(bank, bank_labels, queries, labels, k=k, tau=tau, num_classes=3)
    want = reference.knn_top1(bank, bank_labels, queries, labels, k, tau)
    assert got == pytest.approx(want)
    assert 34 < got < 100


def test_perfect_features_give_100_and_the_features_length_does_not_matter():
    bank, bank_labels = clusters(60, 0.01, 0)
    queries, labels = clusters(40, 0.01, 1)
    scale = torch.rand(40, 1) * 100
    top1 = knn_top1(bank, bank_labels, queries * scale, labels, k=10, num_classes=3)
    assert top1 == 100


def test_a_log_goes_on_after_the_step_that_was_saved(tmp_path):
    log = Log(tmp_path, 0)
    for step in (10, 20, 30):
        log.add(step=step, loss=1 / step)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # cut short by a kill
    Log(tmp_path, 20).add(step=30, loss=0.5)
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [
        (10, 0.1),
        (20, 0.05),
        (30, 0.5),
    ]


def test_the_verdict_holds_the_last_tenth_against_chance():
    lines = [{"step": i, "loss": 9.0} for i in range(18)] + [{"step": 18, "knn_top1": 3.0}]
    lines += [{"step": 19, "loss": 3.0}, {"step": 20, "loss": 4.0}]
    assert mean_of_last_tenth(lines, "loss") == 3.5
    assert "50% under chance, log(K + 1) = 6.93" in verdict(3.5, 1024, 50.0, 32)
    assert "over chance" in verdict(8.0, 1024, 50.0, 32)
    assert "50.0% of queries" in verdict(3.5, 1024, 50.0, 32)
    assert "chance 3.1%" in verdict(3.5, 1024, 50.0, 32)
    assert math.isnan(mean_of_last_tenth([], "loss"))
