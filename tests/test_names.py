import pytest
import torchvision

from convert.errors import UserError
from convert.names import is_backbone_name, land, to_detectron2


@pytest.fixture(scope="module")
def resnet50_names() -> list[str]:
    return [n for n in torchvision.models.resnet50().state_dict() if is_backbone_name(n)]


def test_a_resnet50_has_265_backbone_tensors_and_53_counters(resnet50_names):
    counters = [name for name in resnet50_names if name.endswith("num_batches_tracked")]
    assert (len(resnet50_names) - len(counters), len(counters)) == (265, 53)


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_mean", "stem.conv1.norm.running_mean"),
        ("layer1.0.bn1.bias", "res2.0.conv1.norm.bias"),
        ("layer1.0.downsample.0.weight", "res2.0.shortcut.weight"),
        ("layer2.0.downsample.1.running_var", "res3.0.shortcut.norm.running_var"),
        ("layer3.5.conv3.weight", "res4.5.conv3.weight"),
        ("layer4.2.bn3.num_batches_tracked", "res5.2.conv3.norm.num_batches_tracked"),
    ],
)
def test_names_become_detectron2s(name, renamed):
    assert to_detectron2(name) == renamed


def test_names_stay_distinct(resnet50_names):
    assert len({to_detectron2(name) for name in resnet50_names}) == len(resnet50_names) == 318


@pytest.mark.parametrize("name", ["fc.weight", "fc.0.bias", "queue", "encoder_q.conv1.weight"])
def test_heads_and_foreign_names_are_no_backbone(name):
    assert not is_backbone_name(name)
    with pytest.raises(UserError, match="want a torchvision ResNet's"):
        to_detectron2(name)


def test_names_land_wherever_a_detector_keeps_its_stages(resnet50_names):
    names = [to_detectron2(name) for name in resnet50_names]
    for res5 in ("roi_heads.", "backbone.bottom_up."):
        keys = [(res5 if n.startswith("res5") else "backbone.") + n for n in names]
        keys += ["roi_heads.res5.norm.weight", "proposal_generator.rpn_head.conv.weight"]
        assert set(land(names, keys).values()) == set(keys[:318])


def test_a_name_without_a_place_is_refused(resnet50_names):
    names = [to_detectron2(name) for name in resnet50_names]
    with pytest.raises(UserError, match=r"1 of 318 .*first 'res5.2.conv3.weight'"):
        land(names, [n for n in names if n != "res5.2.conv3.weight"])


def test_a_place_without_a_name_is_refused(resnet50_names):
    names = [to_detectron2(name) for name in resnet50_names]
    with pytest.raises(UserError, match=r"the model's get none \(first 'backbone.res4.6.conv1"):
        land(names, [*names, "backbone.res4.6.conv1.weight"])


def test_a_name_with_two_places_is_refused(resnet50_names):
    names = [to_detectron2(name) for name in resnet50_names]
    with pytest.raises(UserError, match="no single place"):
        land(names, [*names, "teacher.stem.conv1.weight"])
