"""Detection on the embedded scenes, on the CPU, with Detectron2's real models."""

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from convert.backbone import load_backbone
from convert.errors import UserError
from convert.facts import EXTRA_KEY
from convert.files import ROOT
from convert.names import to_detectron2
from transfer import datasets, detection, recipes

CONFIGS = ROOT / "configs"
COCO = CONFIGS / "embedded_coco_R50_C4_moco.yaml"
VOC = CONFIGS / "embedded_voc_R50_C4_moco.yaml"


def load(file: Path = COCO, *pairs: str) -> CfgNode:
    cfg = recipes.load_recipe(file, ["MODEL.DEVICE", "cpu", *pairs])
    recipes.fit_to_machine(cfg, 1)
    return cfg


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A MoCo checkpoint in the reference's layout, of random weights."""
    weights = load_backbone("random", seed=1).weights
    state = {f"module.encoder_q.{name}": value for name, value in weights.items()}
    state |= {"module.encoder_q.fc.weight": torch.zeros(128, 2048), "module.queue": torch.zeros(1)}
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint_0003.pth.tar"
    torch.save({"epoch": 4, "arch": "resnet50", "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def pickled(checkpoint: Path) -> dict[str, Any]:
    """What the converter writes, as a dictionary that a test may damage."""
    backbone = load_backbone(checkpoint)
    model = {to_detectron2(name): tensor.numpy() for name, tensor in backbone.weights.items()}
    return {
        "model": model,
        "__author__": "MoCo Transfer",
        "matching_heuristics": True,
        EXTRA_KEY: {"facts": backbone.facts.as_dict()},
    }


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return detection.build_detector(load())


def write(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "weights.pkl"
    path.write_bytes(pickle.dumps(content, protocol=3))
    return str(path)


# --- the head -------------------------------------------------------------------------------------


def test_the_head_is_in_detectron2s_registry_under_the_papers_name() -> None:
    assert ROI_HEADS_REGISTRY.get("Res5ROIHeadsExtraNorm") is detection.Res5ROIHeadsExtraNorm


def test_a_head_that_another_project_registered_first_is_no_obstacle() -> None:
    code = (
        "from detectron2.modeling import ROI_HEADS_REGISTRY as r\n"
        "class Res5ROIHeadsExtraNorm: pass\n"
        "r.register(Res5ROIHeadsExtraNorm)\n"
        "import transfer.detection\n"
        "print(r.get('Res5ROIHeadsExtraNorm') is Res5ROIHeadsExtraNorm)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@torch.no_grad()
def test_what_leaves_res5_is_normalised_in_every_channel(model: nn.Module) -> None:
    features = torch.randn(6, 1024, 14, 14, generator=torch.Generator().manual_seed(0))
    out = model.roi_heads.res5.train()(features)
    assert out.shape == (6, 2048, 7, 7)
    assert out.mean((0, 2, 3)).abs().max() < 1e-3
    assert (out.std((0, 2, 3)) - 1).abs().max() < 0.05


@pytest.mark.parametrize(("norm", "kind"), [("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm)])
def test_the_extra_norm_is_the_recipes_own_and_is_trained(norm: str, kind: type) -> None:
    head = detection.build_detector(load(COCO, "MODEL.RESNETS.NORM", norm)).roi_heads
    extra = head.res5.norm
    assert isinstance(extra, kind)
    assert extra.num_features == 2048
    assert all(p.requires_grad for p in extra.parameters())


def test_a_recipe_without_a_norm_is_refused() -> None:
    with pytest.raises(UserError, match=r"MODEL.RESNETS.NORM: is empty"):
        detection.build_detector(load(COCO, "MODEL.RESNETS.NORM", ""))


@pytest.mark.parametrize(
    ("file", "keys", "parameters", "new"),
    [
        ("voc_R50_C4_24k_moco", 333, 33_234_160, 15),
        ("coco_R50_C4_1x_moco", 337, 35_966_828, 19),
    ],
)
def test_published_models_have_the_references_size_and_take_every_tensor(
    file: str, keys: int, parameters: int, new: int, checkpoint: Path
) -> None:
    cfg = load(CONFIGS / f"{file}.yaml", "MODEL.WEIGHTS", str(checkpoint))
    built = detection.build_detector(cfg)
    state = built.state_dict()
    assert len(state) == keys
    assert sum(p.numel() for p in built.parameters() if p.requires_grad) == parameters
    before = {key: value.clone() for key, value in state.items()}
    facts = detection.fill_backbone(built, cfg)
    assert facts["tensors_landed"] == 265
    assert keys - 318 == new
    changed = {key for key, value in built.state_dict().items() if not value.equal(before[key])}
    assert not [key for key in changed if "rpn" in key or "predictor" in key or "res5.norm" in key]


# --- weights --------------------------------------------------------------------------------------


def test_a_converted_file_lands_bit_for_bit(model, pickled, tmp_path) -> None:
    path = write(tmp_path, pickled)
    facts = detection.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", path))
    state = model.state_dict()
    for name, array in pickled["model"].items():
        place = f"roi_heads.{name}" if name.startswith("res5") else f"backbone.{name}"
        assert np.array_equal(state[place].numpy(), array), name
    assert (facts["name"], facts["epoch"], facts["file"]) == ("checkpoint_0003.pth.tar", 4, path)
    assert len(facts["sha256"]) == 64


def test_a_checkpoint_and_its_conversion_give_the_same_detector(
    model, checkpoint, pickled, tmp_path
) -> None:
    detection.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", write(tmp_path, pickled)))
    first = {key: value.clone() for key, value in model.state_dict().items()}
    detection.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", str(checkpoint)))
    assert all(value.equal(first[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("missing", r"1 of 318 .* are missing, first 'layer2\.0\.conv2\.weight'"),
        ("renamed", r"1 of 318 .* are missing, first 'layer2\.0\.conv2\.weight'"),
        ("shaped", r"'layer2\.0\.conv2\.weight' \(found \(128, 128, 1, 1\), want \(128, 128, 3"),
    ],
)
def test_a_damaged_file_is_refused_and_nothing_lands(
    model, pickled, tmp_path, damage: str, complaint: str
) -> None:
    name = "res3.0.conv2.weight"
    arrays = {key: np.asarray(value + 1) for key, value in pickled["model"].items()}
    if damage == "shaped":
        arrays[name] = arrays[name][:, :, :1, :1]
    else:
        kept = arrays.pop(name)
        if damage == "renamed":
            arrays["res3.0.conv9.weight"] = kept
    path = write(tmp_path, pickled | {"model": arrays})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=complaint):
        detection.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", path))
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "pairs",
    [
        ("INPUT.FORMAT", "BGR"),
        ("MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"),
        ("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", "True"),
    ],
    ids=lambda pairs: pairs[0],
)
def test_pixels_that_the_weights_do_not_expect_are_refused(model, checkpoint, pairs) -> None:
    cfg = load(COCO, "MODEL.WEIGHTS", str(checkpoint), *pairs)
    with pytest.raises(UserError) as refusal:
        detection.fill_backbone(model, cfg)
    line = str(refusal.value)
    found, fix = line.split("; set ")
    assert pairs[0] in found
    assert pairs[0] in fix
    detection.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", str(checkpoint)))  # as it is told


def test_random_init_is_asked_for_by_the_empty_word(model) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    facts = detection.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", "", "SEED", "7"))
    assert facts == {"name": "random", "sha256": None, "method": "random init", "seed": 7}
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def trained(folder: Path, model: nn.Module, **changes: Any) -> Path:
    path = folder / "model_final.pth"
    state = {k: v for k, v in (model.state_dict() | changes).items() if v is not None}
    torch.save({"model": state}, path)
    return path


def test_a_trained_detector_loads_whole_or_not_at_all(model, tmp_path) -> None:
    cfg, key = load(), "roi_heads.res5.norm.weight"
    value = model.state_dict()[key].clone()
    facts = detection.load_detector(model, trained(tmp_path, model, **{key: value + 1}), cfg)
    assert model.state_dict()[key].equal(value + 1)
    assert facts["method"] == "unknown"
    assert len(facts["detector_sha256"]) == 64
    for changes, complaint in (
        ({key: None}, rf"1 of 337 tensors are missing, first '{re.escape(key)}'"),
        ({"extra": value}, "1 of 337 tensors are left over, first 'extra'"),
        ({key: value[:7]}, "has shape"),
    ):
        with pytest.raises(UserError, match=complaint):
            detection.load_detector(model, trained(tmp_path, model, **changes), cfg)


def test_a_backbone_is_not_taken_for_a_trained_detector(model, checkpoint) -> None:
    with pytest.raises(UserError, match="holds no trained detector"):
        detection.load_detector(model, checkpoint, load())


def test_a_truncated_detector_is_refused(model, tmp_path) -> None:
    path = trained(tmp_path, model)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="is damaged or no checkpoint"):
        detection.load_detector(model, path, load())


# --- training -------------------------------------------------------------------------------------


def batch(cfg: CfgNode) -> list[dict[str, Any]]:
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 50.0]]))
    instances.gt_classes = torch.tensor([0])
    instances.gt_masks = PolygonMasks([[np.array([8.0, 8, 40, 8, 40, 50, 8, 50])]])
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    return [{"image": image, "instances": instances, "height": 64, "width": 64}]


@pytest.mark.parametrize("precision", recipes.PRECISIONS)
def test_a_step_trains_the_whole_detector_in_float32_parameters(precision: str) -> None:
    cfg = load(COCO, "MOCO.PRECISION", precision)
    built = detection.build_detector(cfg).train()
    kinds: list[torch.dtype] = []
    watch = built.backbone.stem.conv1.register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    with EventStorage():
        losses = built(batch(cfg))
    watch.remove()
    sum(losses.values()).backward()
    without = [name for name, p in built.named_parameters() if p.grad is None]
    assert without == []
    assert {p.dtype for p in built.parameters()} == {torch.float32}
    assert kinds == [torch.bfloat16 if precision == "bf16" else torch.float32]


# --- evaluation -----------------------------------------------------------------------------------


class Oracle(nn.Module):
    """A detector that knows the truth, and may be told to miss it by some pixels."""

    def __init__(self, loaded: datasets.Loaded, shift: float) -> None:
        super().__init__()
        self.truth = {image["image_id"]: image["annotations"] for image in loaded.dicts}
        self.shift = shift

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"instances": self.find(image)} for image in inputs]

    def find(self, image: dict[str, Any]) -> Instances:
        known = self.truth[image["image_id"]]
        size = (image["height"], image["width"])
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in known]
        found = Instances(size)
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32) + self.shift)
        found.scores = torch.full((len(known),), 0.9)
        found.pred_classes = torch.zeros(len(known), dtype=torch.int64)
        if known and "segmentation" in known[0]:
            outlines = [[np.array(p) for p in a["segmentation"]] for a in known]
            found.pred_masks = BitMasks.from_polygon_masks(PolygonMasks(outlines), *size).tensor
        return found


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        (COCO, [f"coco/{kind}_AP{at}" for kind in ("box", "mask") for at in ("", "50", "75")]),
        (VOC, ["voc07/AP", "voc07/AP50", "voc07/AP75"]),
    ],
    ids=["coco", "voc"],
)
def test_a_perfect_detector_scores_a_hundred_and_a_blind_one_nothing(file, wanted) -> None:
    cfg = load(file)
    test = datasets.load(cfg.DATASETS.TEST, training=False)
    perfect, shown = detection.evaluate(cfg, Oracle(test, 0.0), test, quiet=True)
    assert list(perfect) == wanted
    assert all(value > 99 for key, value in perfect.items() if "mask" not in key)
    assert perfect.get("coco/mask_AP50", 100) > 99
    assert len(shown) == detection.PICTURES
    assert all(len(one.boxes) == len(one.true_boxes) for one in shown)
    blind, _ = detection.evaluate(cfg, Oracle(test, 60.0), test, quiet=True)
    assert all(value < 2 for key, value in blind.items() if "mask" not in key)
