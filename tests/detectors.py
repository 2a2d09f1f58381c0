"""Recipes of the embedded scenes, as a CPU runs them, and Detectron2's plain way of training."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper

from benchmarks.speed.detection import plain_steps
from convert.files import ROOT
from transfer.detection import datasets, recipes
from transfer.detection.batches import FORWARD, IMAGE, reseed

CONFIGS = ROOT / "configs"
COCO = CONFIGS / "embedded_coco_R50_C4_moco.yaml"
VOC = CONFIGS / "embedded_voc_R50_C4_moco.yaml"


def load(file: Path = COCO, *pairs: str) -> CfgNode:
    cfg = recipes.load_recipe(file, ["MODEL.DEVICE", "cpu", *pairs])
    recipes.fit_to_machine(cfg, 1)
    return cfg


# A ResNet-50 of an eighth of the width, on small images with few regions: seconds a run.
NARROW = [
    *("MODEL.WEIGHTS", "", "MOCO.PRECISION", "fp32"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,96)", "INPUT.MAX_SIZE_TRAIN", "96"),
    *("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "MODEL.RPN.POST_NMS_TOPK_TEST", "4"),
    *("SOLVER.WARMUP_ITERS", "4", "SOLVER.STEPS", "(9,)", "TEST.PRECISE_BN.NUM_ITER", "2"),
]


def narrow(file: Path, *pairs: str) -> CfgNode:
    """Load a recipe of a narrow network."""
    return load(file, *NARROW, *pairs)


def read_few(monkeypatch: pytest.MonkeyPatch, count: int = 6) -> None:
    """Read the first images of every set: for tests that measure no number."""
    real = datasets.load

    def load_few(*words: Any, **more: Any) -> datasets.Loaded:
        whole = real(*words, **more)
        return dataclasses.replace(whole, dicts=whole.dicts[:count])

    monkeypatch.setattr(datasets, "load", load_few)


def plain_losses(cfg: CfgNode, count: int) -> list[float]:
    """Train as Detectron2 does, by its own loader and a plain loop; return the losses.

    Only the generators are seeded as here: before an image, by its position, and before a forward
    pass, by its iteration.
    """
    positions = itertools.count()
    mapper = DatasetMapper(cfg, True)

    def seeded(record: dict[str, Any]) -> Any:
        position = next(positions)
        reseed(cfg.SEED, IMAGE, position)
        example = mapper(record)
        iteration, place = divmod(position, cfg.SOLVER.IMS_PER_BATCH)
        if place == cfg.SOLVER.IMS_PER_BATCH - 1:  # images are square: a batch is complete
            reseed(cfg.SEED, FORWARD, iteration, 0)
        return example

    return list(itertools.islice(plain_steps(cfg, seeded), count))
