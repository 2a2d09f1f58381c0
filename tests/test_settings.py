"""The settings that fit a backbone: what Detectron2 is told, and what a wrong recipe is told."""

from dataclasses import replace

import pytest
import torch
import yaml

from convert.certificate import convert
from convert.errors import UserError
from convert.facts import Facts, Options
from convert.pixels import CAFFE_PIXELS, IMAGENET_PIXELS, UNIT_PIXELS, Pixels, parse_pixels
from convert.resnets import ARCHS, build_network, detectron2_shape, expected_shapes
from convert.settings import check_recipe, detectron2_settings, settings_yaml

FACTS = Facts("a.pth", "0" * 64, "moco", "query", "resnet50", "MoCo v2")
# Parameters of the backbone without its classifier, in millions: MoCo v1, Table 1 counts 24, 46,
# 94 and 375 with heads; torchvision's own counts for the others.
MILLIONS = {
    "resnet18": 11.2,
    "resnet34": 21.3,
    "resnet50": 23.5,
    "resnet101": 42.5,
    "resnet152": 58.1,
    "resnet50w2x": 93.9,
    "resnet50w4x": 375.4,
    "resnext50_32x4d": 23.0,
    "resnext50_32x8d": 46.0,
    "resnext101_32x8d": 86.7,
    "resnext101_64x4d": 81.4,
    "wide_resnet50_2": 66.8,
    "wide_resnet101_2": 124.8,
}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_network_has_the_published_size(arch):
    with torch.device("meta"):
        network = build_network(arch)
    count = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("fc."))
    assert round(count / 1e6, 1) == MILLIONS[arch]


@pytest.mark.parametrize("arch", ARCHS)
def test_detectron2_builds_a_network_of_the_same_shapes(arch):
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    from convert.names import land, to_detectron2

    config = get_cfg()
    config.MODEL.RESNETS.NORM = "BN"
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False
    config.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    config.MODEL.DEVICE = "cpu"
    for key, value in detectron2_shape(arch).items():
        config.MODEL.RESNETS[key] = value
    with torch.device("meta"):
        state = build_backbone(config).state_dict()
    shapes = {to_detectron2(name): shape for name, shape in expected_shapes(arch).items()}
    places = land(shapes, state)
    assert all(state[key].shape == shapes[name] for name, key in places.items())


def test_a_recipe_that_fits_is_taken_and_a_wrong_one_is_told_every_key():
    recipe = detectron2_settings(FACTS)
    check_recipe(recipe, FACTS, "a.pth")
    for key, wrong in {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
        "MODEL.RESNETS.DEPTH": 101,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 128,
    }.items():
        with pytest.raises(UserError) as caught:
            check_recipe(recipe | {key: wrong}, FACTS, "a.pth")
        assert f"{key} {wrong}" in str(caught.value)
        assert f'set {key} "{recipe[key]}"' in str(caught.value)


def test_the_yaml_loads_in_detectron2_and_fits_the_backbone(tmp_path, monkeypatch, moco_v2_file):
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg

    from transfer.detection.recipes import flatten

    monkeypatch.chdir(tmp_path)
    convert(moco_v2_file, tmp_path / "out.pkl")
    config = get_cfg()
    config.merge_from_file(str(tmp_path / "out.yaml"))
    check_recipe(flatten(config), FACTS, "a.pth")
    assert config.MODEL.WEIGHTS == str(tmp_path / "out.pkl")
    assert config.MODEL.BACKBONE.FREEZE_AT == 0
    assert config.MODEL.RESNETS.NORM == "SyncBN"


def test_the_yaml_of_a_hostile_name_stays_a_comment(tmp_path):
    facts = replace(FACTS, name="a\nMODEL: {WEIGHTS: evil}")
    assert yaml.safe_load(settings_yaml(facts, tmp_path / "b.pkl"))["MODEL"]["WEIGHTS"] != "evil"


def test_a_users_own_yaml_is_not_overwritten(tmp_path, monkeypatch, moco_v2_file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.yaml").write_text("precious: true\n")
    with pytest.raises(UserError, match=r"out\.yaml: exists and is not ours; add --force"):
        convert(moco_v2_file, tmp_path / "out.pkl")
    assert (tmp_path / "out.yaml").read_text() == "precious: true\n"
    assert not (tmp_path / "out.pkl").exists()


def test_pixels_survive_detectron2s_way_of_saying_them():
    for pixels in (IMAGENET_PIXELS, CAFFE_PIXELS, UNIT_PIXELS, parse_pixels(BGR)):
        said = pixels.detectron2()
        order = said["INPUT.FORMAT"]
        again = Pixels.from_detectron2(order, said["MODEL.PIXEL_MEAN"], said["MODEL.PIXEL_STD"])
        assert again.channel_order == pixels.channel_order
        assert again.mean == pytest.approx(pixels.mean, abs=1e-5)
        assert again.std == pytest.approx(pixels.std, abs=1e-5)


BGR = "BGR:0.485,0.456,0.406:0.229,0.224,0.225"


def test_bgr_statistics_are_turned_for_detectron2():
    assert parse_pixels(BGR).detectron2() == {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    }


@pytest.mark.parametrize(
    "text",
    [
        "rgb",
        "RGB:1,2:3,4,5",
        "RGB:0,0,0:0,0,0",
        "RGB:a,b,c:1,1,1",
        "",
        "RGB:nan,0,0:1,1,1",
        "RGB:123,116,103:58,57,57",
    ],
)
def test_pixels_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="want imagenet, unit, caffe, or ORDER:MEAN:STD"):
        Options.read(None, text, None)
