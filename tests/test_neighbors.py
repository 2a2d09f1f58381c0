import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convert.errors import UserError
from pretrain import monitor
from tests import reference
from transfer.classification import neighbors
from transfer.classification.features import Features
from transfer.classification.neighbors import KnnConfig, knn_accuracies, largest, nearest, vote


def drawn(count, seed, classes=5, width=16):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(count, width, generator=generator)
    return Features(centres[labels] + 1.5 * noise, labels)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_the_vote_equals_the_slow_reference(temperature):
    bank, queries = drawn(120, 1), drawn(60, 2)
    found = knn_accuracies(bank, queries, (1, 7, 50), temperature, 5)
    for k in (1, 7, 50):
        slow = reference.knn_top1(
            bank.values, bank.labels, queries.values, queries.labels, k, temperature
        )
        assert found[f"knn{k}/top1"] == pytest.approx(slow)
        assert 20 < slow < 100


def test_the_vote_equals_the_monitors():
    bank, queries = drawn(400, 3), drawn(200, 4)
    for k in (10, 200):
        watched = monitor.knn_top1(
            bank.values, bank.labels, queries.values, queries.labels, k=k, tau=0.1, num_classes=5
        )
        assert knn_accuracies(bank, queries, (k,), 0.1, 5) == {f"knn{k}/top1": watched}


# Images of the bank at a time: 1, 7, 64, 119, 1000 of 120.
@pytest.mark.parametrize("at_once", [1, 7, 64, 119, 1000])
@pytest.mark.parametrize("queries_at_once", [8, 30, 512])
def test_streaming_over_the_bank_finds_the_same_neighbors(at_once, queries_at_once, monkeypatch):
    monkeypatch.setattr(neighbors, "QUERIES_AT_ONCE", queries_at_once)
    bank, queries = drawn(120, 5).values, drawn(30, 6).values
    memory_mib = (at_once + 0.5) * 4 * queries_at_once / 2**20
    cosines, places = nearest(bank, queries, 20, memory_mib)
    units = [torch.nn.functional.normalize(x, dim=1) for x in (queries, bank)]
    expected = (units[0] @ units[1].T).topk(20, dim=1)
    assert torch.equal(places, expected.indices)
    torch.testing.assert_close(cosines, expected.values)


@pytest.mark.parametrize(("columns", "k"), [(1000, 3), (1017, 15), (64, 1), (500, 40), (7, 7)])
def test_the_largest_of_each_row_are_topks(columns, k):
    values = torch.randn(20, columns, generator=torch.Generator().manual_seed(columns))
    found, places = largest(values, k)
    expected = values.topk(k, dim=1)
    assert torch.equal(found, expected.values)
    assert torch.equal(places, expected.indices)
    # Wherever the largest stand: all in one group, or among the columns that fill none.
    for far in (values.sort(dim=1).values, values.sort(dim=1, descending=True).values):
        assert torch.equal(largest(far, k)[0], far.topk(k, dim=1).values)


def test_the_similarities_held_stay_within_the_setting():
    bank, queries = torch.randn(20_000, 8), torch.randn(600, 8)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            done = func(*args, **(kwargs or {}))
            for tensor in done if isinstance(done, tuple | list) else [done]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return done

    with Watch():
        nearest(bank, queries, 10, memory_mib=2)
    assert 1.9 * 2**20 < largest <= 2 * 2**20  # all at once would be 46 MiB


def test_perfect_features_give_100():
    labels = torch.arange(10).repeat(20)
    perfect = Features(torch.eye(10)[labels] * 3.0, labels)
    assert set(knn_accuracies(perfect, perfect, (1, 10, 100, 200), 0.07, 10).values()) == {100.0}


def test_a_feature_that_says_nothing_gives_chance():
    bank, queries = drawn(1000, 7), drawn(1000, 8)
    noise = torch.Generator().manual_seed(0)
    silent = [Features(torch.randn(1000, 16, generator=noise), x.labels) for x in (bank, queries)]
    assert abs(knn_accuracies(*silent, (50,), 0.07, 5)["knn50/top1"] - 20) < 5


def test_a_nearer_neighbor_outweighs_several_far_ones_only_at_a_low_temperature():
    cosines, labels = torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[0, 1, 1]])
    assert vote(cosines, labels, 3, 0.1, 2).item() == 0
    assert vote(cosines, labels, 3, 10.0, 2).item() == 1
    swapped = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[1, 0, 0]])
    assert vote(*swapped, 3, 1e-4, 2).item() == 1  # where exp(0.9 / 1e-4) overflows a float


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"k": (10, 0)}, "k is 0, want at least 1"),
        ({"k": ()}, "k is empty"),
        ({"memory_mib": 0}, "memory_mib is 0, want at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0, want more than 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seeds": 0}, "seeds is 0, want at least 1"),
        ({"image_size": 0}, "image_size is 0"),
        ({"stage": "res6"}, "stage is 'res6', want one of res2, res3, res4, res5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(keys, line):
    with pytest.raises(UserError, match=line):
        KnnConfig(**keys)
