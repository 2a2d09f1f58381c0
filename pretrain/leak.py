"""The leak meter: does batch norm tell the network which key is a query's own?

Shapes:
    N: images of a forward pass; P: batches of the pool; M = P N: its images
    C: length of an embedding

Query and key of an image are encoded in batches. If both batches hold the same images, both have
the same statistics, up to the augmentation; a network can write these into its embeddings and tell
the keys of its own batch from all older ones, without looking at the image (arXiv:1911.05722,
Sec. 3.3 and Figure A.1). Shuffling hides that, where a batch has several batch norm groups.

The meter holds queries against the keys of a pool of batches, twice: keys that were encoded in the
query's own batch, and keys that were encoded in batches of other images of the pool. Nothing else
differs. If more queries find their key the first way, batch norm told them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pretrain.contrast import Contrast
from pretrain.loader import Views, collate, on_device
from pretrain.views import generator

BATCHES = 16  # P, where the set has as many
AT_MOST = 1024  # M, so that large batches take no minutes; but two batches at the least
EPOCH = -1  # the views of the pool are those of no epoch


def measure(model: Contrast, views: Views, batch_size: int, seed: int) -> dict[str, float]:
    """Measure the leak; the model and everything random are left as they were.

    Args:
        model: with an encoder of queries, and one of keys if it has two.
        views: of the training set, two batches of them or more.
        batch_size: N, images of one pass.
        seed: of the run; the pool's images are the same whenever it is measured.

    Returns:
        Percent of queries that score their own key above those of other batches, about K if the
        pool has as many: `leak_same`, keys encoded in the query's batch, and `leak_shuffled`, among
        other images.
    """
    P = max(2, min(BATCHES, AT_MOST // batch_size, len(views) // batch_size))
    M = P * batch_size
    places = torch.randperm(len(views), generator=generator(seed, "leak"))[:M]
    order = torch.randperm(M, generator=generator(seed, "leak", "shuffle"))
    f_q = model.encoder_q
    f_k = getattr(model, "encoder_k", f_q)
    with _left_alone([f_q, f_k]), torch.no_grad():
        pool = collate([views[EPOCH, index] for index in places.tolist()])
        made = on_device(pool, model.device, views.size)
        first, second = made[0], made[-1]
        q = _encode(model, f_q, first, batch_size)
        same = _encode(model, f_k, second, batch_size)
        shuffled = _encode(model, f_k, second[order], batch_size)[order.argsort()]
    others = max(1, round(model.negatives / batch_size))  # batches of negatives
    return {
        "leak_same": found_percent(q, same, batch_size, others),
        "leak_shuffled": found_percent(q, shuffled, batch_size, others),
    }


def found_percent(q: Tensor, k: Tensor, batch_size: int, others: int) -> float:
    """Return the percent of queries that score their own key above those of other batches.

    A queue's keys are of other batches too: those of its own batch are no negatives here, or what
    a whole batch has in common would help nobody.

    Args:
        q: (M, C) queries of unit length.
        k: (M, C) their keys, unit length.
        batch_size: N; M is a multiple.
        others: how many batches' keys are a query's negatives: the ones that follow its own.
    """
    scores = q @ k.T
    batch = torch.arange(len(q), device=q.device) // batch_size
    after = (batch - batch[:, None]) % (
        len(q) // batch_size
    )  # batches from the query's to the key's
    negative = (after >= 1) & (after <= others)
    negatives = scores.masked_fill(~negative, -torch.inf).amax(dim=1)
    found: Tensor = (scores.diagonal() > negatives).float()
    return 100 * float(found.mean())


def _encode(model: Contrast, encoder: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    batches = images.split(batch_size)
    return torch.cat([model.encode(encoder, batch.to(model.device)) for batch in batches])


@contextmanager
def _left_alone(encoders: list[nn.Module]) -> Iterator[None]:
    """Put back the running statistics that a look in training mode moves."""
    kept = [{k: v.clone() for k, v in encoder.state_dict().items()} for encoder in encoders]
    try:
        yield
    finally:
        for encoder, state in zip(encoders, kept, strict=True):
            encoder.load_state_dict(state)
