import copy

import pytest
import torch
from torch import nn

from pretrain.encoders import FEW_ROWS, Conv1x1, Conv3x3, build_encoder


def as_torchvision_has_it(module):
    """A copy whose convolutions are ordinary ones."""
    plain = copy.deepcopy(module)
    for part in plain.modules():
        if type(part) in (Conv1x1, Conv3x3):
            part.__class__ = nn.Conv2d
    return plain


def outcome(module, x):
    """The output, the gradient of the input, those of the weights."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("side", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_padding_that_is_not_multiplied_is_not_missed(side, stride, groups):
    torch.manual_seed(0)
    conv = Conv3x3(4, 6, 3, stride, 1, groups=groups, bias=False).double()
    x = torch.randn(3, 4, side, side, dtype=torch.float64)
    both = zip(outcome(conv, x), outcome(as_torchvision_has_it(conv), x), strict=True)
    for ours, theirs in both:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [1, 4, 5, 40])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_1x1_convolution_by_a_product_is_the_ordinary_one(side, stride, layout):
    torch.manual_seed(0)
    conv = Conv1x1(4, 6, 1, stride, bias=False).double().to(memory_format=layout)
    x = torch.randn(3, 4, side, side, dtype=torch.float64).to(memory_format=layout)
    assert 3 * 5 * 5 < FEW_ROWS < 3 * 40 * 40  # both ways are walked
    both = zip(outcome(conv, x), outcome(as_torchvision_has_it(conv), x), strict=True)
    for ours, theirs in both:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        assert ours.is_contiguous(memory_format=layout) or ours.ndim != 4 or side < 4


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_an_encoder_at_32_pixels_is_torchvisions(arch):
    torch.manual_seed(0)
    encoder = build_encoder(arch, 16, mlp=True, bn_groups=2).double()
    plain = as_torchvision_has_it(encoder)
    assert sum(type(part) is Conv3x3 for part in encoder.modules()) >= 16
    assert encoder.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    for ours, theirs in zip(outcome(encoder, x), outcome(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
