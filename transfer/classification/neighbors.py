"""Weighted nearest neighbours on frozen features (InstDisc, arXiv:1805.01978, Sec. 3.4).

Legend: M: images of the bank; Q: queries; D: width of a feature; k: neighbours that vote; C:
classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from convert.errors import UserError
from pretrain.views import generator
from transfer.classification.features import Features
from transfer.classification.probe import Probe
from transfer.classification.request import ProbeConfig, Request, require_at_least

QUERIES_AT_ONCE = 256
GROUP = 8  # columns whose largest is looked for first
LEAST_GROUPS = 4  # as many times k: with fewer, most groups would be looked into
MEMORY_MIB = 128  # of similarities at a time, however large the bank
BANK_SHARE = 0.9  # of the bank, drawn anew for each of several seeds


@dataclass(frozen=True)
class KnnConfig(ProbeConfig):
    """The keys of a kNN recipe.

    Attributes:
        k: numbers of neighbours, each with a result of its own.
        temperature: a neighbour's vote weighs exp(cosine / temperature). InstDisc, DINO and
            mmselfsup take .07 on backbone features; MoCo's CIFAR notebook takes .1 on the head's.
        memory_mib: memory for similarities, MiB: the bank streams through it. Changes no number.
    """

    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    memory_mib: int = MEMORY_MIB

    def __post_init__(self) -> None:
        """Refuse values that no vote can have."""
        super().__post_init__()
        if not self.k:
            raise UserError("k is empty, want numbers of neighbours as in: k 10,20,200")
        require_at_least("k", min(self.k), 1)
        require_at_least("memory_mib", self.memory_mib, 1)
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}, want more than 0")


def nearest(
    bank: Tensor, queries: Tensor, k: int, memory_mib: float = MEMORY_MIB
) -> tuple[Tensor, Tensor]:
    """Find the k most similar images of the bank, streaming over the bank.

    Each part of the bank is read and normalised once; beside it and the queries, only the
    similarities of one part and the best k so far are held.

    Args:
        bank: (M, D) features, M >= k; on the CPU or on the queries' device.
        queries: (Q, D) features; their device computes.
        k: how many.
        memory_mib: bounds the similarities that are held at a time, MiB.

    Returns:
        Cosines (Q, k) from the largest down, and their places in the bank (Q, k).
    """
    queries = normalize(queries, dim=1)
    best = queries.new_full((len(queries), k), -math.inf)
    places = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    at_once = max(int(memory_mib * 2**20 / (4 * QUERIES_AT_ONCE)), 1)
    room = queries.new_empty(QUERIES_AT_ONCE * min(at_once, len(bank)))
    for first in range(0, len(bank), at_once):
        part = normalize(bank[first : first + at_once].to(queries.device), dim=1).T
        for rows in torch.arange(len(queries)).split(QUERIES_AT_ONCE):
            own = slice(int(rows[0]), int(rows[-1]) + 1)
            shape = (len(rows), part.shape[1])
            similarity = torch.mm(queries[own], part, out=room[: math.prod(shape)].view(shape))
            cosines, found = largest(similarity, min(k, part.shape[1]))
            if first:
                cosines, found = torch.cat([best[own], cosines], 1), found + first
                cosines, kept = cosines.topk(k, dim=1)
                found = torch.cat([places[own], found], 1).gather(1, kept)
            best[own, : cosines.shape[1]], places[own, : cosines.shape[1]] = cosines, found
    return best, places


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row, from the largest down, and their places, as topk does.

    Of (Q, M) values with many more columns than k, the k groups of columns with the largest maxima
    hold them all: to find the maxima costs less than topk then saves.
    """
    width = values.shape[1] // GROUP
    if width < LEAST_GROUPS * k:
        return values.topk(k, dim=1)
    groups = values[:, : GROUP * width].view(len(values), GROUP, width)
    chosen = groups.amax(dim=1).topk(k, dim=1).indices
    wide = chosen[:, None].expand(-1, GROUP, -1)
    start = torch.arange(0, GROUP * width, width, device=values.device)
    rest = torch.arange(GROUP * width, values.shape[1], device=values.device)
    likely = torch.cat([groups.gather(2, wide).flatten(1), values[:, GROUP * width :]], dim=1)
    places = torch.cat([(wide + start[:, None]).flatten(1), rest.expand(len(values), -1)], dim=1)
    found, kept = likely.topk(k, dim=1)
    return found, places.gather(1, kept)


