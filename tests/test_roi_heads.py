"""The extra norm of the C4 head."""

import subprocess
import sys

import pytest

pytest.importorskip("detectron2")

import numpy as np
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import ROI_HEADS_REGISTRY
from torch import nn

from convert.errors import UserError
from convert.files import ROOT
from tests.detectors import COCO, VOC, load, narrow
from transfer.detection import roi_heads, weights


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return weights.build_detector(load())


def test_the_head_is_in_detectron2s_registry_under_the_papers_name() -> None:
    assert ROI_HEADS_REGISTRY.get("Res5ROIHeadsExtraNorm") is roi_heads.Res5ROIHeadsExtraNorm


def test_what_another_project_registered_first_is_no_obstacle() -> None:
    code = (
        "from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY\n"
        "class Res5ROIHeadsExtraNorm: pass\n"
        "class build_resnet_dilated_c5_backbone: pass\n"
        "ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)\n"
        "BACKBONE_REGISTRY.register(build_resnet_dilated_c5_backbone)\n"
        "import transfer.detection.weights\n"
        "print(ROI_HEADS_REGISTRY.get('Res5ROIHeadsExtraNorm') is Res5ROIHeadsExtraNorm)\n"
        "name = 'build_resnet_dilated_c5_backbone'\n"
        "print(BACKBONE_REGISTRY.get(name) is build_resnet_dilated_c5_backbone)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\nTrue\n", done.stderr


@torch.no_grad()
def test_what_leaves_res5_is_normalised_in_every_channel(model: nn.Module) -> None:
    features = torch.randn(6, 1024, 14, 14, generator=torch.Generator().manual_seed(0))
    out = model.roi_heads.res5.train()(features)
    assert out.shape == (6, 2048, 7, 7)
    assert out.mean((0, 2, 3)).abs().max() < 1e-3
    assert (out.std((0, 2, 3)) - 1).abs().max() < 0.05


@pytest.mark.parametrize(("norm", "kind"), [("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm)])
def test_the_extra_norm_is_the_recipes_own_and_is_trained(norm: str, kind: type) -> None:
    head = weights.build_detector(load(COCO, "MODEL.RESNETS.NORM", norm)).roi_heads
    extra = head.res5.norm
    assert isinstance(extra, kind)
    assert extra.num_features == 2048
    assert all(p.requires_grad for p in extra.parameters())


def test_a_recipe_without_a_norm_is_refused() -> None:
    with pytest.raises(UserError, match=r"MODEL.RESNETS.NORM: is empty"):
        weights.build_detector(load(COCO, "MODEL.RESNETS.NORM", ""))


def test_detectron2s_own_predictor_runs_a_detector_that_was_trained_here(tmp_path) -> None:
    cfg = narrow(VOC, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    built = weights.build_detector(cfg)
    torch.save({"model": built.state_dict(), "moco_transfer": {"facts": {}}}, cfg.MODEL.WEIGHTS)
    predictor = DefaultPredictor(cfg)
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert predictor(image)["instances"].image_size == (64, 64)
    norm = predictor.model.roi_heads.res5.norm
    assert norm.weight.equal(built.roi_heads.res5.norm.weight)
