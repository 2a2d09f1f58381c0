"""The obvious slow versions that the fast ones are held against."""

import math

import torch
from torch import Tensor
from torch.nn import functional


def info_nce(q: Tensor, k: Tensor, queue: Tensor, tau: float) -> Tensor:
    """Eq. (1) of arXiv:1911.05722, one query at a time; q, k (N, C), queue (C, K), unit length."""
    total = 0.0
    for i in range(len(q)):
        positive = math.exp(float(q[i] @ k[i]) / tau)
        negatives = sum(math.exp(float(q[i] @ queue[:, j]) / tau) for j in range(queue.shape[1]))
        total += -math.log(positive / (positive + negatives))
    return torch.tensor(total / len(q))


def batch_norm_per_process(parts: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """What processes with a batch norm each compute from their parts of a batch."""
    return torch.cat([functional.batch_norm(p, None, None, weight, bias, True) for p in parts])


def knn_top1(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int, tau: float
) -> float:
    """The weighted vote of InstDisc, one query and one neighbour at a time, in percent."""
    right = 0
    for query, truth in zip(queries, labels, strict=True):
        cosines = [float(functional.cosine_similarity(query, entry, dim=0)) for entry in bank]
        nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            label = int(bank_labels[i])
            votes[label] = votes.get(label, 0.0) + math.exp(cosines[i] / tau)
        right += max(votes, key=lambda label: votes[label]) == int(truth)
    return 100 * right / len(queries)
