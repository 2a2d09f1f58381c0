"""Recipes of the embedded scenes, as a CPU runs them."""

from pathlib import Path

from detectron2.config import CfgNode

from convert.files import ROOT
from transfer.detection import recipes

CONFIGS = ROOT / "configs"
COCO = CONFIGS / "embedded_coco_R50_C4_moco.yaml"
VOC = CONFIGS / "embedded_voc_R50_C4_moco.yaml"


def load(file: Path = COCO, *pairs: str) -> CfgNode:
    cfg = recipes.load_recipe(file, ["MODEL.DEVICE", "cpu", *pairs])
    recipes.fit_to_machine(cfg, 1)
    return cfg
