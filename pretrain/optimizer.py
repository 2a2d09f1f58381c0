"""SGD as MoCo uses it, and LARS for SimCLR's large batches."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import PretrainConfig


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a run.

    The reference hands f_k's parameters over too: they have no gradient and stay untouched, and
    other people's tools find the indices that they expect in the optimizer's state.
    """
    if config.optimizer == "lars":
        return Lars(model.parameters(), config.lr, config.momentum, config.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rates (arXiv:1708.03888), as SimCLR uses them (arXiv:2002.05709).

    Each weight moves by its share of its own norm: g <- eta |w| / |g + wd w| (g + wd w). Biases and
    batch norm, the tensors of one dimension, have neither that nor weight decay.

    Args:
        parameters: what is trained.
        lr: learning rate.
        momentum: of the steps, learning rate not included.
        weight_decay: wd.
        eta: trust coefficient.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        eta: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step along the gradients."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for adapted in (True, False):
                tensors: list[Tensor] = [p for p in trained if (p.ndim > 1) == adapted]
                if tensors:
                    self._move(tensors, group, adapted=adapted)

    def _move(self, tensors: list[Tensor], group: dict[str, Any], *, adapted: bool) -> None:
        steps: list[Tensor] = [p.grad for p in tensors]  # type: ignore[misc]
        if adapted:
            steps = list(torch._foreach_add(steps, tensors, alpha=group["weight_decay"]))
            weights, norms = torch._foreach_norm(tensors), torch._foreach_norm(steps)
            trust = group["eta"] * torch.stack(weights) / torch.stack(norms)
            # A weight or a step of length zero has no share to move by: it moves as it is.
            trust = torch.where(trust.isfinite() & (trust > 0), trust, 1.0)
            steps = list(torch._foreach_mul(steps, list(trust.unbind())))
        for p in tensors:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in tensors]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, steps)
        torch._foreach_add_(tensors, buffers, alpha=-group["lr"])
