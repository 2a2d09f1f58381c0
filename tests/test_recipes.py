import math
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import detectron2
from detectron2.config import get_cfg

from convert import released
from convert.errors import UserError
from convert.files import ROOT
from convert.pixels import CAFFE_PIXELS, IMAGENET_PIXELS
from transfer.detection import recipes
from transfer.detection.recipes import (
    add_config,
    checkpoint_every,
    fit_to_machine,
    flatten,
    images_at_once,
    load_recipe,
    protocol,
    scale_to_gpus,
)

CONFIGS = ROOT / "configs"
BASE = CONFIGS / "Base-RCNN-C4-BN.yaml"  # the reference's, which is no recipe by itself
# DensePose's load where its project is installed: tests/test_dense_pose.py.
RECIPES = sorted({*CONFIGS.glob("*.yaml")} - {BASE, *CONFIGS.glob("densepose_*.yaml")})
FROZEN = sorted(CONFIGS.glob("*_frozenBN.yaml"))
PARTS = sorted((CONFIGS / "parts").glob("*.yaml"))
VOC = CONFIGS / "voc_R50_C4_24k_moco.yaml"
COCO = CONFIGS / "coco_R50_C4_1x_moco.yaml"
# The reference's names -> ours.
REFERENCE = {
    "pascal_voc_R_50_C4_24k": "voc_R50_C4_24k_supervised",
    "pascal_voc_R_50_C4_24k_moco": "voc_R50_C4_24k_moco",
    "coco_R_50_C4_2x": "coco_R50_C4_2x_supervised",
    "coco_R_50_C4_2x_moco": "coco_R50_C4_2x_moco",
}
TASKS = {
    "cityscapes_R50_FPN_24k": (24000, [18000]),
    "lvis_R50_FPN_1x": (90000, [60000, 80000]),
    "lvis_R50_FPN_2x": (180000, [120000, 160000]),
    "voc_R50_C4_24k": (24000, [18000, 22000]),
    "voc_R50_C4_9k": (9000, [6750, 8250]),
    "voc_R50_C5_24k": (24000, [18000, 22000]),
    "coco_R50_C4_1x": (90000, [60000, 80000]),
    "coco_R50_C4_2x": (180000, [120000, 160000]),
    "coco_R50_FPN_1x": (90000, [60000, 80000]),
    "coco_R50_FPN_2x": (180000, [120000, 160000]),
    "coco_R50_FPN_6x": (540000, [480000, 520000]),
    "coco_R50_FPN_4conv1fc_1x": (90000, [60000, 80000]),
    "coco_keypoints_R50_FPN_2x": (180000, [120000, 160000]),
}
STARTS = ("moco", "supervised", "random")
MSRA = CAFFE_PIXELS.detectron2() | {"MODEL.RESNETS.STRIDE_IN_1X1": True}
TORCHVISION = IMAGENET_PIXELS.detectron2() | {"MODEL.RESNETS.STRIDE_IN_1X1": False}

