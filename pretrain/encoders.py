"""Encoders: a ResNet whose classifier is the method's head."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convert.resnets import IMAGENET_STEM, build_network
from pretrain.norm import GlobalBatchNorm, SplitBatchNorm

FEW_ROWS = 2048  # positions of a batch up to which a 1x1 convolution is faster as a product


class Conv3x3(nn.Conv2d):
    """A padded 3x3 convolution that does not multiply padding where it has few positions.

    The last stages of a ResNet at 32 pixels have 2 x 2 positions and one: five and eight of nine
    weights meet only zeros there. All outputs are one product with the weights that are left.
    Elsewhere it is the ordinary one.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, C, H, W)."""
        height, width = input.shape[2:]
        if max(height, width) > 2 or self.dilation != (1, 1) or self.groups > 1:
            return super().forward(input)
        # An output at (i, j) meets its inputs from the weights' row 1 - i and column 1 - j on.
        rows, columns = range(0, height, self.stride[0]), range(0, width, self.stride[1])
        met = [
            self.weight[:, :, 1 - i :, 1 - j :][..., :height, :width] for i in rows for j in columns
        ]
        weights = torch.cat([part.permute(0, 2, 3, 1).flatten(1) for part in met])
        y: Tensor = functional.linear(input.permute(0, 2, 3, 1).flatten(1), weights)
        y = y.unflatten(1, (len(rows), len(columns), -1)).permute(0, 3, 1, 2)
        return y if self.bias is None else y + self.bias[:, None, None]


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution that is a matrix product on a CPU where a batch has few positions.

    The gradient of a last stage's weights takes half the time so. Elsewhere it is the ordinary one.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, C, H, W)."""
        x = input[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        few = input.is_cpu and x.shape[:3].numel() <= FEW_ROWS
        if not few or self.groups > 1 or not input.is_contiguous(memory_format=torch.channels_last):
            return super().forward(input)
        y: Tensor = functional.linear(x.flatten(0, 2), self.weight.flatten(1), self.bias)
        y = y.unflatten(0, x.shape[:3])
        return y.permute(0, 3, 1, 2)


FASTER: dict[Any, type[nn.Conv2d]] = {
    ((3, 3), (1, 1)): Conv3x3,
    ((1, 1), (0, 0)): Conv1x1,
}  # by kernel and padding

WHOLE_BATCH = 0  # as `bn_groups`: one group over all processes


def build_encoder(
    arch: str,
    dim: int,
    *,
    mlp: bool,
    bn_groups: int,
    residual_gamma: float = 1.0,
    stem: str = IMAGENET_STEM,
) -> nn.Module:
    """Build f_q or f_k: (N, 3, H, W) images -> (N, dim) embeddings, not normalised.

    Args:
        arch: a name of `convert.resnets.ARCHS`.
        dim: C, length of an embedding.
        mlp: v2's head, two layers with a ReLU between (arXiv:2003.04297, Sec. 2), instead of one.
        bn_groups: groups that every batch norm makes of the images it is given; `WHOLE_BATCH`: one
            over all processes.
        residual_gamma: what the last batch norm of every block starts to multiply by; 1 is
            torchvision's, 0 starts every block as the identity (arXiv:1706.02677, Sec. 5.1).
        stem: imagenet or cifar, see `convert.resnets.build_network`.

    Raises:
        UserError: the name is not one of a ResNet.
    """
    norm = (
        GlobalBatchNorm if bn_groups == WHOLE_BATCH else partial(SplitBatchNorm, groups=bn_groups)
    )
    encoder: nn.Module = build_network(arch, num_classes=dim, stem=stem, norm_layer=norm)
    for module in encoder.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = FASTER.get((module.kernel_size, module.padding), nn.Conv2d)
    last_norm = "bn3" if "layer1.0.bn3.weight" in encoder.state_dict() else "bn2"
    for name, parameter in encoder.named_parameters():
        if name.startswith("layer") and name.endswith(f".{last_norm}.weight"):
            nn.init.constant_(parameter, residual_gamma)
    if mlp:
        assert isinstance(encoder.fc, nn.Linear)
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    return encoder
