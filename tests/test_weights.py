"""Weights land in Detectron2's real models whole, or not at all."""

import pickle
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")

import numpy as np
import torch
from torch import nn

from convert import released
from convert.backbone import load_backbone
from convert.errors import UserError
from convert.facts import EXTRA_KEY
from convert.names import is_backbone_name, land, to_detectron2
from convert.resnets import build_network
from tests.detectors import COCO, CONFIGS, load
from transfer.detection import recipes, weights

TASKS = ("voc", "coco", "lvis", "cityscapes")
MATRIX = sorted(
    [file for task in TASKS for file in CONFIGS.glob(f"{task}_*.yaml")], key=lambda file: file.stem
)
MATRIX = [file for file in MATRIX if "_R50_" in file.stem]  # without the reference's names


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
    return weights.build_detector(load())


def write(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "weights.pkl"
    path.write_bytes(pickle.dumps(content, protocol=3))
    return str(path)


# architecture -> keys of the model, parameters, of the keys those that no backbone fills: the
# region proposals (6) and box predictor (4), and in C4 the extra norm (5), in COCO the mask head
# (4), in FPN its own convolutions and norms (48, with a norm's 5), the heads of 2fc or 4conv1fc, in
# C5 the narrowing convolution with its norm (6) and the head of 2fc (4), for keypoints theirs (18).
SIZES = {
    "cityscapes_R50_FPN": (392, 44_010_880, 74),
    "lvis_R50_FPN": (392, 50_587_684, 74),
    "lvis_R50_FPN_frozenBN": (307, 50_532_516, 42),  # frozen norms count no batches; FPN has none
    "voc_R50_C4": (333, 33_234_160, 15),
    "voc_R50_C5": (338, 62_188_784, 20),
    "coco_R50_C4": (337, 35_966_828, 19),
    "coco_R50_FPN": (392, 44_398_384, 74),
    "coco_R50_FPN_4conv1fc": (430, 45_711_152, 112),
    "coco_keypoints_R50_FPN": (398, 59_188_326, 80),
}


def architecture(file: Path) -> str:
    if file.stem.endswith("frozenBN"):
        return "lvis_R50_FPN_frozenBN"
    return next(name for name in sorted(SIZES, reverse=True) if file.stem.startswith(name))


@pytest.mark.parametrize("file", MATRIX, ids=lambda file: file.stem)
def test_every_recipe_builds_its_model_and_has_a_place_for_every_backbone_tensor(
    file: Path,
) -> None:
    keys, parameters, new = SIZES[architecture(file)]
    with torch.device("meta"):
        built = weights.build_detector(recipes.load_recipe(file, ["MODEL.DEVICE", "meta"]))
        network = build_network("resnet50")
    names = [to_detectron2(name) for name in network.state_dict() if is_backbone_name(name)]
    state = built.state_dict()
    assert len(state) == keys
    assert sum(p.numel() for p in built.parameters() if p.requires_grad) == parameters
    places = land(names, state)
    assert len(names) == 318
    assert len(set(places.values())) == (265 if file.stem.endswith("frozenBN") else 318)
    assert len(state.keys() - set(places.values())) == new


@pytest.mark.parametrize(
    "name",
    ["voc_R50_C4_24k", "voc_R50_C5_24k", "coco_R50_C4_1x", "coco_R50_FPN_1x", "lvis_R50_FPN_2x"],
)
def test_published_models_take_every_tensor_and_nothing_else_moves(
    name: str, checkpoint: Path
) -> None:
    cfg = load(CONFIGS / f"{name}_moco.yaml", "MODEL.WEIGHTS", str(checkpoint))
    built = weights.build_detector(cfg)
    before = {key: value.clone() for key, value in built.state_dict().items()}
    facts = weights.fill_backbone(built, cfg)
    assert facts["tensors_landed"] == 265  # 318 less the 53 norms' counters
    changed = {key for key, value in built.state_dict().items() if not value.equal(before[key])}
    assert changed
    assert not [key for key in changed if not re.search(r"(^|\.)(stem|res[2-5]\.\d)", key)]


def test_supervised_weights_land_by_their_name_with_their_own_pixels(
    model, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("MOCO_TRANSFER_CACHE", str(tmp_path))
    release = released.find("msra_resnet50")
    assert release is not None
    path = released.place(release)
    path.parent.mkdir(parents=True)
    random = load_backbone("random", seed=2).weights
    arrays = {to_detectron2(k): v.numpy() for k, v in random.items() if "tracked" not in k}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}, protocol=3))
    facts = weights.fill_backbone(model, load(CONFIGS / "coco_R50_C4_1x_supervised.yaml"))
    assert (facts["name"], facts["tensors_landed"]) == ("msra_resnet50", 265)
    assert model.state_dict()["backbone.stem.conv1.weight"].equal(random["conv1.weight"])
    moco = load(CONFIGS / "voc_R50_C4_24k_moco.yaml", "MODEL.WEIGHTS", "msra_resnet50")
    with pytest.raises(UserError) as refusal:  # as whoever forgets the pixels
        weights.fill_backbone(model, moco)
    assert 'INPUT.FORMAT "BGR"' in str(refusal.value)
    assert 'MODEL.RESNETS.STRIDE_IN_1X1 "True"' in str(refusal.value)


