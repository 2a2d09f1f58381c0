"""The obvious slow versions that the fast ones are held against."""

import math

import torch
from torch import Tensor
from torch.func import functional_call
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


class AlgorithmOne:
    """Algorithm 1 of arXiv:1911.05722 as it is printed, one group, one key, one tensor at a time.

    Batch norm is a group's, SGD is done by hand, f_k moved after the step.

    Args:
        f_q, f_k: networks with plain batch norms.
        queue: (C, K).
        groups: into which the batch is cut, as if each were a process's.
    """

    def __init__(self, f_q, f_k, queue, *, groups, m, tau, lr, momentum, weight_decay):
        self.f_q, self.f_k, self.queue = f_q, f_k, [column.clone() for column in queue.T]
        self.groups, self.m, self.tau = groups, m, tau
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.velocity: dict[str, Tensor] = {}

    def encode(self, f, images: Tensor) -> Tensor:
        """Encode each group by itself; the running statistics become the mean of the groups'."""
        found, after = [], []
        for group in images.chunk(self.groups):
            buffers = {name: b.clone() for name, b in f.named_buffers()}
            found += functional.normalize(functional_call(f, buffers, (group,)), dim=1)
            after.append(buffers)
        for name, buffer in f.named_buffers():
            buffer.copy_(sum(buffers[name] for buffers in after) / self.groups)
        return torch.stack(found)

    def step(self, x_q: Tensor, x_k: Tensor, shuffle: Tensor) -> float:
        q = self.encode(self.f_q, x_q)
        with torch.no_grad():
            shuffled = self.encode(self.f_k, torch.stack([x_k[i] for i in shuffle]))
        k = [torch.empty(0)] * len(x_k)
        for place, image in enumerate(shuffle.tolist()):
            k[image] = shuffled[place]
        loss = torch.zeros(())
        for query, key in zip(q, k, strict=True):
            logits = [query @ key, *(query @ negative for negative in self.queue)]
            logits = torch.stack(logits) / self.tau
            loss = loss - (logits[0] - logits.logsumexp(dim=0)) / len(q)
        self.f_q.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, theta in self.f_q.named_parameters():
                gradient = theta.grad + self.weight_decay * theta
                last = self.velocity.get(name)
                velocity = gradient if last is None else self.momentum * last + gradient
                self.velocity[name] = velocity
                theta -= self.lr * velocity
            theta_q = dict(self.f_q.named_parameters())
            for name, theta in self.f_k.named_parameters():
                theta.copy_(self.m * theta + (1 - self.m) * theta_q[name])
        self.queue = [*self.queue[len(k) :], *k]  # the oldest leave
        return float(loss.detach())


def nt_xent(first: Tensor, second: Tensor, tau: float) -> float:
    """SimCLR's loss, one view at a time (arXiv:2002.05709, Eq. (1))."""
    z, count, total = [*first, *second], len(first), 0.0
    for i in range(2 * count):
        positive = math.exp(float(z[i] @ z[(i + count) % (2 * count)]) / tau)
        others = sum(math.exp(float(z[i] @ z[j]) / tau) for j in range(2 * count) if j != i)
        total += -math.log(positive / others)
    return total / (2 * count)