# The reference's settings, and the papers'.
PUBLISHED = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "TEST.PRECISE_BN.ENABLED": True,
    "TEST.PRECISE_BN.NUM_ITER": 200,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.WEIGHT_DECAY": 0.0001,
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "MOCO.PRECISION": "fp32",
    "VERSION": 2,
}
PUBLISHED_VOC = PUBLISHED | {
    "MODEL.MASK_ON": False,
    "MODEL.ROI_HEADS.NUM_CLASSES": 20,
    "INPUT.MIN_SIZE_TRAIN": list(range(480, 801, 32)),
    "DATASETS.TRAIN": ["voc_2007_trainval", "voc_2012_trainval"],
    "DATASETS.TEST": ["voc_2007_test"],
    "SOLVER.STEPS": [18000, 22000],
    "SOLVER.MAX_ITER": 24000,
    "SOLVER.WARMUP_ITERS": 100,
}
_FPN = {
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 0,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.NORM": "",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "MODEL.ROI_MASK_HEAD.NORM": "",
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
}
_4CONV1FC = {
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
    "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
}
_C5 = {
    "MODEL.BACKBONE.NAME": "build_resnet_dilated_c5_backbone",
    "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.RESNETS.OUT_FEATURES": ["res5"],
    "MODEL.RPN.IN_FEATURES": ["c5"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["c5"],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.NORM": "",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
}
PUBLISHED_COCO = PUBLISHED | {
    "MODEL.MASK_ON": True,
    "MODEL.ROI_HEADS.NUM_CLASSES": 80,
    "INPUT.MIN_SIZE_TRAIN": list(range(640, 801, 32)),
    "DATASETS.TRAIN": ["coco_2017_train"],
    "DATASETS.TEST": ["coco_2017_val"],
    "SOLVER.STEPS": [60000, 80000],
    "SOLVER.MAX_ITER": 90000,
    "SOLVER.WARMUP_ITERS": 1000,
}


def written(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_shipped_recipe_means_to_us_what_it_means_to_detectron2(file: Path) -> None:
    theirs = get_cfg()
    add_config(theirs)
    theirs.merge_from_file(str(file), allow_unsafe=False)
    ours = flatten(load_recipe(file))
    assert ours | {"OUTPUT_DIR": "./output"} == flatten(theirs)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_recipe_of_the_three_starts_that_differ_in_nothing_else(
    task: str, start: str
) -> None:
    recipe = flatten(load_recipe(CONFIGS / f"{task}_{start}.yaml"))
    moco = flatten(load_recipe(CONFIGS / f"{task}_moco.yaml"))
    length, steps = TASKS[task]
    assert (recipe["SOLVER.MAX_ITER"], recipe["SOLVER.STEPS"]) == (length, steps)
    weights = {"moco": "output/weights.pkl", "supervised": "msra_resnet50", "random": ""}[start]
    fits = MSRA if start == "supervised" else TORCHVISION
    wanted = fits | {"MODEL.WEIGHTS": weights, "OUTPUT_DIR": recipe["OUTPUT_DIR"]}
    assert recipe == moco | wanted


def test_the_papers_norms_are_trained_and_synchronised_whatever_the_start() -> None:
    for file in (f for f in RECIPES if not f.stem.startswith("embedded") and f not in FROZEN):
        found = flatten(load_recipe(file))
        norm = "naiveSyncBN" if file.stem.endswith("naiveSyncBN") else "SyncBN"
        assert found["MODEL.RESNETS.NORM"] == norm
        assert found["MODEL.BACKBONE.FREEZE_AT"] == 0
        assert found["TEST.PRECISE_BN.ENABLED"]


def test_supervised_weights_are_asked_for_by_a_name_that_is_known() -> None:
    cfg = load_recipe(CONFIGS / "coco_R50_C4_1x_supervised.yaml")
    release = released.find(cfg.MODEL.WEIGHTS)
    assert release is not None
    assert release.pixels == CAFFE_PIXELS
    assert release.stride_in_1x1


@pytest.mark.parametrize("theirs", REFERENCE)
def test_a_name_of_the_reference_means_our_recipe(theirs: str) -> None:
    pair = ["OUTPUT_DIR", "x"]
    ours = load_recipe(CONFIGS / f"{REFERENCE[theirs]}.yaml", pair)
    assert load_recipe(CONFIGS / f"{theirs}.yaml", pair) == ours
    text = (CONFIGS / f"{theirs}.yaml").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line[0] != "#"] == [
        f'_BASE_: "{REFERENCE[theirs]}.yaml"'
    ]


def test_the_references_base_is_a_base_for_files_of_ones_own(tmp_path: Path) -> None:
    file = written(tmp_path, f"_BASE_: {BASE}\nDATASETS: {{TEST: [voc_2007_test]}}\n")
    found = flatten(load_recipe(file))
    wanted = {k: v for k, v in PUBLISHED.items() if not k.startswith("INPUT.M")} | MSRA
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("file", PARTS, ids=lambda file: file.stem)
def test_a_part_has_no_base_that_would_undo_the_part_before_it(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith("_BASE_")]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("voc_R50_C4_24k_moco", PUBLISHED_VOC),
        ("voc_R50_C5_24k_moco", PUBLISHED_VOC | _C5),
        ("coco_R50_C4_1x_moco", PUBLISHED_COCO),
        ("coco_R50_FPN_1x_moco", PUBLISHED_COCO | _FPN),
        ("coco_R50_FPN_4conv1fc_1x_moco", PUBLISHED_COCO | _FPN | _4CONV1FC),
    ],
)
def test_the_published_settings_are_these(name: str, wanted: dict[str, object]) -> None:
    found = flatten(load_recipe(CONFIGS / f"{name}.yaml"))
    assert {key: found[key] for key in wanted} == wanted


