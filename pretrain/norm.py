"""Batch norm in groups: what several processes compute, inside one; and over all of them.

Shapes:
    N: images in a batch
    C: channels
    G: groups; each one's statistics come from its own N / G images

MoCo needs queries and keys whose batch statistics come from different sub-batches (v1, Sec. 3.3,
"Shuffling BN"), or the network tells the positive by them. The papers get that from 8 GPUs with a
batch norm each; here a batch is cut into G runs of images, as if each were a process's. SimCLR
wants the opposite: statistics of the whole batch, whatever the processes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from convert.errors import UserError
from pretrain import distributed

MIN_GROUP = 8  # images; below it a group's statistics are mostly noise
PAPERS_GROUPS = 8  # the papers train on 8 GPUs


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
        _move(self, means.mean(dim=0), variances.mean(dim=0))
        return torch.cat(parts)


class GlobalBatchNorm(nn.BatchNorm2d):
    """A `BatchNorm2d` whose batch is that of all processes, whatever their shares; on CPUs too.

    (`nn.SyncBatchNorm` refuses tensors of a CPU.) On one process it is an ordinary batch norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (N, C, H, W), by the statistics of all processes' images."""
        if not self.training or distributed.size() == 1:
            return super().forward(x)
        y = x.float() if x.dtype is torch.bfloat16 else x
        own = y.new_tensor([y.numel() // y.shape[1]])
        sums = distributed.add_up(torch.cat([y.sum(dim=(0, 2, 3)), own]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = y - mean[:, None, None]
        variance = distributed.add_up(centred.square().sum(dim=(0, 2, 3))) / count
        _move(self, mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronise_norms(network: nn.Module, device: torch.device) -> nn.Module:
    """Let every batch norm take its statistics from all processes' images."""
    if device.type == "cuda":
        synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return synchronised
    for name, child in network.named_children():
        if type(child) is nn.BatchNorm2d:
            norm = GlobalBatchNorm(child.num_features)
            norm.load_state_dict(child.state_dict())
            norm.eps, norm.momentum = child.eps, child.momentum
            setattr(network, name, norm)
        else:
            synchronise_norms(child, device)
    return network


def _move(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move a norm's running statistics towards a batch's."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance, norm.momentum)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)


class Statistics:
    """The running statistics of a network's batch norms, to read and set all at once.

    Args:
        network: whose; it stays on its device from here on.
    """

    def __init__(self, network: nn.Module) -> None:
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.tensors = [t for n in norms for t in (n.running_mean, n.running_var) if t is not None]
        self.counters = [n.num_batches_tracked for n in norms if n.num_batches_tracked is not None]
        self._sizes = [t.numel() for t in self.tensors]

    def read(self) -> Tensor:
        """Return a copy of all of them, flat."""
        return torch.cat(self.tensors)

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Set all of them to what `read` gave."""
        torch._foreach_copy_(self.tensors, list(flat.split(self._sizes)))

    def count_back(self, batches: int) -> None:
        """Take batches off the counters."""
        torch._foreach_sub_(self.counters, batches)


def choose_groups(
    batch_size: int, wanted: int = 0, *, processes: int = 1, leak: bool = False, leaks: bool = True
) -> int:
    """Choose into how many batch norm groups a step's images are cut, over all processes.

    Args:
        batch_size: images of a step, on all processes.
        wanted: groups asked for; 0: the default.
        processes: W; each has the same number of groups.
        leak: allow a single group where it leaks.
        leaks: whether a single group shows the network which key is the positive.

    Returns:
        What was asked for. By default one group a process; on a single process the largest number
        up to 8, the papers', that divides the batch and leaves 8 images a group.

    Raises:
        UserError: groups and batch do not fit each other or the processes, or one group is left
            where it leaks and `leak` was not asked for.
    """
    groups = wanted or (processes if processes > 1 else _fitting(batch_size))
    if groups > batch_size:
        raise UserError(f"batch of {batch_size}: is below its {groups} batch norm groups")
    shared = groups == 1  # one batch norm over all processes
    if batch_size % processes or batch_size % groups or (groups % processes and not shared):
        raise UserError(
            f"batch of {batch_size} on {of_processes(processes)} in {groups} batch norm groups: "
            "want groups that are a multiple of the processes, and a batch that is one of them"
        )
    if groups == 1 and leaks and not leak:
        raise UserError(
            f"batch of {batch_size}: is one batch norm group, so the network can tell positives by "
            f"their statistics; want a multiple of {2 * MIN_GROUP}, 2 groups or more with "
            "--bn-groups, or --leak to do it anyway"
        )
    return groups


def of_processes(count: int) -> str:
    """Say a number of processes."""
    return "1 process" if count == 1 else f"{count} processes"


def _fitting(batch_size: int) -> int:
    fits = (g for g in range(1, PAPERS_GROUPS + 1) if batch_size % g == 0)
    return max((g for g in fits if batch_size // g >= MIN_GROUP), default=1)


def statistics_of(networks: Iterable[nn.Module]) -> list[Tensor]:
    """List the running statistics of several networks."""
    return [tensor for network in networks for tensor in Statistics(network).tensors]