def vote(cosines: Tensor, labels: Tensor, k: int, temperature: float, num_classes: int) -> Tensor:
    """Let the k nearest neighbours vote with exp(cosine / temperature).

    Args:
        cosines: (Q, at least k) from the largest down.
        labels: the neighbours' classes, same shape.
        k: how many vote.
        temperature: of the weights.
        num_classes: C.

    Returns:
        (Q,) the classes with the heaviest vote.
    """
    # Relative to the nearest one: the same winner, and no overflow at a small temperature.
    weights = ((cosines[:, :k] - cosines[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes)
    return votes.scatter_add_(1, labels[:, :k], weights).argmax(dim=1)


def knn_accuracies(
    bank: Features,
    queries: Features,
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    device: torch.device | None = None,
    memory_mib: float = MEMORY_MIB,
) -> dict[str, float]:
    """Classify the queries by their neighbours in the bank.

    Args:
        bank: what votes.
        queries: what is judged.
        ks: numbers of neighbours.
        temperature: of the vote's weights.
        num_classes: C.
        device: where it is computed; None: where the queries are.
        memory_mib: bounds the similarities that are held at a time, MiB.

    Returns:
        Percent of queries that got their own class: {"knn20/top1": 71.2, ...}.
    """
    values = queries.values if device is None else queries.values.to(device)
    cosines, places = nearest(bank.values, values, max(ks), memory_mib)
    cosines, places = cosines.cpu(), places.cpu()
    right = dict.fromkeys(ks, 0)
    for rows in torch.arange(len(places)).split(QUERIES_AT_ONCE):
        labels = bank.labels[places[rows]]
        for k in ks:
            winners = vote(cosines[rows], labels, k, temperature, num_classes)
            right[k] += int((winners == queries.labels[rows]).sum())
    return {f"knn{k}/top1": 100 * right[k] / len(queries.labels) for k in ks}


def evaluate(config: KnnConfig, request: Request) -> dict[str, Any]:
    """Vote on the frozen features of a checkpoint and write `results.json`.

    With one seed this is the exact protocol: the whole training set is the bank. With more, each
    seed votes with another random nine tenths of it, for a spread; random initialisation is also
    drawn anew.

    Raises:
        UserError: bad input, more neighbours than images, or an output folder in use.
    """
    probe = Probe("knn", config, request, _protocol)
    images = len(probe.sets.train)
    size = images if config.seeds == 1 else int(BANK_SHARE * images)
    _refuse_large_k(config, size, images)
    done = probe.finished()
    if done is not None:
        return done

    def one_seed(seed: int, bank: Features, queries: Features) -> dict[str, float]:
        if size < images:
            drawn = torch.randperm(images, generator=generator(seed, "bank"))[:size]
            bank = bank.take(drawn.sort().values)
        protocol = (config.k, config.temperature, probe.num_classes)
        return knn_accuracies(bank, queries, *protocol, probe.device, config.memory_mib)

    return probe.measure(one_seed)


def _refuse_large_k(config: KnnConfig, size: int, images: int) -> None:
    too_large = [str(k) for k in config.k if k > size]
    if too_large:
        share = "" if size == images else f" ({BANK_SHARE:.0%} of {images}, as --seeds asks)"
        raise UserError(
            f"k {', '.join(too_large)}: the bank holds {size} images{share}; name smaller ones: "
            f"k {','.join(str(k) for k in config.k if k <= size) or size}"
        )


def _protocol(config: KnnConfig) -> dict[str, Any]:
    return {
        "task": "knn",
        "features": f"{config.stage}, average-pooled",
        "view": f"resize {config.resize}, centre crop {config.image_size}",
        "precision": config.precision,
        "similarity": "cosine",
        "k": list(config.k),
        "temperature": config.temperature,
        "bank": "whole" if config.seeds == 1 else f"random {BANK_SHARE:.0%} for each seed",
    }
