"""The dilated-C5 backbone: its stride, its convolution, a run of its recipe."""

import json
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from torch import nn

from convert.backbone import load_backbone
from convert.errors import UserError
from tests.detectors import CONFIGS, NARROW, load, narrow, read_few
from transfer import train_net
from transfer.detection import dilated_c5, weights

RECIPE = CONFIGS / "voc_R50_C5_24k_moco.yaml"
EMBEDDED = [
    *("DATASETS.TRAIN", "('embedded_voc_trainval',)", "DATASETS.TEST", "('embedded_voc_test',)"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "1", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return weights.build_detector(narrow(RECIPE, *EMBEDDED))


def test_the_backbone_is_in_detectron2s_registry() -> None:
    name = "build_resnet_dilated_c5_backbone"
    assert BACKBONE_REGISTRY.get(name) is dilated_c5.build_resnet_dilated_c5_backbone


@torch.no_grad()
def test_res5_keeps_the_stride_of_res4_and_is_narrowed_to_512_channels(model: nn.Module) -> None:
    backbone = model.backbone.eval()
    found = backbone(torch.randn(2, 3, 64, 96))
    assert {name: tuple(value.shape) for name, value in found.items()} == {"c5": (2, 512, 4, 6)}
    shape = backbone.output_shape()["c5"]
    assert (shape.channels, shape.stride) == (512, 16)
    convs = [block.conv2 for block in backbone.bottom_up.res5]
    assert [(conv.stride, conv.dilation) for conv in convs] == [((1, 1), (2, 2))] * 3


@torch.no_grad()
def test_what_is_narrowed_leaves_normalised_and_not_rectified(model: nn.Module) -> None:
    out = model.backbone.train()(torch.randn(4, 3, 64, 64))["c5"]
    assert out.mean((0, 2, 3)).abs().max() < 1e-3
    assert out.min() < -0.5


@pytest.mark.parametrize(("norm", "kind"), [("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm)])
def test_the_convolutions_norm_is_the_recipes_own_and_is_trained(norm: str, kind: type) -> None:
    built = weights.build_detector(narrow(RECIPE, *EMBEDDED, "MODEL.RESNETS.NORM", norm))
    extra = built.backbone.narrow
    assert isinstance(extra.norm, kind)
    assert extra.bias is None
    assert all(p.requires_grad for p in extra.parameters())


@pytest.mark.parametrize(
    ("pair", "complaint"),
    [
        (["MODEL.RESNETS.NORM", ""], "MODEL.RESNETS.NORM: is empty"),
        (["MODEL.RESNETS.RES5_DILATION", "1"], "found DEPTH 50, RES5_DILATION 1"),
        (["MODEL.RESNETS.OUT_FEATURES", "['res4']"], r"OUT_FEATURES \['res4'\]"),
        (["MODEL.RESNETS.DEPTH", "18"], "found DEPTH 18.*wants 50 or more"),
    ],
)
def test_what_cannot_be_dilated_is_refused(pair: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        weights.build_detector(load(RECIPE, *pair))


def test_a_trained_detector_gives_its_backbone_back(tmp_path: Path) -> None:
    """The ResNet at full width, from a detector's file, by the converter's reader."""
    with torch.device("meta"):
        shape = weights.build_detector(load(RECIPE, "MODEL.DEVICE", "meta")).state_dict()
    state = {k: torch.full(v.shape, 0.5).to(v.dtype) for k, v in shape.items()}
    torch.save({"model": state}, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(load(RECIPE).dump(), encoding="utf-8")
    read = load_backbone(tmp_path / "model_final.pth")
    assert read.facts.arch == "resnet50"
    assert len(read.weights) == 318


def test_detectron2s_own_loader_and_builder_take_it(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model_final.pth"
    torch.save({"model": model.state_dict()}, path)
    built = build_model(narrow(RECIPE, *EMBEDDED))
    DetectionCheckpointer(built).load(str(path))
    assert built.backbone.narrow.weight.equal(model.backbone.narrow.weight)


def test_the_recipe_trains_and_is_measured_and_measured_again(tmp_path: Path, monkeypatch) -> None:
    read_few(monkeypatch)
    words = [*NARROW, *EMBEDDED, "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2"]
    words += ["SOLVER.MAX_ITER", "2", "DATALOADER.NUM_WORKERS", "0"]
    start = ["--config", str(RECIPE), "--quiet", *words]
    assert train_net.main([*start, "OUTPUT_DIR", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(record["metrics"]) == ["voc07/AP", "voc07/AP50", "voc07/AP75"]
    assert record["recipe"]["name"] == "voc_R50_C5_24k_moco"
    final = ["--eval-only", "MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth")]
    assert train_net.main([*start, *final, "OUTPUT_DIR", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["metrics"] == record["metrics"]
