"""Batches are a function of their place, and Detectron2's own to the image."""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

pytest.importorskip("detectron2")

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler

from tests.detectors import VOC, load
from transfer.detection import batches

SIZES = [(64, 48), (48, 64), (64, 64), (80, 48), (48, 80)]
DICTS = [
    {
        "image_id": index,
        "width": SIZES[index * index % 5][0],
        "height": SIZES[index * index % 5][1],
        "annotations": [{"category_id": index % 7 % 3}],
    }
    for index in range(23)
]


def cfg(*pairs: str) -> CfgNode:
    return load(VOC, "SOLVER.IMS_PER_BATCH", "4", *pairs)


def drawn(record: dict[str, Any]) -> dict[str, Any]:
    """Stands for an augmentation: notes what the three generators give."""
    return record | {"drawn": (random.random(), np.random.rand(), torch.rand(()).item())}


def ours(config: CfgNode, count: int, start: int = 0) -> list[list[tuple[Any, ...]]]:
    loaded = islice(batches.training_batches(config, DICTS, start, mapper=drawn), count)
    return [[(d["image_id"], d["drawn"]) for d in batch] for batch in loaded]


def names(found: list[list[tuple[Any, ...]]]) -> list[list[int]]:
    return [[image for image, _ in batch] for batch in found]


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    """Let both Detectron2 and ours believe in a process among others."""
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: rank)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: count)
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: count)


def theirs(config: CfgNode, count: int) -> list[list[int]]:
    sampler: Any = TrainingSampler(len(DICTS), seed=config.SEED)
    if config.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(DICTS, 0.5)
        sampler = RepeatFactorTrainingSampler(factors, seed=config.SEED)
    loader: Iterator[Any] = iter(
        build_detection_train_loader(config, dataset=DICTS, sampler=sampler, mapper=dict)
    )
    return [[d["image_id"] for d in batch] for batch in islice(loader, count)]


@pytest.mark.parametrize(
    "pairs",
    [
        (),
        ("DATALOADER.ASPECT_RATIO_GROUPING", "False"),
        (
            *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
            *("DATALOADER.REPEAT_THRESHOLD", "0.5"),
        ),
    ],
    ids=["grouped", "ungrouped", "repeated"],
)
@pytest.mark.parametrize(("rank", "count"), [(0, 1), (0, 2), (1, 2)])
def test_the_order_is_detectron2s_own(monkeypatch, pairs, rank: int, count: int) -> None:
    as_process(monkeypatch, rank, count)
    assert names(ours(cfg(*pairs), 40)) == theirs(cfg(*pairs), 40)


def test_a_batch_and_its_augmentation_depend_on_the_place_alone() -> None:
    whole = ours(cfg(), 30)
    for start in (1, 7, 19):
        assert ours(cfg(), 30 - start, start) == whole[start:]
    assert ours(cfg("DATALOADER.NUM_WORKERS", "2"), 30) == whole
    assert ours(cfg("SEED", "1"), 30) != whole
    seen = [draw for batch in whole for _, draw in batch]
    assert len({value for draw in seen for value in draw}) == 3 * len(seen)


def test_parts_in_one_process_are_the_batches_of_as_many_processes(monkeypatch) -> None:
    parts = ours(cfg("MOCO.ACCUMULATE", "2"), 20)
    for rank in (0, 1):
        as_process(monkeypatch, rank, 2)
        assert ours(cfg(), 10) == parts[rank::2]
    # two processes of two parts are four processes
    as_process(monkeypatch, 1, 2)
    both = ours(cfg("MOCO.ACCUMULATE", "2"), 20)
    for rank in (2, 3):
        as_process(monkeypatch, rank, 4)
        assert ours(cfg(), 10) == both[rank - 2 :: 2]


def test_a_batch_is_of_one_aspect() -> None:
    wide = {d["image_id"]: d["width"] > d["height"] for d in DICTS}
    for batch in names(ours(cfg(), 30)):
        assert len({wide[image] for image in batch}) == 1


def test_seeding_by_place_fixes_all_three_generators_and_tells_places_apart() -> None:
    def draw(*place: int) -> tuple[float, ...]:
        batches.reseed(*place)
        return drawn({})["drawn"]

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(*place) for place in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 1, 3))}) == 4
