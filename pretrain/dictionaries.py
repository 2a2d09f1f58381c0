"""The dictionaries of the paper's Figure 2 beside the queue, and how a recipe names one.

Shapes:
    N: images of a step, on all processes; n: on this one
    C: length of an embedding (`dim`)
    K: negatives of a query
    M: images in the training set

Figure 2 (arXiv:1911.05722) compares three ways to hold keys: (a) end-to-end, the batch itself;
(b) a memory bank, an embedding of every image of the set; (c) MoCo's queue, in `moco.py`.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from convert.errors import UserError
from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.contrast import Batch, Contrast, Scored, contrastive_logits, score
from pretrain.moco import MoCo
from pretrain.simclr import SimCLR
from pretrain.views import generator


class MemoryBank(Contrast):
    """One encoder, and an embedding of every image of the set (Fig. 2b; arXiv:1805.01978).

    The positive is the image's own stored entry, made when the image was last seen, by an older
    encoder. K entries are drawn uniformly as negatives, once a step; as in InstDisc an image's own
    entry may be among them. There is no key encoder and nothing to shuffle.
    """

    views: ClassVar[int] = 1
    leaks: ClassVar[bool] = False
    bank: Tensor

    def __init__(self, config: PretrainConfig, *, images: int, groups: int) -> None:
        super().__init__(config, images=images, groups=groups)
        entries = torch.randn(images, config.dim, generator=generator(config.seed, "bank"))
        self.register_buffer("bank", functional.normalize(entries, dim=1))

    def contrast(self, batch: Batch) -> Iterator[Scored]:
        """Score the view against its image's entry and K others, then store its embedding."""
        config, images = self.config, batch.images.to(self.device)
        stored = self.bank[images]  # (N, C)
        drawn = torch.randint(len(self.bank), (config.K,), generator=batch.draw("bank"))
        negatives = self.bank[drawn.to(self.device)].T
        places = torch.arange(len(images), device=self.device)[batch.own]
        found = []
        for part, q in self.encode_parts(self.encoder_q, batch.views[0], batch.parts):
            logits = contrastive_logits(q, stored[batch.own][part], negatives, config.tau)
            yield score(logits, q, stored, places[part], batch.parts)
            found.append(q.detach())
        self.store(images, distributed.gather(torch.cat(found)))

    @torch.no_grad()
    def store(self, images: Tensor, q: Tensor) -> None:
        """Replace the entries of images (N,) by their embeddings (N, C).

        With a `bank_momentum` t, entry <- t entry + (1 - t) q at unit length (InstDisc's t is 0.5:
        arXiv:1805.01978, Sec. 3.1; the paper mentions it at the end of Sec. 3.1).
        """
        entries = self.bank[images].lerp(q, 1 - self.config.bank_momentum)
        self.bank[images] = functional.normalize(entries, dim=1)


class EndToEnd(Contrast):
    """Both encoders trained by the loss; the keys are the batch's (Fig. 2a).

    Each query has N - 1 negatives. Keys are encoded shuffled, as MoCo's are.
    """

    holds_keys: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False

    def __init__(self, config: PretrainConfig, *, images: int, groups: int) -> None:
        super().__init__(config, images=images, groups=groups)
        self.encoder_k = self.build_encoder()
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())

    @property
    def negatives(self) -> int:
        """Return K: the other images of the batch."""
        return self.config.batch_size - 1

    def contrast(self, batch: Batch) -> Iterator[Scored]:
        """Score every query against all keys of the batch."""
        q = self.encode(self.encoder_q, batch.views[0])
        shuffle = batch.shuffle(1)
        shuffled = self.encode(self.encoder_k, distributed.exchange(batch.views[1], shuffle))
        k = distributed.gather(shuffled)[torch.argsort(shuffle).to(self.device)]
        logits = q @ k.T / self.config.tau  # (n, N), the positives on a diagonal
        places = torch.arange(len(k), device=self.device)[batch.own]
        loss = functional.cross_entropy(logits, places)
        top1 = (logits.detach().argmax(dim=1) == places).float().mean()
        yield Scored(loss, torch.stack([top1, top1]))


DICTIONARIES: dict[str, type[Contrast]] = {
    "queue": MoCo,
    "bank": MemoryBank,
    "end-to-end": EndToEnd,
    "simclr": SimCLR,
}


def find_method(name: str) -> type[Contrast]:
    """Return the class that a recipe's `dictionary` names.

    Args:
        name: a key of `DICTIONARIES`, or `FILE.py:CLASS` for one's own.

    Raises:
        UserError: it names none.
    """
    if name in DICTIONARIES:
        return DICTIONARIES[name]
    file, _, wanted = name.rpartition(":")
    if not file.endswith(".py"):
        known = ", ".join(DICTIONARIES)
        raise UserError(f"dictionary '{name}': want one of {known}, or FILE.py:CLASS of your own")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"dictionary '{name}': no such file; want FILE.py:CLASS")
    # Under a name of its own, as a file may be called like a module that others import.
    spec = importlib.util.spec_from_file_location(f"method_of_ones_own.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    found = getattr(module, wanted, None)
    if not (isinstance(found, type) and issubclass(found, Contrast)):
        raise UserError(f"dictionary '{name}': {file} has no class {wanted} that is a Contrast")
    return found
