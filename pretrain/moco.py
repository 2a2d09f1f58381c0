"""Momentum Contrast: two encoders, a queue of keys, a contrastive loss.

Shapes:
    N: images in a batch
    C: length of an embedding (`dim`)
    K: keys in the queue

Symbols are the papers': q and k are a query and its key, f_q and f_k the encoders, m the momentum
of f_k (arXiv:1911.05722, Eq. (2)), tau the temperature of the loss (Eq. (1)).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.encoders import build_encoder


class MoCo(nn.Module):
    """The query encoder, the key encoder and the queue (arXiv:1911.05722, Algorithm 1).

    Its state dict has the names and the order of the reference's: `queue`, `queue_ptr`,
    `encoder_q.*`, `encoder_k.*`.

    Args:
        arch: torchvision's name of a ResNet.
        dim: C.
        K: keys in the queue.
        m: momentum of the key encoder.
        tau: temperature.
        mlp: v2's head.
        bn_groups: groups of every batch norm, see `norm.py`.
        residual_gamma: weight of every block's branch at the start, see `encoders.py`.
        generator: draws the queue's first, random keys; the encoders draw from torch's own state.
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        arch: str,
        *,
        dim: int,
        K: int,
        m: float,
        tau: float,
        mlp: bool,
        bn_groups: int,
        residual_gamma: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.m = m
        self.tau = tau
        self.encoder_q, self.encoder_k = (
            build_encoder(
                arch,
                dim,
                mlp=mlp,
                bn_groups=bn_groups,
                residual_gamma=residual_gamma,
            )
            for _ in range(2)
        )
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        queue = torch.randn(dim, K, generator=generator)
        self.register_buffer("queue", functional.normalize(queue, dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor, shuffle: Tensor) -> tuple[Tensor, Tensor]:
        """Score queries against their keys and the queue, then enqueue the keys.

        Args:
            im_q: (N, 3, H, W) one view of each image.
            im_k: (N, 3, H, W) the other one.
            shuffle: (N,) permutation of the keys' batch, so that an image's query and key meet
                batch statistics of different groups.

        Returns:
            (N, 1 + K) logits, positives in column 0; and (N,) whether each query's own key is the
            nearest of this batch's. The queue's keys come from older encoders, which alone can tell
            them from a positive: only keys of one age show whether images are told apart.
        """
        q = functional.normalize(self.encoder_q(im_q).float(), dim=1)
        with torch.no_grad():
            self.update_key_encoder()
            k = self.encoder_k(im_k[shuffle]).float()
            k = functional.normalize(k, dim=1)[torch.argsort(shuffle)]
        logits = contrastive_logits(q, k, self.queue.clone(), self.tau)
        self.enqueue(k)
        own = (q.detach() @ k.T).argmax(dim=1) == torch.arange(len(q), device=q.device)
        return logits, own

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Move f_k towards f_q: theta_k <- m theta_k + (1 - m) theta_q, Eq. (2).

        Parameters only: batch norm's running statistics are each encoder's own.
        """
        theta_k: list[Tensor] = list(self.encoder_k.parameters())
        theta_q: list[Tensor] = list(self.encoder_q.parameters())
        torch._foreach_mul_(theta_k, self.m)
        torch._foreach_add_(theta_k, theta_q, alpha=1 - self.m)

    @torch.no_grad()
    def enqueue(self, k: Tensor) -> None:
        """Replace the oldest keys by these, (N, C), wrapping around the queue's end."""
        K = self.queue.shape[1]
        k = k[-K:]
        places = (self.queue_ptr + torch.arange(len(k), device=k.device)) % K
        self.queue[:, places] = k.T
        self.queue_ptr.copy_((self.queue_ptr + len(k)) % K)


def contrastive_logits(q: Tensor, k: Tensor, queue: Tensor, tau: float) -> Tensor:
    """Score each query against its own key and every queued one, Eq. (1).

    Args:
        q: (N, C) queries of unit length.
        k: (N, C) keys of the same images, unit length, no gradient.
        queue: (C, K) earlier keys, unit length, no gradient.
        tau: temperature, above zero.

    Returns:
        (N, 1 + K) logits with the positives in column 0.

    Raises:
        ValueError: the embeddings differ in length.
    """
    if not q.shape[1] == k.shape[1] == queue.shape[0]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, queue {tuple(queue.shape)}"
        raise ValueError(f"embeddings differ in length: {shapes}; want (N, C), (N, C), (C, K)")
    positive = (q * k).sum(dim=1, keepdim=True)
    return torch.cat([positive, q @ queue], dim=1) / tau


def contrastive_loss(logits: Tensor) -> Tensor:
    """Return the mean of -log softmax at column 0, Eq. (1): InfoNCE over (N, 1 + K) logits."""
    targets = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return functional.cross_entropy(logits, targets)
