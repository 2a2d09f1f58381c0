"""Weighted nearest neighbours on frozen features (InstDisc, arXiv:1805.01978, Sec. 3.4).

Legend: M: images of the bank; Q: queries; D: width of a feature; k: neighbours that vote; C:
classes.
"""

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

QUERIES_AT_ONCE = 512
BANK_AT_ONCE = 32768  # with the above: 64 MiB of similarities, however large the bank
BANK_SHARE = 0.9  # of the bank, drawn anew for each of several seeds


@dataclass(frozen=True)
class KnnConfig(ProbeConfig):
    """The keys of a kNN recipe.

    Attributes:
        k: numbers of neighbours, each with a result of its own.
        temperature: a neighbour's vote weighs exp(cosine / temperature). InstDisc, DINO and
            mmselfsup take .07 on backbone features; MoCo's CIFAR notebook takes .1 on the head's.
    """

    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07

    def __post_init__(self) -> None:
        """Refuse values that no vote can have."""
        super().__post_init__()
        if not self.k:
            raise UserError("k is empty, want numbers of neighbours as in: k 10,20,200")
        require_at_least("k", min(self.k), 1)
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}, want more than 0")


def nearest(
    bank: Tensor, queries: Tensor, k: int, at_once: int = BANK_AT_ONCE
) -> tuple[Tensor, Tensor]:
    """Find the k most similar images of the bank, streaming over the bank.

    Args:
        bank: (M, D) features, M >= k.
        queries: (Q, D) features.
        k: how many.
        at_once: images of the bank that are compared at a time; bounds the memory.

    Returns:
        Cosines (Q, k) from the largest down, and their places in the bank (Q, k).
    """
    queries = normalize(queries, dim=1)
    best = queries.new_full((len(queries), 0), 0.0)
    places = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(bank), at_once):
        part = normalize(bank[first : first + at_once].to(queries.device), dim=1)
        cosines, found = (queries @ part.T).topk(min(k, len(part)), dim=1)
        best, kept = torch.cat([best, cosines], 1).topk(
            min(k, best.shape[1] + len(found[0])), dim=1
        )
        places = torch.cat([places, found + first], 1).gather(1, kept)
    return best, places


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
) -> dict[str, float]:
    """Classify the queries by their neighbours in the bank.

    Returns:
        Percent of queries that got their own class: {"knn20/top1": 71.2, ...}.
    """
    right = dict.fromkeys(ks, 0)
    for first in range(0, len(queries.values), QUERIES_AT_ONCE):
        part = queries.take(torch.arange(first, min(first + QUERIES_AT_ONCE, len(queries.labels))))
        cosines, places = nearest(bank.values, part.values, max(ks))
        for k in ks:
            winners = vote(cosines, bank.labels[places], k, temperature, num_classes)
            right[k] += int((winners == part.labels).sum())
    return {f"knn{k}/top1": 100 * right[k] / len(queries.labels) for k in ks}


def evaluate(config: KnnConfig, request: Request) -> dict[str, Any]:
    """Vote on the frozen features of a checkpoint and write `results.json`.

    With one seed this is the exact protocol: the whole training set is the bank. With more, each
    seed votes with another random nine tenths of it, for a spread; random initialisation is also
    drawn anew.

    Raises:
        UserError: bad input, more neighbours than images, or an output folder in use.
    """
    probe = Probe("knn", config, request, _protocol(config))
    images = len(probe.sets.train)
    size = images if config.seeds == 1 else int(BANK_SHARE * images)
    _refuse_large_k(config, size, images)
    done = probe.finished()
    if done is not None:
        return done
    per_seed = []
    for seed in config.all_seeds:
        network = probe.network(seed)
        bank, queries = probe.train_features(network), probe.val_features(network)
        network.prove_unmoved()
        if size < images:
            drawn = torch.randperm(images, generator=generator(seed, "bank"))[:size]
            bank = bank.take(drawn.sort().values)
        found = knn_accuracies(bank, queries, config.k, config.temperature, probe.num_classes)
        per_seed.append(found)
    return probe.write(per_seed, request.output_dir)


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
