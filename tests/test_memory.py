from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from torch import nn

from convert.errors import UserError
from convert.files import ROOT
from transfer.detection import memory
from transfer.detection.recipes import images_at_once, load_recipe
from transfer.detection.weights import build_detector

COCO = ROOT / "configs" / "coco_R50_C4_1x_moco.yaml"
LANDSCAPE = [{"height": 480, "width": 640}]


def need(*pairs: str, images: int = 1, pixels: int = 800 * 1067) -> float:
    return memory.needed_bytes(load_recipe(COCO, pairs), pixels, images, nn.Identity()) / memory.GIB


def test_the_published_image_needs_what_was_measured_on_a_cpu() -> None:
    assert need() == pytest.approx(4.8, rel=0.15)


@pytest.mark.parametrize(
    ("recipe", "side", "images", "regions", "measured_gib"),
    [
        ("coco_R50_FPN_1x_moco", 320, 1, 128, 0.80),
        ("coco_R50_FPN_1x_moco", 320, 1, 512, 0.84),
        ("coco_R50_FPN_1x_moco", 320, 2, 128, 1.25),
        ("coco_R50_FPN_1x_moco", 640, 1, 128, 2.10),
        ("coco_R50_FPN_4conv1fc_1x_moco", 320, 1, 128, 0.81),
        ("voc_R50_C5_24k_moco", 320, 1, 128, 0.88),
        ("voc_R50_C5_24k_moco", 320, 2, 128, 1.18),
        ("voc_R50_C5_24k_moco", 640, 1, 512, 2.01),
        ("coco_keypoints_R50_FPN_2x_moco", 320, 1, 128, 0.97),
        ("coco_keypoints_R50_FPN_2x_moco", 320, 1, 512, 1.44),
        ("coco_keypoints_R50_FPN_2x_moco", 320, 2, 128, 1.53),
        ("coco_keypoints_R50_FPN_2x_moco", 640, 1, 128, 2.20),
    ],
)
def test_fpn_and_c5_need_no_more_than_is_estimated_and_not_much_less(
    recipe: str, side: int, images: int, regions: int, measured_gib: float
) -> None:
    pairs = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", str(regions), "MODEL.DEVICE", "meta"]
    cfg = load_recipe(ROOT / "configs" / f"{recipe}.yaml", pairs)
    with torch.device("meta"):
        model = build_detector(cfg)
    estimated = memory.needed_bytes(cfg, side * side, images, model) / memory.GIB
    assert measured_gib <= estimated <= 1.3 * measured_gib


def test_every_flag_that_the_refusal_names_lowers_the_need() -> None:
    assert need(images=8) < 0.6 * need(images=16)
    assert need(pixels=400 * 533) < need()
    assert need("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64") < need()
    cfg = load_recipe(COCO, ["MOCO.ACCUMULATE", "8"])
    assert images_at_once(cfg, 1) == images_at_once(load_recipe(COCO), 8) == 2
    assert need("MOCO.PRECISION", "bf16") < need()


def test_gradients_and_momentum_of_what_is_trained_are_counted() -> None:
    cfg, layer = load_recipe(COCO), nn.Linear(1024, 1024, bias=False)
    bare = memory.needed_bytes(cfg, 0, 0, nn.Identity())
    assert memory.needed_bytes(cfg, 0, 0, layer) - bare == 2 * 4 * 1024**2
    assert memory.needed_bytes(cfg, 0, 0, layer.requires_grad_(False)) == bare


def test_the_largest_image_is_measured_after_resizing() -> None:
    cfg = load_recipe(COCO, ["INPUT.MIN_SIZE_TRAIN", "(400,800)"])
    assert memory.largest_image(cfg, LANDSCAPE) == pytest.approx(800 * 1067, rel=0.001)
    long = [{"height": 100, "width": 1000}]
    assert memory.largest_image(cfg, long) == pytest.approx(133.3 * 1333, rel=0.001)


def test_a_batch_is_refused_exactly_where_it_does_not_fit(monkeypatch) -> None:
    cfg, model = load_recipe(COCO, ["MODEL.DEVICE", "cpu"]), nn.Identity()
    needed = memory.needed_bytes(cfg, memory.largest_image(cfg, LANDSCAPE), 16, model)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed)
    memory.check(cfg, LANDSCAPE, model, 1, 1)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 0.99 * needed)
    with pytest.raises(UserError, match=r"needs about \d+\.\d GiB.*IMS_PER_BATCH \(now 16;"):
        memory.check(cfg, LANDSCAPE, model, 1, 1)
    with pytest.raises(UserError):
        memory.check(cfg, LANDSCAPE, model, 2, 2)  # two processes of this machine share it
    memory.check(cfg, LANDSCAPE, model, 2, 1)  # two machines


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="asks Linux")
def test_a_container_with_a_limit_has_no_more_than_it_leaves(tmp_path, monkeypatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    whole = memory.available_bytes(cpu)
    assert 0 < whole < float("inf")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert memory.available_bytes(cpu) == 500000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(cpu) > 500000


def test_lvis_needs_what_detectron2s_zoo_has_for_it_above_coco() -> None:
    """7.1 GB and 3.4 GB, two images each; the larger heads' own tensors are counted elsewhere."""
    needs = [
        memory.needed_bytes(
            load_recipe(ROOT / "configs" / f"{task}_R50_FPN_1x_moco.yaml"), 10**6, 2, nn.Identity()
        )
        for task in ("coco", "lvis")
    ]
    assert needs[1] - needs[0] == pytest.approx((7.1 - 3.4) * 1e9, rel=0.05)
