"""DensePose's recipes: they load and build with its project, and say how to get it without."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import get_cfg

from convert.errors import UserError
from convert.files import ROOT
from convert.names import is_backbone_name, land, to_detectron2
from convert.resnets import build_network
from tests.test_recipes import MSRA, TORCHVISION
from transfer import train_net
from transfer.detection import recipes, weights

STARTS = ("moco", "supervised", "random")
INSTALLED = importlib.util.find_spec("densepose") is not None
# The keys that recipes set, as the project names them.
KEYS = """
from detectron2.config import CfgNode

def add_densepose_config(cfg):
    cfg.MODEL.DENSEPOSE_ON = True
    cfg.MODEL.ROI_DENSEPOSE_HEAD = CfgNode({"NAME": "", "POOLER_TYPE": "ROIAlignV2"})
"""


def recipe(start: str) -> Path:
    return ROOT / "configs" / f"densepose_R50_FPN_s1x_{start}.yaml"


@pytest.fixture
def keys_only(tmp_path, monkeypatch):
    """A package of the project's name that has its keys, and nothing that builds or trains."""
    (tmp_path / "stub" / "densepose").mkdir(parents=True)
    (tmp_path / "stub" / "densepose" / "__init__.py").write_text(KEYS)
    monkeypatch.delitem(sys.modules, "densepose", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))
    yield
    sys.modules.pop("densepose", None)


@pytest.mark.parametrize("start", STARTS)
def test_without_the_project_one_line_says_how_to_get_it(start, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    absent = lambda name, *more: None if name == "densepose" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(UserError) as refused:
        train_net.main(["--config", str(recipe(start)), "MODEL.WEIGHTS", ""])
    line = str(refused.value)
    assert (
        "wants Detectron2's DensePose project, not installed: pip install av, and then pip" in line
    )
    assert "detectron2.git#subdirectory=projects/DensePose" in line
    assert "\n" not in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", STARTS)
def test_a_recipe_is_the_projects_s1x_with_the_papers_norms(start, keys_only) -> None:
    found = recipes.flatten(recipes.load_recipe(recipe(start)))
    wanted = {
        "MODEL.ROI_HEADS.NAME": "DensePoseROIHeads",
        "MODEL.ROI_HEADS.NUM_CLASSES": 1,
        "MODEL.ROI_DENSEPOSE_HEAD.NAME": "DensePoseV1ConvXHead",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.RESNETS.NORM": "SyncBN",
        "MODEL.FPN.NORM": "SyncBN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.MASK_ON": False,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.BASE_LR": 0.002,
        "SOLVER.WARMUP_FACTOR": 0.1,
        "SOLVER.MAX_ITER": 130000,
        "SOLVER.STEPS": [100000, 120000],
        "DATASETS.TEST": ["densepose_coco_2014_minival"],
        **(MSRA if start == "supervised" else TORCHVISION),
    }
    assert {key: found[key] for key in wanted} == wanted


def test_the_projects_own_script_reads_it_as_we_do(keys_only) -> None:
    """It adds its keys and merges the file; ours beside them are not needed."""
    from densepose import add_densepose_config

    theirs = get_cfg()
    add_densepose_config(theirs)
    theirs.merge_from_file(str(recipe("moco")), allow_unsafe=False)
    before = recipes.flatten(theirs)
    ours = recipes.flatten(recipes.load_recipe(recipe("moco"))) | {"OUTPUT_DIR": "./output"}
    assert {key: ours[key] for key in before} == before


def test_it_is_sent_to_the_script_that_trains_and_measures_it(keys_only) -> None:
    with pytest.raises(UserError, match=r"DensePose/train_net\.py --config-file .*s1x_moco\.yaml"):
        train_net.main(["--config", str(recipe("moco")), "MODEL.WEIGHTS", "", "SEED", "0"])


@pytest.mark.skipif(not INSTALLED, reason="needs Detectron2's DensePose project")
@pytest.mark.parametrize("start", STARTS)
def test_with_the_project_every_recipe_builds_and_has_a_place_for_the_backbone(start) -> None:
    with torch.device("meta"):
        cfg = recipes.load_recipe(recipe(start), ["MODEL.DEVICE", "meta"])
        built = weights.build_detector(cfg)
        network = build_network("resnet50")
    names = [to_detectron2(name) for name in network.state_dict() if is_backbone_name(name)]
    assert len(set(land(names, built.state_dict()).values())) == 318
    assert any("densepose" in name for name in built.state_dict())