def zoo(name: str) -> dict[str, object]:
    """Load a recipe of Detectron2's own."""
    theirs = get_cfg()
    folder = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    theirs.merge_from_file(str(folder / f"{name}.yaml"))
    return flatten(theirs)


def test_fpn_is_detectron2s_own_but_for_the_papers_norms() -> None:
    before = zoo("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x")
    now = flatten(load_recipe(CONFIGS / "coco_R50_FPN_1x_supervised.yaml"))
    assert {key for key in before if before[key] != now[key]} == {
        *("MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.NORM", "MODEL.FPN.NORM"),
        *("TEST.PRECISE_BN.ENABLED", "MODEL.WEIGHTS", "SEED", "OUTPUT_DIR"),
    }


def test_dilated_c5_is_detectron2s_own_but_for_the_papers_convolution_and_norms() -> None:
    before = zoo("COCO-Detection/faster_rcnn_R_50_DC5_1x")
    now = flatten(load_recipe(CONFIGS / "voc_R50_C5_24k_supervised.yaml"))
    voc = ("DATASETS.", "INPUT.MIN_SIZE_TRAIN", "MODEL.ROI_HEADS.NUM_CLASSES", "SOLVER.")
    changed = {key for key in before if before[key] != now[key] and not key.startswith(voc)}
    assert changed == {
        *("MODEL.BACKBONE.NAME", "MODEL.RPN.IN_FEATURES", "MODEL.ROI_HEADS.IN_FEATURES"),
        *("MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.NORM"),
        *("TEST.PRECISE_BN.ENABLED", "MODEL.WEIGHTS", "SEED", "OUTPUT_DIR"),
        "MODEL.ROI_MASK_HEAD.NUM_CONV",  # of a head that Faster R-CNN has not
    }


def test_keypoints_are_detectron2s_own_but_for_the_papers_norms_and_its_length() -> None:
    before = zoo("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x")
    now = flatten(load_recipe(CONFIGS / "coco_keypoints_R50_FPN_2x_supervised.yaml"))
    assert {key for key in before if before[key] != now[key]} == {
        *("MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.NORM", "MODEL.FPN.NORM"),
        *("TEST.PRECISE_BN.ENABLED", "MODEL.WEIGHTS", "SEED", "OUTPUT_DIR"),
        *("SOLVER.STEPS", "SOLVER.MAX_ITER"),
    }


def test_lvis_is_detectron2s_own_but_for_the_papers_norms() -> None:
    before = zoo("LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x")
    now = flatten(load_recipe(CONFIGS / "lvis_R50_FPN_1x_supervised.yaml"))
    assert {key for key in before if before[key] != now[key]} == {
        *("MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.NORM", "MODEL.FPN.NORM"),
        *("TEST.PRECISE_BN.ENABLED", "MODEL.WEIGHTS", "SEED", "OUTPUT_DIR"),
    }


def test_cityscapes_is_detectron2s_own_but_for_norms_weights_and_masks() -> None:
    before = zoo("Cityscapes/mask_rcnn_R_50_FPN")
    now = flatten(load_recipe(CONFIGS / "cityscapes_R50_FPN_24k_supervised.yaml"))
    assert {key for key in before if before[key] != now[key]} == {
        *("MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.NORM", "MODEL.FPN.NORM"),
        *("TEST.PRECISE_BN.ENABLED", "MODEL.WEIGHTS", "SEED", "OUTPUT_DIR"),
        *("INPUT.MASK_FORMAT", "TEST.EVAL_PERIOD"),
    }
    assert now["INPUT.MASK_FORMAT"] == "bitmask"


