"""Training batches as a function of their place in the run: resume equals not stopping.

Detectron2's order of images, shuffled and grouped by aspect ratio, is kept to the image. What it
has in the state of samplers, buckets and generators is computed here from the seed and a place: a
batch from its iteration, an image's augmentation from its position in the order. So a resumed run
sees what the run would have seen, whatever the number of workers.

Legend: P: processes; A: parts of a batch that a process takes one after the other
(MOCO.ACCUMULATE); S = P A: streams, each a share of the order with groups of its own.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Dataset

from pretrain.workers import load

# What is drawn at a place.
IMAGE, FORWARD, PRECISE_BN = 0, 1, 2
Place = tuple[int, int]  # position in the order, index of the image
Record = dict[str, Any]  # Detectron2's, of an image


def reseed(*place: int) -> None:
    """Seed the generators of Python, NumPy and torch from a place in the run.

    Args:
        place: whole numbers, none below 0: the seed, what is drawn, and where.
    """
    words = np.random.SeedSequence(place).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    torch.manual_seed(int(words[0] ^ words[1]) >> 1)


def streams(cfg: CfgNode) -> range:
    """Return this process's of the S streams, in the order in which it takes them."""
    parts = cfg.MOCO.ACCUMULATE
    return range(comm.get_rank() * parts, (comm.get_rank() + 1) * parts)


def training_batches(
    cfg: CfgNode,
    dicts: list[Record],
    start: int = 0,
    *,
    mapper: Callable[[Record], Record | None] | None = None,
) -> Iterator[list[Record]]:
    """Load this process's batches, A of them an iteration, without end.

    Args:
        cfg: the recipe.
        dicts: Detectron2's records of the training images.
        start: the first iteration.
        mapper: Detectron2's, from a record to a training example; default: the recipe's.

    Yields:
        IMS_PER_BATCH / S training examples.
    """
    count = comm.get_world_size() * cfg.MOCO.ACCUMULATE
    wide = [d["width"] > d["height"] for d in dicts]  # as Detectron2 groups them
    if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        wide = [False] * len(dicts)
    order = _order(cfg, dicts)
    shares = [
        group(
            islice(enumerate(order()), stream, None, count), wide, cfg.SOLVER.IMS_PER_BATCH // count
        )
        for stream in streams(cfg)
    ]
    places = islice(chain.from_iterable(zip(*shares, strict=True)), start * len(shares), None)
    examples = _Examples(dicts, mapper or DatasetMapper(cfg, True), cfg.SEED)
    return load(examples, places, cfg.DATALOADER.NUM_WORKERS, list)  # without an end


def group(places: Iterator[Place], wide: Sequence[bool], size: int) -> Iterator[list[Place]]:
    """Collect images of one aspect, wide or tall, until a batch is full.

    Args:
        places: in order, without end.
        wide: whether an image is wider than tall, by its index.
        size: images in a batch.
    """
    waiting: tuple[list[Place], list[Place]] = ([], [])
    for place in places:
        batch = waiting[wide[place[1]]]
        batch.append(place)
        if len(batch) == size:
            yield list(batch)
            batch.clear()


class _Examples(Dataset[Record]):
    """Training examples by their place: an image's augmentation is drawn from its position."""

    def __init__(
        self, dicts: list[Record], mapper: Callable[[Record], Record | None], seed: int
    ) -> None:
        self._dicts = DatasetFromList(dicts, copy=False)  # in one buffer, which workers share
        self._mapper, self._seed = mapper, seed

    def __getitem__(self, place: Place) -> Record:
        position, index = place
        reseed(self._seed, IMAGE, position)
        example = self._mapper(self._dicts[index])
        assert example is not None, "only a mapper of one's own rejects images"
        return example


def _order(cfg: CfgNode, dicts: Sequence[Mapping[str, Any]]) -> Callable[[], Iterator[int]]:
    """Return what draws the images' order from its beginning, as Detectron2's samplers do."""
    sampler: Any = TrainingSampler(len(dicts), seed=cfg.SEED)
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        sampler = RepeatFactorTrainingSampler(factors, seed=cfg.SEED)
    return lambda: iter(sampler._infinite_indices())  # of all processes, before they share it
