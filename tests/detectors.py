"""Recipes of the embedded scenes, as a CPU runs them, and Detectron2's plain way of training."""

import itertools
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage

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


def plain_losses(cfg: CfgNode, count: int) -> list[float]:
    """Train as Detectron2 does, by its own loader and a loop of five lines; return the losses.

    Only the generators are seeded as here: before an image, by its position, and before a forward
    pass, by its iteration.
    """
    positions = itertools.count()
    mapper = DatasetMapper(cfg, True)

    def seeded(record: dict[str, Any]) -> Any:
        reseed(cfg.SEED, IMAGE, next(positions))
        return mapper(record)

    data = datasets.load(cfg.DATASETS.TRAIN, training=True)
    sampler = TrainingSampler(len(data.dicts), seed=cfg.SEED)
    loader = build_detection_train_loader(cfg, dataset=data.dicts, mapper=seeded, sampler=sampler)
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    totals = []
    with EventStorage() as storage:
        for iteration, batch in enumerate(itertools.islice(loader, count)):
            reseed(cfg.SEED, FORWARD, iteration, 0)
            loss = sum(model(batch).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            storage.step()
            totals.append(loss.item())
    return totals