@pytest.mark.parametrize("file", FROZEN, ids=lambda file: file.stem)
def test_a_frozen_recipe_differs_in_its_norms_alone(file: Path) -> None:
    tuned = flatten(load_recipe(file.with_stem(file.stem.removesuffix("_frozenBN"))))
    frozen = flatten(load_recipe(file))
    assert {key: frozen[key] for key in tuned if tuned[key] != frozen[key]} == {
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.FPN.NORM": "",
        "TEST.PRECISE_BN.ENABLED": False,
        "OUTPUT_DIR": frozen["OUTPUT_DIR"],
    }


def test_a_header_says_what_a_reader_needs() -> None:
    for file in RECIPES:
        if file.stem in REFERENCE:
            continue
        head = [x for x in file.read_text(encoding="utf-8").splitlines() if x.startswith("#")]
        for word in (
            f"#   command    python transfer/train_net.py --config configs/{file.name}",
            "#   expect     ",
            "#   hardware   ",
            "#   stands for ",
        ):
            assert [line for line in head if line.startswith(word)], f"{file.name}: {word}"


def test_an_unknown_key_is_blamed_on_its_file_with_the_nearest_ones(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("SOLVER: {BASE_RL: 0.1}\n", encoding="utf-8")
    file = written(tmp_path, '_BASE_: "base.yaml"\nSOLVER: {BASE_LR: 0.1}\n')
    with pytest.raises(
        UserError, match=r"base\.yaml: unknown key 'SOLVER.BASE_RL'.*SOLVER.BASE_LR"
    ):
        load_recipe(file)


def test_an_unknown_key_on_the_command_line_names_the_nearest_ones() -> None:
    with pytest.raises(UserError, match=r"command line: unknown key 'SOLVER.MAXITER'.*MAX_ITER"):
        load_recipe(VOC, ["SOLVER.MAXITER", "3"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("MODEL: !!python/object/apply:os.getcwd []\n", "is not plain YAML"),
        ("SOLVER: [1, 2]\n", "unknown key 'SOLVER'"),
        ("- 1\n", "found a list"),
        ("SOLVER: {MAX_ITER: many}\n", "MAX_ITER"),
        ("VERSION: 1\n", "VERSION is 1, want 2"),
        ("_BASE_: gone.yaml\n", r"gone\.yaml: cannot be read"),
        ("SOLVER: {AMP: {ENABLED: True}}\n", "MOCO.PRECISION bf16"),
        ("MOCO: {PRECISION: fp16}\n", "want fp32 or bf16"),
        ("DATASETS: {TEST: [a, b]}\n", "found 2 sets"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_recipe(written(tmp_path, text))


def test_bad_pairs_are_refused() -> None:
    with pytest.raises(UserError, match="'SEED' has no value"):
        load_recipe(VOC, ["SEED"])
    with pytest.raises(UserError, match=r"command line: .*SEED"):
        load_recipe(VOC, ["SEED", "x"])


def test_the_default_output_is_named_after_recipe_and_weights() -> None:
    def output(weights: str) -> str:
        return str(load_recipe(VOC, ["MODEL.WEIGHTS", weights]).OUTPUT_DIR)

    assert output("") == "output/detection/voc_R50_C4_24k_moco/random"
    assert output("a/ckpt_0199.pth.tar") == "output/detection/voc_R50_C4_24k_moco/ckpt_0199"
    assert load_recipe(VOC, ["OUTPUT_DIR", "x"]).OUTPUT_DIR == "x"
    assert load_recipe(VOC, ["OUTPUT_DIR", "2007"]).OUTPUT_DIR == "2007"


def test_a_cpu_takes_the_place_of_a_missing_gpu_and_says_so(monkeypatch) -> None:
    monkeypatch.setattr(recipes.torch.cuda, "is_available", lambda: False)
    cfg = load_recipe(VOC)
    assert fit_to_machine(cfg, 2) == [
        "device: cpu (no CUDA device was found)",
        "norm: naiveSyncBN (SyncBN refuses tensors on a CPU)",
    ]
    assert (cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM) == ("cpu", "naiveSyncBN")


def test_steps_after_the_end_are_left_out_and_named() -> None:
    cfg = load_recipe(VOC, ["SOLVER.MAX_ITER", "18000", "MODEL.DEVICE", "cpu"])
    assert fit_to_machine(cfg, 1) == ["steps: without [18000, 22000], as SOLVER.MAX_ITER is 18000"]
    assert cfg.SOLVER.STEPS == ()
    cfg = load_recipe(VOC, ["SOLVER.MAX_ITER", "18001", "MODEL.DEVICE", "cpu"])
    fit_to_machine(cfg, 1)
    assert cfg.SOLVER.STEPS == (18000,)


def test_a_negative_seed_is_drawn_and_recorded() -> None:
    cfg = load_recipe(VOC, ["SEED", "-1", "MODEL.DEVICE", "cpu"])
    assert fit_to_machine(cfg, 1) == [f"seed: {cfg.SEED} (drawn, as SEED was negative)"]
    assert cfg.SEED >= 0


def test_a_protocol_is_what_changes_the_number_and_nothing_else() -> None:
    def of(*pairs: str, processes: int = 1) -> dict[str, object]:
        return protocol(load_recipe(VOC, pairs), processes)

    same = ["OUTPUT_DIR", "x", "MODEL.WEIGHTS", "", "SEED", "3", "MODEL.DEVICE", "cpu"]
    assert of(*same, "DATALOADER.NUM_WORKERS", "1") == of()
    assert of("MOCO.PRECISION", "bf16") != of()
    assert of("INPUT.FORMAT", "BGR") != of()
    assert of(processes=2) == of()  # synchronised over all processes
    assert of("MODEL.RESNETS.NORM", "BN", processes=2) != of("MODEL.RESNETS.NORM", "BN")


def test_parts_of_a_batch_are_in_the_fingerprint_as_the_images_of_a_norm() -> None:
    cfg = load_recipe(VOC, ["MOCO.ACCUMULATE", "8"])
    assert protocol(cfg, 1)["norm_group_images"] == images_at_once(cfg, 1) == 2
    assert protocol(load_recipe(VOC), 8)["norm_group_images"] == 16
    plain = ["MODEL.RESNETS.NORM", "BN"]  # one GPU as eight, norm by norm and loss by loss
    one, eight = load_recipe(VOC, [*plain, "MOCO.ACCUMULATE", "8"]), load_recipe(VOC, plain)
    assert protocol(one, 1) == protocol(eight, 8)
    assert protocol(one, 1)["norm_group_images"] == 2


def test_the_linear_rule_scales_everything_and_says_old_and_new() -> None:
    cfg = load_recipe(VOC, ["TEST.EVAL_PERIOD", "1000"])
    lines = scale_to_gpus(cfg, 2)
    assert lines[0] == "scaled from 8 GPUs to 2:"
    assert [line.strip() for line in lines[1:]] == [
        "SOLVER.BASE_LR: 0.02 -> 0.005",
        "SOLVER.CHECKPOINT_PERIOD: 5000 -> 20000",
        "SOLVER.IMS_PER_BATCH: 16 -> 4",
        "SOLVER.MAX_ITER: 24000 -> 96000",
        "SOLVER.STEPS: [18000, 22000] -> [72000, 88000]",
        "SOLVER.WARMUP_ITERS: 100 -> 400",
        "TEST.EVAL_PERIOD: 1000 -> 4000",
    ]
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.STEPS) == (4, (72000, 88000))
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 0
    assert scale_to_gpus(load_recipe(VOC), 8) == ["scaled from 8 GPUs to 8:"]


def test_on_a_cpu_every_norm_that_would_refuse_takes_its_stand_in() -> None:
    cfg = load_recipe(CONFIGS / "coco_R50_FPN_4conv1fc_1x_moco.yaml", ["MODEL.DEVICE", "cpu"])
    assert fit_to_machine(cfg, 2) == ["norm: naiveSyncBN (SyncBN refuses tensors on a CPU)"]
    names = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    assert {cfg.MODEL[name].NORM for name in names} == {"naiveSyncBN"}


def test_how_often_a_state_is_saved() -> None:
    def every(*pairs: str) -> tuple[int, float]:
        return checkpoint_every(load_recipe(VOC, pairs))

    assert every() == (5000, math.inf)
    assert every("MOCO.CHECKPOINT_EVERY", "200") == (200, math.inf)
    assert every("MOCO.CHECKPOINT_EVERY", "5m") == (0, 300.0)
