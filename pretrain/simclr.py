"""SimCLR: the two views of a batch against each other (arXiv:2002.05709).

Shapes:
    N: images of a step, on all processes; n: on this one
    C: length of an embedding (`dim`)
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pretrain import distributed
from pretrain.contrast import Batch, Contrast, Scored


class SimCLR(Contrast):
    """One encoder; every view's positive is the image's other view, all else are negatives.

    Batch norm's statistics are those of the whole batch on all processes, so that no process's tell
    the positive (Sec. 2.2). Its head is the two-layer one (Sec. 2.1), `mlp: true` in a recipe.
    """

    holds_keys: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    leaks: ClassVar[bool] = False
    whole_batch_norm: ClassVar[bool] = True

    @property
    def negatives(self) -> int:
        """Return the number of negatives: both views of all other images."""
        return 2 * self.config.batch_size - 2

    def contrast(self, batch: Batch) -> Iterator[Scored]:
        """Score both views of this process's images against those of all (Algorithm 1)."""
        z = self.encode(self.encoder_q, torch.cat(batch.views))  # (2n, C)
        others = torch.cat([distributed.gather(view) for view in z.chunk(2)])  # (2N, C)
        count = len(batch.images)
        own = torch.arange(count, device=self.device)[batch.own]
        places = torch.cat([own, own + count])  # where this process's views lie among all
        logits = nt_xent_logits(z, others, places, self.config.tau)
        positives = (places + count) % (2 * count)
        loss = functional.cross_entropy(logits, positives)
        top1 = (logits.detach().argmax(dim=1) == positives).float().mean()
        first, second = z.detach().chunk(2)
        yield Scored(loss, torch.stack([top1, top1]), (first, second))


def nt_xent_logits(z: Tensor, others: Tensor, places: Tensor, tau: float) -> Tensor:
    """Score views against every other one (NT-Xent: Eq. (1) of arXiv:2002.05709).

    Args:
        z: (2n, C) views of unit length.
        others: (2N, C) all views, the first ones of all images before the second ones.
        places: (2n,) where z's rows lie among them.
        tau: temperature.

    Returns:
        (2n, 2N) logits, minus infinity where a view meets itself.
    """
    return (z @ others.T / tau).scatter(1, places[:, None], -torch.inf)
