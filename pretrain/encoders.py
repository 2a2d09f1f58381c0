"""Encoders: a ResNet whose classifier is the method's head."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from convert.resnets import IMAGENET_STEM, build_network
from pretrain.norm import GlobalBatchNorm, SplitBatchNorm


class Conv3x3(nn.Conv2d):
    """A padded 3x3 convolution that does not multiply padding where it has a single position.

    The last stage of a ResNet at 32 pixels has one: eight of nine weights meet only zeros there. A
    step of a ResNet-18 takes a tenth less time without them in bf16, a sixth less in fp32.
    Elsewhere it is the ordinary one.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, C, H, W)."""
        height, width = input.shape[2:]
        if height > self.stride[0] or width > self.stride[1] or self.dilation != (1, 1):
            return super().forward(input)
        weight = self.weight[:, :, 1 : 1 + height, 1 : 1 + width]
        return functional.conv2d(input, weight, self.bias, self.stride, groups=self.groups)


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
        if type(module) is nn.Conv2d and module.kernel_size == (3, 3) and module.padding == (1, 1):
            module.__class__ = Conv3x3
    last_norm = "bn3" if "layer1.0.bn3.weight" in encoder.state_dict() else "bn2"
    for name, parameter in encoder.named_parameters():
        if name.startswith("layer") and name.endswith(f".{last_norm}.weight"):
            nn.init.constant_(parameter, residual_gamma)
    if mlp:
        assert isinstance(encoder.fc, nn.Linear)
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    return encoder