def test_weights_of_another_depth_are_refused_with_the_keys_to_set(model, tmp_path) -> None:
    state = build_network("resnet18").state_dict()
    path = tmp_path / "ckpt.pth"
    torch.save({"state_dict": {f"module.encoder_q.{k}": v for k, v in state.items()}}, path)
    with pytest.raises(UserError, match=r'not trained with .*DEPTH 50.*; set .*DEPTH "18"'):
        weights.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", str(path)))


def test_a_converted_file_lands_bit_for_bit(model, pickled, tmp_path) -> None:
    path = write(tmp_path, pickled)
    facts = weights.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", path))
    state = model.state_dict()
    for name, array in pickled["model"].items():
        place = f"roi_heads.{name}" if name.startswith("res5") else f"backbone.{name}"
        assert np.array_equal(state[place].numpy(), array), name
    assert (facts["name"], facts["epoch"], facts["file"]) == ("checkpoint_0003.pth.tar", 4, path)
    assert len(facts["sha256"]) == 64


def test_a_checkpoint_and_its_conversion_give_the_same_detector(
    model, checkpoint, pickled, tmp_path
) -> None:
    weights.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", write(tmp_path, pickled)))
    first = {key: value.clone() for key, value in model.state_dict().items()}
    weights.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", str(checkpoint)))
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
        weights.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", path))
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
        weights.fill_backbone(model, cfg)
    line = str(refusal.value)
    found, fix = line.split("; set ")
    assert pairs[0] in found
    assert pairs[0] in fix
    weights.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", str(checkpoint)))  # as it is told


def test_random_init_is_asked_for_by_the_empty_word(model) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    facts = weights.fill_backbone(model, load(COCO, "MODEL.WEIGHTS", "", "SEED", "7"))
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
    facts = weights.load_detector(model, trained(tmp_path, model, **{key: value + 1}), cfg)
    assert model.state_dict()[key].equal(value + 1)
    assert facts["method"] == "unknown"
    assert len(facts["detector_sha256"]) == 64
    for changes, complaint in (
        ({key: None}, rf"1 of 337 tensors are missing, first '{re.escape(key)}'"),
        ({"extra": value}, "1 of 337 tensors are left over, first 'extra'"),
        ({key: value[:7]}, "has shape"),
    ):
        with pytest.raises(UserError, match=complaint):
            weights.load_detector(model, trained(tmp_path, model, **changes), cfg)


def test_a_backbone_is_not_taken_for_a_trained_detector(model, checkpoint) -> None:
    with pytest.raises(UserError, match="holds no trained detector"):
        weights.load_detector(model, checkpoint, load())


def test_a_model_zoos_pickle_is_a_trained_detector_too(model, tmp_path) -> None:
    """NumPy arrays under Detectron2's names, with what Detectron2 makes anew."""
    key = "roi_heads.res5.norm.weight"
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays[key] = arrays[key] + 2
    arrays["proposal_generator.anchor_generator.cell_anchors.3"] = np.zeros((3, 4), np.float32)
    mean = np.array([123.675, 116.28, 103.53], np.float32).reshape(3, 1, 1)
    zoo = {"model": {**arrays, "pixel_mean": mean}, "__author__": "Detectron2 Model Zoo"}
    path = tmp_path / "model_final_f10217.pkl"
    path.write_bytes(pickle.dumps(zoo))
    weights.load_detector(model, path, load())
    assert model.state_dict()[key].equal(torch.tensor(arrays[key]))
    zoo["model"]["pixel_mean"] = mean[::-1].copy()
    path.write_bytes(pickle.dumps(zoo))
    with pytest.raises(UserError, match=r"set MODEL.PIXEL_MEAN \"\[103.53, 116.28, 123.675\]"):
        weights.load_detector(model, path, load())


def test_a_truncated_detector_is_refused(model, tmp_path) -> None:
    path = trained(tmp_path, model)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be read"):
        weights.load_detector(model, path, load())
