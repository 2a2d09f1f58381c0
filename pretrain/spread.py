"""How embeddings lie on the unit sphere: together where they should, apart where they should.

Shapes:
    n: images; C: length of an embedding
"""

import torch
from torch import Tensor

AT_MOST = 1024  # images: pairs grow with the square, and more change no digit that is shown


def spread(q: Tensor, k: Tensor) -> dict[str, float]:
    """Measure the spread of a batch's queries, and how near each one is to its key.

    Args:
        q: (n, C) queries of unit length.
        k: (n, C) their positives.

    Returns:
        `alignment`, `uniformity` and `effective_rank`.
    """
    q, k = q[:AT_MOST].cpu().float(), k[:AT_MOST].cpu().float()
    return {
        "alignment": float(alignment(q, k)),
        "uniformity": float(uniformity(q)),
        "effective_rank": float(effective_rank(q)),
    }


def alignment(q: Tensor, k: Tensor) -> Tensor:
    """Return the mean squared distance of positives (arXiv:2005.10242, Eq. (1), alpha = 2).

    0 is perfect; two random embeddings are 2 apart.
    """
    return (q - k).square().sum(dim=1).mean()


def uniformity(x: Tensor) -> Tensor:
    """Return log E exp(-2 |x - y|^2) over pairs (arXiv:2005.10242, Eq. (2), t = 2).

    0 means that all embeddings are one; spread evenly over the sphere they have about -3.9.
    """
    return torch.pdist(x).square().mul(-2).exp().mean().log()


def effective_rank(x: Tensor) -> Tensor:
    """Return how many directions embeddings (n, C) use: exp of their singular values' entropy.

    Between 1 and the smaller of n and C (Roy and Vetterli, EUSIPCO 2007; as RankMe takes it,
    arXiv:2210.02885, Eq. (1)).
    """
    values = torch.linalg.svdvals(x)
    rank: Tensor = torch.special.entr(values / values.sum()).sum().exp()
    return rank
