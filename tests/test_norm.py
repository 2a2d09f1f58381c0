import pytest
import torch
from torch import nn

from convert.errors import UserError
from pretrain.norm import GlobalBatchNorm, SplitBatchNorm, choose_groups
from tests.reference import batch_norm_per_process


def test_each_group_is_normalised_as_a_process_would():
    torch.manual_seed(0)
    norm = SplitBatchNorm(6, groups=4).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(16, 6, 5, 5, dtype=torch.double) * torch.arange(1, 17).view(-1, 1, 1, 1)
    want = batch_norm_per_process(list(x.chunk(4)), norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), want)


def test_groups_do_not_see_each_other():
    norm = SplitBatchNorm(3, groups=2)
    x = torch.randn(8, 3, 4, 4)
    before = norm(x)[:4]
    x[4:] += 100
    assert torch.equal(norm(x)[:4], before)


def test_running_statistics_are_the_mean_over_groups():
    norm = SplitBatchNorm(3, groups=2)
    x = torch.randn(8, 3, 4, 4) + 5
    norm(x)
    singles = [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    for single, part in zip(singles, x.chunk(2), strict=True):
        single(part)
    for name in ("running_mean", "running_var"):
        want = torch.stack([getattr(single, name) for single in singles]).mean(dim=0)
        torch.testing.assert_close(getattr(norm, name), want)
    assert int(norm.num_batches_tracked) == 1


def test_one_group_is_plain_batch_norm_and_so_is_evaluation():
    x = torch.randn(8, 3, 4, 4)
    plain, split = nn.BatchNorm2d(3), SplitBatchNorm(3, groups=1)
    assert torch.equal(plain(x), split(x))
    split.groups = 4
    assert torch.equal(plain.eval()(x), split.eval()(x))
    assert plain.state_dict().keys() == split.state_dict().keys()


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="10 images cannot be cut into 4 groups"):
        SplitBatchNorm(3, groups=4)(torch.randn(10, 3, 4, 4))


@pytest.mark.parametrize(
    ("batch", "groups"), [(256, 8), (64, 8), (32, 4), (48, 6), (20, 2), (16, 2)]
)
def test_one_process_has_8_groups_or_as_many_as_keep_8_images(batch, groups):
    assert choose_groups(batch) == groups


def test_several_processes_have_one_group_each():
    assert choose_groups(16, processes=4) == 4


@pytest.mark.parametrize(
    ("batch", "wanted", "processes", "line"),
    [
        (2, 4, 1, "batch of 2: is below its 4 batch norm groups"),
        (30, 4, 1, "batch of 30 on 1 process in 4 batch norm groups"),
        (30, 0, 4, "batch of 30 on 4 processes in 4 batch norm groups"),
        (32, 2, 4, "want groups that are a multiple of the processes"),
    ],
)
def test_groups_that_do_not_fit_batch_and_processes_are_refused(batch, wanted, processes, line):
    with pytest.raises(UserError, match=line):
        choose_groups(batch, wanted, processes=processes)


@pytest.mark.parametrize("batch", [1, 8, 15, 17])
def test_a_single_group_needs_leak_where_it_leaks(batch):
    with pytest.raises(UserError, match="--leak"):
        choose_groups(batch)
    assert choose_groups(batch, leak=True) == 1
    assert choose_groups(batch, leaks=False) == 1
    with pytest.raises(UserError, match="--leak"):
        choose_groups(64, 1)


def test_on_one_process_a_norm_of_the_whole_batch_is_a_plain_one():
    x = torch.randn(8, 3, 4, 4)
    plain, whole = nn.BatchNorm2d(3), GlobalBatchNorm(3)
    assert torch.equal(plain(x), whole(x))
    assert torch.equal(plain.running_var, whole.running_var)
