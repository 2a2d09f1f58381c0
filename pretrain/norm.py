"""Batch norm in groups: what several processes compute, inside one.

Shapes:
    N: images in a batch
    C: channels
    G: groups; each one's statistics come from its own N / G images

MoCo needs queries and keys whose batch statistics come from different sub-batches (v1, Sec. 3.3,
"Shuffling BN"), or the network tells the positive by them. The papers get that from 8 GPUs with a
batch norm each; here a batch is cut into G runs of images, as if each were a process's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from convert.errors import UserError

MIN_GROUP = 8  # images; below it a group's statistics are mostly noise


class SplitBatchNorm(nn.BatchNorm2d):
    """A `BatchNorm2d` that normalises each of G consecutive parts of a batch by itself.

    The running statistics move towards the mean of the groups' (the reference saves those of its
    first process). In evaluation it is an ordinary batch norm, and its state dict is one.

    Args:
        channels: C.
        groups: G.
    """

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__(channels)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (N, C, H, W).

        Raises:
            ValueError: N is not a multiple of G.
        """
        if not self.training or self.groups == 1:
            return super().forward(x)
        if len(x) % self.groups:
            raise ValueError(f"{len(x)} images cannot be cut into {self.groups} groups")
        assert self.running_mean is not None
        assert self.running_var is not None
        means = self.running_mean.new_zeros(self.groups, self.num_features)
        variances = torch.zeros_like(means)
        parts = [
            # With a momentum of 1 the statistics asked for are the group's own.
            functional.batch_norm(part, mean, var, self.weight, self.bias, True, 1.0, self.eps)
            for part, mean, var in zip(x.chunk(self.groups), means, variances, strict=True)
        ]
        with torch.no_grad():
            assert self.momentum is not None
            self.running_mean.lerp_(means.mean(dim=0), self.momentum)
            self.running_var.lerp_(variances.mean(dim=0), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return torch.cat(parts)


def choose_groups(batch_size: int, wanted: int, *, leak: bool = False) -> int:
    """Choose into how many groups one process cuts a batch.

    Args:
        batch_size: N.
        wanted: the most groups; the papers train on 8 GPUs.
        leak: allow a single group, where shuffling hides nothing.

    Returns:
        The largest G up to `wanted` that divides N and leaves at least 8 images a group.

    Raises:
        UserError: only one group would be left, and `leak` was not asked for.
    """
    fitting = [
        groups
        for groups in range(1, wanted + 1)
        if batch_size % groups == 0 and batch_size // groups >= MIN_GROUP
    ]
    groups = max(fitting, default=1)
    if groups == 1 and not leak:
        raise UserError(
            f"batch of {batch_size}: {wanted} batch norm groups of {MIN_GROUP} images or more do "
            f"not fit, and with one group the network can tell positives by their statistics; "
            f"want a multiple of {2 * MIN_GROUP} and 2 groups or more, or --leak to do it anyway"
        )
    return groups
