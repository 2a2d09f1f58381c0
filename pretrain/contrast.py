"""What every contrastive method shares: a step's images, encoding them, scoring embeddings.

Shapes:
    N: images of a step, on all processes; n: on this one
    C: length of an embedding (`dim`)
    K: negatives of a query

Symbols are the papers': q and k are a query and its key, f_q and f_k the encoders, tau the
temperature of the loss (arXiv:1911.05722, Eq. (1)).

A method is one class: a `Contrast` whose `contrast` yields losses. See docs/own_method.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.encoders import build_encoder
from pretrain.norm import Statistics
from pretrain.views import generator


@dataclass(frozen=True)
class Batch:
    """One step's images, and what is drawn for them.

    Attributes:
        views: each (n, 3, H, W), this process's images, on its device.
        images: (N,) places in the set of all processes' images, in the order of the ranks.
        seed, step: of the run; everything random comes from them.
        parts: how many parts this process's images are taken in.
    """

    views: list[Tensor]
    images: Tensor
    seed: int
    step: int
    parts: int = 1

    def draw(self, what: str, *words: object) -> torch.Generator:
        """Make this step's generator for something; it gives the same on every process."""
        return generator(self.seed, what, self.step, *words)

    def shuffle(self, view: int) -> Tensor:
        """Draw the (N,) permutation of a view that shuffling BN uses (v1, Sec. 3.3)."""
        words = () if view == 1 else (view,)  # keys come from the second view unless symmetric
        return torch.randperm(len(self.images), generator=self.draw("shuffle", *words))

    @property
    def own(self) -> slice:
        """Where this process's images lie among all."""
        n = len(self.images) // distributed.size()
        return slice(distributed.rank() * n, (distributed.rank() + 1) * n)


@dataclass(frozen=True)
class Scored:
    """What a part of a step came to.

    Attributes:
        loss: this part's share of the mean loss over this process's images, with a gradient.
        values: (2,) shares of queries that score their positive above all negatives, and above the
            keys of the other images in the batch. A queue's keys come from older encoders, which
            alone can tell them from a positive: only keys of one age show whether images are told
            apart.
        embeddings: queries and their positives, each (n, C) of unit length and without a gradient;
            what is logged of their spread. None: nothing is.
    """

    loss: Tensor
    values: Tensor
    embeddings: tuple[Tensor, Tensor] | None = None


class Contrast(nn.Module):
    """A query encoder and what its embeddings are held against.

    Args:
        config: of the run.
        images: in the training set.
        groups: batch norm groups of each forward pass.
    """

    views: ClassVar[int] = 2  # that an image is augmented into
    holds_keys: ClassVar[bool] = True  # K of them, from earlier steps
    accumulates: ClassVar[bool] = True  # whether a step can be taken in parts
    leaks: ClassVar[bool] = (
        True  # whether a single batch norm group shows which key is the positive
    )
    whole_batch_norm: ClassVar[bool] = False  # statistics over all processes

    def __init__(self, config: PretrainConfig, *, images: int, groups: int) -> None:
        super().__init__()
        self.config = config
        self.images = images
        self.groups = groups
        self.device = torch.device("cpu")
        self.bf16 = False
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self._statistics: dict[nn.Module, Statistics] = {}
        self.encoder_q = self.build_encoder()

    def build_encoder(self) -> nn.Module:
        """Build f_q, or an f_k like it; a method with a head of its own replaces `fc` here."""
        config = self.config
        return build_encoder(
            config.arch,
            config.dim,
            mlp=config.mlp,
            bn_groups=self.groups,
            residual_gamma=config.residual_gamma,
            stem=config.stem,
        )

    @property
    def negatives(self) -> int:
        """Return K: with chance alone, the loss is log(K + 1)."""
        return self.config.K

    def random_keys(self, steps: int) -> float:
        """Return the share of the stored keys that are still random, after so many steps."""
        return 0.0

    def oldest_key(self, steps: int) -> float | None:
        """Return the age of the oldest stored key in steps; None where none is stored."""
        return None

    def contrast(self, batch: Batch) -> Iterator[Scored]:
        """Score a step's images part by part; each loss goes backward before the next is asked for.

        What the next step needs (a queue, a bank) is brought up to date after the last part.
        """
        raise NotImplementedError

    def settle(self, device: torch.device, *, bf16: bool = False, compiled: bool = False) -> None:
        """Move to the device that the run is on.

        Args:
            device: where.
            bf16: encode under bfloat16 autocast; weights, loss and queue stay as they are.
            compiled: compile the encoders, whose names stay as they are.
        """
        self.device, self.bf16 = device, bf16
        self.to(device).to(memory_format=self.layout)  # type: ignore[call-overload]
        for encoder in self.encoders():
            self._statistics[encoder] = Statistics(encoder)
            if compiled:
                encoder.compile()

    def encoders(self) -> list[nn.Module]:
        """List the encoders."""
        return list(self.children())

    def encode(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Encode (n, 3, H, W) images to (n, C) embeddings of unit length."""
        images = images.to(memory_format=self.layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            z: Tensor = encoder(images)
        return functional.normalize(z.float() if z.dtype is torch.bfloat16 else z, dim=1)

    def encode_parts(
        self, encoder: nn.Module, images: Tensor, parts: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """Encode images part by part, as if at once: running statistics move towards the mean.

        Args:
            encoder: one of ours.
            images: (n, 3, H, W).
            parts: into how many equal parts.

        Yields:
            The place of a part, and its (n / parts, C) embeddings of unit length.
        """
        if parts == 1:
            yield slice(None), self.encode(encoder, images)
            return
        statistics = self._statistics[encoder]
        before = statistics.read()
        total = torch.zeros_like(before)
        count = len(images) // parts
        for first in range(0, len(images), count):
            statistics.write(before)
            z = self.encode(encoder, images[first : first + count])
            total += statistics.read()
            yield slice(first, first + count), z
        statistics.write(total / parts)
        statistics.count_back(parts - 1)


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


def score(logits: Tensor, q: Tensor, keys: Tensor, places: Tensor, parts: int = 1) -> Scored:
    """Turn a part's logits, positives in column 0, into its share of a step's loss.

    Args:
        logits: (n, 1 + K).
        q: (n, C) its queries.
        keys: (N, C) the batch's keys of one age.
        places: (n,) where each query's own key lies among them.
        parts: parts of the step.
    """
    with torch.no_grad():
        top1 = (logits.argmax(dim=1) == 0).float().mean()
        own = ((q @ keys.T).argmax(dim=1) == places).float().mean()
        embeddings = (q.detach(), keys[places])
    return Scored(contrastive_loss(logits) / parts, torch.stack([top1, own]) / parts, embeddings)
