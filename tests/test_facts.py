"""What is known of a backbone is told from what is given and what is assumed."""

import json
import os
import pickle

import pytest
import torch
import yaml

from convert.backbone import build_resnet, load_backbone, random_backbone
from convert.certificate import convert
from convert.errors import UserError
from convert.facts import Options, training
from convert.names import to_detectron2
from convert.pixels import CAFFE_PIXELS, IMAGENET_PIXELS, UNIT_PIXELS, Pixels
from tests.small_sets import write_resnet18

KNOWN = {"pixels": "known", "stride_in_1x1": "known"}


@pytest.fixture(scope="module")
def resnet50():
    return random_backbone("resnet50", 0).weights


def save_detectron2(path, weights, **beside):
    arrays = {to_detectron2(name): tensor.numpy() for name, tensor in weights.items()}
    path.write_bytes(pickle.dumps({"model": arrays, **beside}))
    return path


def config_yaml(order, mean, std, stride):
    resnets = {"STRIDE_IN_1X1": stride, "NORM": "FrozenBN"}
    model = {"PIXEL_MEAN": mean, "PIXEL_STD": std, "RESNETS": resnets}
    return yaml.safe_dump({"MODEL": model, "INPUT": {"FORMAT": order}})


def test_a_method_whose_code_fixes_its_pixels_is_known(moco_v2_file):
    facts = load_backbone(moco_v2_file).facts
    assert facts.sources == KNOWN
    assert facts.pixels == IMAGENET_PIXELS
    assert facts.branches == ("query", "key")
    assert facts.dropped_parts == {"queue": 1, "queue_ptr": 1, "encoder_q": 4, "encoder_k": 322}


def test_a_flat_file_is_assumed_and_what_is_given_wins(tmp_path):
    path = write_resnet18(tmp_path / "a.pth")
    facts = load_backbone(path).facts
    assert facts.sources == {"pixels": "assumed", "stride_in_1x1": "assumed"}
    given = load_backbone(path, pixels=UNIT_PIXELS, stride_in_1x1=False).facts
    assert given.sources == {"pixels": "given", "stride_in_1x1": "given"}
    assert given.pixels == UNIT_PIXELS


def test_a_file_of_detectron2_is_never_guessed(tmp_path, resnet50):
    path = save_detectron2(tmp_path / "a.pkl", resnet50)
    with pytest.raises(UserError, match=r"does not say its pixels.*as --pixels imagenet, or put"):
        load_backbone(path)
    with pytest.raises(UserError, match=r"does not say its stride in 1x1.*--stride-in-1x1 no"):
        load_backbone(path, pixels=CAFFE_PIXELS)
    facts = load_backbone(path, pixels=CAFFE_PIXELS, stride_in_1x1=True).facts
    assert facts.stride_in_1x1
    described = load_backbone(path, Options(unknown_too=True)).facts
    assert described.sources == {"pixels": "unknown", "stride_in_1x1": "unknown"}


@pytest.mark.parametrize("author", ["MOCO", "torchvision"])
def test_converters_that_sign_their_work_are_known(tmp_path, resnet50, author):
    facts = load_backbone(save_detectron2(tmp_path / "a.pkl", resnet50, __author__=author)).facts
    assert facts.sources == KNOWN
    assert facts.pixels == IMAGENET_PIXELS


def test_the_config_beside_a_detector_tells(tmp_path, resnet50):
    text = config_yaml("BGR", [103.53, 116.28, 123.675], [57.375, 57.12, 58.395], True)
    (tmp_path / "config.yaml").write_text(text)
    facts = load_backbone(save_detectron2(tmp_path / "model_final.pkl", resnet50)).facts
    assert facts.sources == {"pixels": "given", "stride_in_1x1": "given"}
    assert facts.stride_in_1x1
    assert facts.pixels.channel_order == "BGR"
    assert facts.pixels.std == pytest.approx(IMAGENET_PIXELS.std, abs=1e-6)


