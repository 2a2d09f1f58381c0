import math

import pytest
import torch

from convert.errors import UserError
from convert.progress import Progress
from transfer.classification.features import Features
from transfer.classification.heads import (
    Head,
    LinearConfig,
    Standardizer,
    cached_batches,
    one_thread,
    score,
    standardized,
    train_head,
)

CPU = torch.device("cpu")


def separable(count=300, classes=10, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    noise = 0.1 * torch.randn(count, width, generator=generator)
    return Features(torch.eye(classes, width)[labels] + noise, labels)


def train(config, features, val=None, seed=0, classes=10):
    head = Head.untrained(config, features.values.shape[1], classes, seed, CPU)
    with Progress(1, "linear", quiet=True) as progress:
        batches = cached_batches(features, config.batch_size, seed)
        train_head(head, batches, val or features, config, progress)
    return head


def test_a_head_on_separable_features_reaches_100():
    head = train(LinearConfig(lr=1.0, epochs=20, schedule=(15,)), separable(), separable(seed=1))
    assert score(head.fc, separable(seed=1)) == (100.0, 100.0)
    assert head.history[-1]["val_top1"] == 100.0
    assert head.history[-1]["loss"] < 0.1 < head.history[0]["loss"]


def test_the_head_starts_as_in_the_reference_and_only_it_is_optimised():
    head = Head.untrained(LinearConfig(), 2048, 1000, 0, CPU)
    assert head.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert not head.fc.bias.any()
    (group,) = head.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(head.fc.weight), id(head.fc.bias)]
    settings = [group[k] for k in ("lr", "momentum", "weight_decay", "nesterov", "dampening")]
    assert settings == [30.0, 0.9, 0.0, False, 0]
    other = Head.untrained(LinearConfig(), 2048, 1000, 1, CPU)
    assert not torch.equal(head.fc.weight, other.fc.weight)


def test_one_epoch_is_plain_sgd_with_momentum():
    features, config = separable(50), LinearConfig(lr=0.7, epochs=1, batch_size=20)
    head = train(config, features, seed=5)
    weight = Head.untrained(config, 12, 10, 5, CPU).fc.weight.detach().clone()
    bias, velocity_w, velocity_b = torch.zeros(10), torch.zeros(10, 12), torch.zeros(10)
    sizes = []
    for values, labels, _, _ in cached_batches(features, 20, 5)(0):
        error = (values @ weight.T + bias).softmax(1) - torch.eye(10)[labels]
        velocity_w = 0.9 * velocity_w + error.T @ values / len(labels)
        velocity_b = 0.9 * velocity_b + error.mean(0)
        weight, bias = weight - 0.7 * velocity_w, bias - 0.7 * velocity_b
        sizes.append(len(labels))
    assert sizes == [20, 20, 10]  # the short last batch is trained on too
    torch.testing.assert_close(head.fc.weight.detach(), weight)
    torch.testing.assert_close(head.fc.bias.detach(), bias)


def test_the_rate_falls_to_a_tenth_at_each_step_of_the_schedule():
    config = LinearConfig()
    rates = [config.lr_at(epoch) for epoch in (0, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    head = train(LinearConfig(lr=0.5, epochs=3, schedule=(1, 2)), separable())
    assert [entry["lr"] for entry in head.history] == pytest.approx([0.5, 0.05, 0.005])
    assert head.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


def test_every_epoch_visits_every_image_once_in_an_order_of_its_own():
    features = Features(torch.arange(10.0)[:, None], torch.arange(10))
    batches = cached_batches(features, 4, seed=1)
    first, again, second = ([batch.labels for batch in batches(e)] for e in (0, 0, 1))
    assert [len(part) for part in first] == [4, 4, 2]
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist()) == [*range(10)]
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_top5_counts_the_five_best_and_all_where_there_are_fewer():
    fc = torch.nn.Linear(6, 6, bias=False)
    fc.weight.data = torch.eye(6)
    ranked = torch.tensor([[6.0, 5, 4, 3, 2, 1]]).repeat(6, 1)
    top1, top5 = score(fc, Features(ranked, torch.arange(6)))
    assert (top1, top5) == (pytest.approx(100 / 6), pytest.approx(500 / 6))
    fc3 = torch.nn.Linear(6, 3)
    assert score(fc3, Features(ranked, torch.tensor([0, 1, 2, 0, 1, 2])))[1] == 100.0


def test_a_loss_that_is_no_number_stops_in_one_line():
    features = separable()
    features.values[7, 3] = math.inf
    with pytest.raises(
        UserError, match=r"the loss is nan in epoch 1, .*lr 30 is too high"
    ) as caught:
        train(LinearConfig(epochs=2), features)
    assert "\n" not in str(caught.value)


def test_standardized_features_have_mean_0_and_deviation_1_and_dead_ones_stay_finite():
    values = torch.randn(500, 4) * torch.tensor([1.0, 100.0, 0.01, 0.0]) + 7
    found = Standardizer.of(values)(values)
    torch.testing.assert_close(found.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.std(0)[:3], torch.ones(3), atol=1e-2, rtol=0)
    assert found.isfinite().all()


def test_standardized_training_does_not_depend_on_the_scale_of_the_features():
    config = LinearConfig(lr=0.1, epochs=3, batch_size=50)
    heads = []
    for scale in (1.0, 512.0):
        features = separable(200)
        scaled = Features(features.values * scale + scale, features.labels)
        standardizer = Standardizer.of(scaled.values)
        head = Head.untrained(config, 12, 10, 0, CPU)
        batches = standardized(cached_batches(scaled, 50, 0), standardizer)
        val = Features(standardizer(scaled.values), scaled.labels)
        with Progress(1, "linear", quiet=True) as progress:
            train_head(head, batches, val, config, progress)
        heads.append(head)
        folded = torch.nn.Linear(12, 10)
        folded.load_state_dict(standardizer.fold(head.fc.state_dict()))
        torch.testing.assert_close(folded(scaled.values), head.fc(val.values), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(heads[0].fc.weight, heads[1].fc.weight, atol=1e-3, rtol=1e-3)


def test_one_thread_is_for_a_while_only():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"features": "augmentd"}, "features is 'augmentd', want one of augmented, cached"),
        ({"epochs": 0}, "epochs is 0, want at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": -1.0}, "lr is -1.0, want at least 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"start_epoch": -1}, "start_epoch is -1"),
        ({"print_freq": 0}, "print_freq is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(keys, line):
    with pytest.raises(UserError, match=line):
        LinearConfig(**keys)
