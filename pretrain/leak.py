"""The leak meter: does batch norm tell the network which key is a query's own?

Shapes:
    N: images of a forward pass; P: passes of the pool; M = P N: its images
    C: length of an embedding

Query and key of an image are encoded in batches. If both batches hold the same images, both have
the same statistics, up to the augmentation; a network can write these into its embeddings and tell
the keys of its own batch from all older ones, without looking at the image (arXiv:1911.05722,
Sec. 3.3 and Figure A.1). Shuffling hides that, where a batch has several batch norm groups.

The meter holds queries against the keys of a pool, and encodes the keys three times: in the query's
own group, as where nothing is shuffled; shuffled within the run's batch, as the run itself does it;
and among any images of the pool. Nothing else differs. If more queries find a key of the run's way
than one encoded among any images, batch norm told them.
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


def measure(
    model: Contrast, views: Views, count: int, batch_size: int, seed: int
) -> dict[str, float]:
    """Measure the leak; the model and everything random are left as they were.

    Args:
        model: with an encoder of queries, and one of keys if it has two.
        views: of the training set, two passes of them or more.
        count: N, images of one pass.
        batch_size: images of a step, on all processes: what the run shuffles.
        seed: of the run; the pool's images are the same whenever it is measured.

    Returns:
        Percent of queries that score their own key above those of other passes, about K if the
        pool has as many: `leak_same`, keys encoded in the query's group, `leak_shuffled`, shuffled
        as in this run, and `leak_apart`, among any images of the pool. The leak of this run is what
        the second has above the third.
    """
    P = max(2, min(BATCHES, AT_MOST // count, len(views) // count))
    M = P * count
    places = torch.randperm(len(views), generator=generator(seed, "leak"))[:M]
    draw = generator(seed, "leak", "shuffle")
    steps = torch.arange(M).split(batch_size)
    ways = {
        "leak_same": torch.arange(M),
        "leak_shuffled": torch.cat(
            [step[torch.randperm(len(step), generator=draw)] for step in steps]
        ),
        "leak_apart": torch.randperm(M, generator=draw),
    }
    f_q = model.encoder_q
    f_k = getattr(model, "encoder_k", f_q)
    with _left_alone([f_q, f_k]), torch.no_grad():
        pool = collate([views[EPOCH, index] for index in places.tolist()])
        made = on_device(pool, model.device, views.size)
        first, second = made[0], made[-1]
        q = _encode(model, f_q, first, count)
        others = max(1, round(model.negatives / count))  # passes of negatives
        found = {}
        for way, order in ways.items():
            k = _encode(model, f_k, second[order], count)[order.argsort()]
            found[way] = found_percent(q, k, count, others)
    return found


def found_percent(q: Tensor, k: Tensor, count: int, others: int) -> float:
    """Return the percent of queries that score their own key above those of other passes.

    A queue's keys are of other steps too: those of its own pass are no negatives here, or what
    a whole pass has in common would help nobody.

    Args:
        q: (M, C) queries of unit length.
        k: (M, C) their keys, unit length.
        count: N; M is a multiple.
        others: how many passes' keys are a query's negatives: the ones that follow its own.
    """
    scores = q @ k.T
    place = torch.arange(len(q), device=q.device) // count
    after = (place - place[:, None]) % (len(q) // count)  # passes from the query's to the key's
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
