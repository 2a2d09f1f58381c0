import pytest
import torch
from torch import nn

from convert.errors import UserError
from pretrain.norm import SplitBatchNorm, choose_groups
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
def test_groups_keep_8_images(batch, groups):
    assert choose_groups(batch, 8) == groups


@pytest.mark.parametrize("batch", [1, 8, 15, 17])
def test_a_single_group_needs_leak(batch):
    with pytest.raises(UserError, match="--leak"):
        choose_groups(batch, 8)
    assert choose_groups(batch, 8, leak=True) == 1
