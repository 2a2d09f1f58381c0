"""Momentum Contrast: two encoders and a queue of keys.

Shapes:
    N: images of a step, on all processes; n: on this one
    C: length of an embedding (`dim`)
    K: keys in the queue

Symbols are the papers': m is the momentum of the key encoder f_k (arXiv:1911.05722, Eq. (2)).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.contrast import Batch, Contrast, Scored, contrastive_logits, score
from pretrain.views import generator


class MoCo(Contrast):
    """The query encoder, the key encoder and the queue (arXiv:1911.05722, Algorithm 1, Fig. 2c).

    Its state dict has the names and the order of the reference's: `queue`, `queue_ptr`,
    `encoder_q.*`, `encoder_k.*`.
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, config: PretrainConfig, *, images: int, groups: int) -> None:
        super().__init__(config, images=images, groups=groups)
        self.encoder_k = self.build_encoder()
        follow(self.encoder_k, self.encoder_q)
        draw = generator(config.seed, "queue")
        queue = torch.randn(config.dim, config.K, generator=draw)
        self.register_buffer("queue", functional.normalize(queue, dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._theta_q: list[Tensor] = list(self.encoder_q.parameters())
        self._theta_k: list[Tensor] = list(self.encoder_k.parameters())

    def random_keys(self, steps: int) -> float:
        """Return the share of the queue that no step has replaced yet."""
        return max(0.0, 1 - steps * self._keys_a_step / self.config.K)

    def oldest_key(self, steps: int) -> float:
        """Return the age of the queue's oldest key in steps; random ones have none."""
        return min(float(steps), self.config.K / self._keys_a_step)

    @property
    def _keys_a_step(self) -> int:
        return self.config.batch_size * (2 if self.config.symmetric else 1)

    def contrast(self, batch: Batch) -> Iterator[Scored]:
        """Take Algorithm 1's step, all keys first; symmetric, each view is query and key once."""
        self.update_key_encoder()
        directions = [(0, 1), (1, 0)] if self.config.symmetric else [(0, 1)]
        keys = [self.keys(batch, view) for _, view in directions]
        places = torch.arange(len(batch.images), device=self.device)[batch.own]
        for (view, _), k in zip(directions, keys, strict=True):
            own = k[batch.own]
            for part, q in self.encode_parts(self.encoder_q, batch.views[view], batch.parts):
                logits = contrastive_logits(q, own[part], self.queue, self.config.tau)
                yield score(logits, q, k, places[part], batch.parts)
        self.enqueue(torch.cat(keys[::-1]))  # the first view's keys come first

    @torch.no_grad()
    def keys(self, batch: Batch, view: int) -> Tensor:
        """Encode a view of all processes' images, shuffled across batch norm groups.

        So an image's query and key meet batch statistics of different groups (v1, Sec. 3.3).

        Returns:
            (N, C) keys in the order of the images, the same on every process.
        """
        shuffle = batch.shuffle(view)
        mine = distributed.exchange(batch.views[view], shuffle)
        parts = [k for _, k in self.encode_parts(self.encoder_k, mine, batch.parts)]
        k = distributed.gather(torch.cat(parts))
        return k[torch.argsort(shuffle).to(k.device)]

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Move f_k towards f_q: theta_k <- m theta_k + (1 - m) theta_q, Eq. (2).

        Parameters only: batch norm's running statistics are each encoder's own.
        """
        torch._foreach_lerp_(self._theta_k, self._theta_q, 1 - self.config.m)

    @torch.no_grad()
    def enqueue(self, k: Tensor) -> None:
        """Replace the oldest keys by these, (N, C), wrapping around the queue's end."""
        K = self.queue.shape[1]
        k = k[-K:]
        places = (self.queue_ptr + torch.arange(len(k), device=k.device)) % K
        self.queue[:, places] = k.T
        self.queue_ptr.copy_((self.queue_ptr + len(k)) % K)


def follow(encoder_k: nn.Module, encoder_q: nn.Module) -> None:
    """Start f_k as a copy of f_q, without a gradient of its own."""
    encoder_k.load_state_dict(encoder_q.state_dict())
    encoder_k.requires_grad_(False)