@pytest.mark.parametrize("text", ["a: 1", "[", "MODEL: 3", "INPUT: {FORMAT: YUV}\nMODEL: {}"])
def test_a_config_beside_that_is_none_of_detectron2_is_refused(tmp_path, resnet50, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: stands beside .* no whole config"):
        load_backbone(save_detectron2(tmp_path / "a.pkl", resnet50))


@pytest.mark.parametrize(("rgb", "order"), [("True", "RGB"), ("False", "BGR")])
def test_the_config_inside_openmmlabs_files_tells(tmp_path, resnet50, rgb, order):
    text = (
        "model = dict(backbone=dict(type='ResNet', depth=50, style='caffe'))\n"
        "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[1.0, 1.0, 1.0], "
        f"to_rgb={rgb})\n"
    )
    state = {f"backbone.{name}": tensor for name, tensor in resnet50.items()}
    state["rpn_head.rpn_conv.weight"] = torch.zeros(1)
    torch.save({"meta": {"config": text}, "state_dict": state}, tmp_path / "a.pth")
    facts = load_backbone(tmp_path / "a.pth").facts
    assert facts.layout == "mmdet"
    assert facts.sources == KNOWN
    assert facts.stride_in_1x1
    assert facts.pixels.detectron2() == {
        "INPUT.FORMAT": order,
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    }


def test_the_configs_beside_a_model_of_transformers_tell(tmp_path, resnet50):
    from tests.origins import ORIGINS, write

    origin = next(origin for origin in ORIGINS if origin.slug == "huggingface")
    for package in origin.needs:
        pytest.importorskip(package)
    path = write(origin.build("resnet50"), tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    )
    (tmp_path / "config.json").write_text(json.dumps({"downsample_in_bottleneck": True}))
    facts = load_backbone(path).facts
    assert facts.pixels == Pixels("RGB", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert facts.stride_in_1x1
    assert facts.sources == {"pixels": "given", "stride_in_1x1": "given"}


def test_facts_travel_in_the_converted_file_and_can_be_overruled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_resnet18(tmp_path / "a.pth")
    convert(path, tmp_path / "b.pkl")
    facts = load_backbone(tmp_path / "b.pkl").facts
    assert facts == load_backbone(path).facts
    overruled = load_backbone(tmp_path / "b.pkl", pixels=UNIT_PIXELS).facts
    assert overruled.sources == {"pixels": "given", "stride_in_1x1": "assumed"}
    with pytest.raises(UserError, match="holds the query branch only; take the original file"):
        load_backbone(tmp_path / "b.pkl", branch="key")


def test_a_stride_in_the_1x1_is_another_network(resnet50):
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        one = build_resnet("resnet50", resnet50)(image)
        other = build_resnet("resnet50", resnet50, stride_in_1x1=True)(image)
    assert one.shape == other.shape
    assert not torch.allclose(one, other, rtol=0.05)


@pytest.mark.long
def test_the_same_source_with_other_options_is_another_conversion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_resnet18(tmp_path / "a.pth")
    convert(path)
    assert convert(path)["already"]
    with pytest.raises(UserError, match="came from something else; add --force"):
        convert(path, options=Options(pixels=UNIT_PIXELS))
    assert "already" not in convert(path, options=Options(pixels=UNIT_PIXELS), force=True)


@pytest.mark.long
def test_a_basic_network_has_no_c4_target_and_the_reason_is_said(tmp_path, script):
    write_resnet18(tmp_path / "a.pth")
    done = script("convert/to_detectron2.py", "a.pth")
    assert done.returncode == 0, done.stderr
    assert "no such target: Detectron2's C4 head is made of bottlenecks" in done.stdout
    assert "pixels     RGB, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225" in done.stdout
    assert "assumed" in done.stdout


def test_describe_says_what_a_file_is_and_writes_nothing(tmp_path, script, moco_v2_file):
    (tmp_path / "a.pth").symlink_to(moco_v2_file)
    done = script("convert/to_detectron2.py", "a.pth", "--describe", "--branch", "key")
    assert done.returncode == 0, done.stderr
    for words in ("moco, key encoder", "branches   query, key", "INPUT.FORMAT RGB", "queue 1"):
        assert words in done.stdout
    done = script("convert/to_detectron2.py", "a.pth", "--describe", "--json")
    assert json.loads(done.stdout)["layout"] == "moco"
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_branch_that_a_file_lacks_is_refused_with_those_it_has(tmp_path, script, moco_v2_file):
    (tmp_path / "a.pth").symlink_to(moco_v2_file)
    done = script("convert/to_detectron2.py", "a.pth", "--branch", "teacher")
    assert done.returncode == 2
    assert "has no branch 'teacher'; this file of moco has query, key" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_full_disk_ends_in_one_line_and_no_output(tmp_path, monkeypatch):
    from convert import certificate

    def full(path, content):
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    write_resnet18(tmp_path / "a.pth")
    monkeypatch.setattr(certificate, "_write_pickle", full)
    with pytest.raises(UserError, match=r"a\.pkl: the disk is full; nothing was written"):
        convert(tmp_path / "a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def flat(**changes):
    return {**random_backbone("resnet18", 0).weights, **changes}


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"layer2.0.se.fc1.weight": torch.ones(2, 2, 1, 1)}, "a part in its blocks"),
        ({"layer2.0.conv2.conv_offset.weight": torch.ones(1)}, "a part in its blocks"),
        ({"conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.int8)}, "no dense floating"),
        ({"conv1.weight": torch.ones(64, 3, 7, 7) * 1j}, "no dense floating"),
        ({"bn1.weight": torch.ones(64).to_sparse()}, "no dense floating"),
        ({"bn1.running_var": -torch.ones(64)}, "a variance below 0"),
        ({"bn1.bias": torch.full((64,), 1e300, dtype=torch.float64)}, "infinity"),
        ({"conv1.weight": torch.tensor(1.0)}, "want a convolution of four dimensions"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_what_no_resnet_has_is_refused(tmp_path, beside, words):
    torch.save(flat(**beside), tmp_path / "a.pth")
    with pytest.raises(UserError, match=words) as caught:
        load_backbone(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


def test_facts_are_not_taken_for_those_of_other_weights(tmp_path, monkeypatch, moco_v2_file):
    from convert.export import export

    monkeypatch.chdir(tmp_path)
    export(moco_v2_file, tmp_path / "a.pth")
    assert load_backbone(tmp_path / "a.pth").facts.sources == KNOWN
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    state["conv1.weight"] += 1
    torch.save(state, tmp_path / "b.pth")
    facts = load_backbone(tmp_path / "b.pth").facts
    assert (facts.name, facts.method) == ("b.pth", "unknown")
    assert facts.sources["pixels"] == "assumed"


def test_damaged_facts_are_none(tmp_path):
    state = torch.nn.Module().state_dict() | flat()
    for beside in (None, [], {"moco_transfer": "{"}, {"moco_transfer": "{}"}):
        state._metadata = beside
        torch.save(state, tmp_path / "a.pth")
        assert load_backbone(tmp_path / "a.pth").facts.layout == "torchvision"


def test_keys_that_are_no_words_change_nothing(tmp_path):
    beside = {0: torch.zeros(1), 1: torch.ones(1), (2, 3): torch.ones(2), 10**5000: torch.ones(3)}
    torch.save({"state_dict": flat(), "shadow": beside}, tmp_path / "a.pth")
    assert load_backbone(tmp_path / "a.pth").facts.dropped == 4


def test_a_stem_of_cifar_is_not_said_to_want_imagenets_pixels(tmp_path):
    state = {f"encoder_q.{name}": tensor for name, tensor in flat().items()}
    state |= {"queue": torch.ones(2, 2), "encoder_q.conv1.weight": torch.ones(64, 3, 3, 3)}
    torch.save(state, tmp_path / "a.pth")
    facts = load_backbone(tmp_path / "a.pth").facts
    assert (facts.layout, facts.stem) == ("moco", "cifar")
    assert facts.sources["pixels"] == "assumed"


@pytest.mark.parametrize("head", ["projector.0.weight", "classifier.weight", "head.weight"])
def test_names_that_many_use_are_not_said_to_fix_anything(tmp_path, head):
    state = {f"backbone.{name}": tensor for name, tensor in flat().items()}
    torch.save(state | {head: torch.ones(2, 2)}, tmp_path / "a.pth")
    facts = load_backbone(tmp_path / "a.pth").facts
    assert facts.sources == {"pixels": "assumed", "stride_in_1x1": "assumed"}


MM_STATE = {"rpn_head.conv.weight": torch.zeros(1)}


def mm_file(path, text):
    state = {f"backbone.{name}": tensor for name, tensor in flat().items()} | MM_STATE
    torch.save({"meta": {"cfg": text}, "state_dict": state}, path)
    return path


def test_a_comment_in_openmmlabs_config_says_nothing(tmp_path):
    text = "# style='caffe'\n# img_norm_cfg = dict(mean=[1, 2, 3], std=[1, 1, 1], to_rgb=False)\n"
    facts = load_backbone(mm_file(tmp_path / "a.pth", text + 'b = dict(style="pytorch")')).facts
    assert not facts.stride_in_1x1
    assert facts.sources == {"pixels": "assumed", "stride_in_1x1": "known"}


def test_a_config_of_two_minds_is_refused_until_told(tmp_path):
    path = mm_file(tmp_path / "a.pth", "a = dict(style='caffe')\nb = {'style': 'pytorch'}\n")
    with pytest.raises(UserError, match="names 2 styles; say which holds, with --stride-in-1x1"):
        load_backbone(path)
    assert load_backbone(path, stride_in_1x1=False, pixels=UNIT_PIXELS).facts.layout == "mmdet"


def test_a_bad_config_beside_can_be_overruled(tmp_path, resnet50):
    (tmp_path / "config.yaml").write_text("a: 1")
    path = save_detectron2(tmp_path / "a.pkl", resnet50)
    facts = load_backbone(path, pixels=CAFFE_PIXELS, stride_in_1x1=True).facts
    assert facts.sources == {"pixels": "given", "stride_in_1x1": "given"}


def test_a_config_that_changes_later_makes_another_conversion(tmp_path, monkeypatch, resnet50):
    monkeypatch.chdir(tmp_path)
    beside = tmp_path / "config.yaml"
    beside.write_text(config_yaml("RGB", [0.0] * 3, [255.0] * 3, False))
    path = save_detectron2(tmp_path / "a.pkl", resnet50)
    convert(path, tmp_path / "b.pkl")
    assert convert(path, tmp_path / "b.pkl")["already"]
    beside.write_text(config_yaml("BGR", [0.0] * 3, [255.0] * 3, False))
    with pytest.raises(UserError, match="came from something else"):
        convert(path, tmp_path / "b.pkl")


def test_nothing_that_stands_there_is_destroyed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_resnet18(tmp_path / "a.pkl")
    before = path.read_bytes()
    (tmp_path / "folder.pkl").mkdir()
    (tmp_path / "output").mkdir()
    (tmp_path / "output/weights.pkl").write_text("precious")
    os.mkfifo(tmp_path / "pipe.pkl")
    for name, words in {
        "a.pkl": "is the checkpoint itself",
        "folder.pkl": "is no file that could be replaced",
        "pipe.pkl": "is no file that could be replaced",
        "a.yaml": "only if its name ends in .pkl",
        "b.pkl": r"output/weights.pkl: is a file of its own and was left alone",
    }.items():
        with pytest.raises(UserError, match=words):
            convert(path, tmp_path / name, force=True)
    assert path.read_bytes() == before
    assert (tmp_path / "output/weights.pkl").read_text() == "precious"


def test_settings_follow_a_conversion_that_was_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_resnet18(tmp_path / "a.pth")
    convert(path, tmp_path / "one/a.pkl")
    (tmp_path / "one").rename(tmp_path / "two")
    assert convert(path, tmp_path / "two/a.pkl")["already"]
    settings = yaml.safe_load((tmp_path / "two/a.yaml").read_text())
    assert settings["MODEL"]["WEIGHTS"] == str(tmp_path / "two/a.pkl")


def test_a_name_in_a_file_cannot_steer_the_terminal(tmp_path, script):
    evil = "evil\x1b[2J\nname.weight"
    torch.save({"state_dict": {evil: torch.ones(1)}}, tmp_path / "a.pth")
    done = script("convert/to_detectron2.py", "a.pth", "--describe")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet101", "resnet50w2x", "resnext50_32x8d"])
def test_other_shapes_convert_and_are_proved_in_c4_and_fpn(tmp_path, monkeypatch, arch):
    pytest.importorskip("detectron2")
    monkeypatch.chdir(tmp_path)
    state = random_backbone(arch, 0).weights
    torch.save({"state_dict": {f"module.encoder_q.{k}": v for k, v in state.items()}}, "a.pth")
    certificate = convert(tmp_path / "a.pth")
    assert certificate["arch"] == arch
    assert certificate["proof"]["c4"]["relative"] <= 1e-5
    assert certificate["proof"]["fpn"]["relative"] <= 1e-5
    again = load_backbone(tmp_path / "a.pkl").weights
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_our_own_pretrainings_settings_are_told_by_their_symbols():
    config = {"dictionary": "queue", "K": 65536, "m": 0.999, "tau": 0.2, "augmentation": "v2"}
    config |= {"batch_size": 256, "data": "/home/me/secret", "randaugment": [2, 9]}
    ours = {"config": json.dumps(config), "images": 1281167}
    found = training({"moco_transfer": ours})
    told = {"K": 65536, "m": 0.999, "dictionary": "queue", "tau": 0.2, "augmentation": "v2"}
    assert found == told | {"batch_size": 256, "images": 1281167}
    simclr = json.dumps(config | {"dictionary": "simclr"})
    assert not {"K", "m"} & training({"moco_transfer": {"config": simclr}}).keys()


@pytest.mark.parametrize(
    "ours", [None, "x", {}, {"config": "{"}, {"config": "[]"}, {"config": '{"tau": {}}'}]
)
def test_what_is_no_pretraining_of_ours_tells_no_settings(ours):
    assert training({"moco_transfer": ours}) == {}
