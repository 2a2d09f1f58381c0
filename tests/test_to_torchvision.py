import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from convert import certificate
from convert import export as exporting
from convert.backbone import EXTRA_KEY, load_backbone
from convert.errors import UserError
from convert.export import describe, export
from convert.facts import Options
from convert.names import is_backbone_name, to_detectron2
from convert.pixels import CAFFE_PIXELS, IMAGENET_PIXELS
from convert.resnets import build_network
from tests.conftest import moco_state
from tests.test_backbone import bad_files


def plain(state):
    return {name: value for name, value in state.items() if is_backbone_name(name)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def query(path):
    """The reference's query encoder, renamed by hand."""
    state = torch.load(path, weights_only=True)["state_dict"]
    start = "module.encoder_q."
    return plain({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})


def refusal(*words, **options):
    with pytest.raises(UserError) as caught:
        export(*words, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def network(arch="resnet18", **shape):
    """A network whose statistics have moved and whose weights are no other test's."""
    torch.manual_seed(1)
    built = build_network(arch, **shape).train()
    with torch.no_grad():
        built(torch.randn(4, 3, 64, 64))
    return built.eval()


@pytest.fixture(scope="module")
def moco_r18_content():
    return {"epoch": 9, "state_dict": moco_state("resnet18", mlp=True)}


@pytest.fixture
def moco_r18(tmp_path, moco_r18_content):
    torch.save(moco_r18_content, tmp_path / "ckpt.pth.tar")
    return tmp_path / "ckpt.pth.tar"


@pytest.fixture
def detector(tmp_path):
    """A ResNet-50 as Detectron2 names it, which says neither its pixels nor its stride."""
    source = network("resnet50")
    state = {f"backbone.{to_detectron2(k)}": v for k, v in plain(source.state_dict()).items()}
    path = tmp_path / "model_final.pth"
    torch.save({"model": state, "iteration": 5}, path)
    return path, source


def test_torchvisions_own_network_loads_it_but_for_the_head(tmp_path, moco_v2_file):
    source = tmp_path / "checkpoint_0199.pth.tar"
    os.link(moco_v2_file, source)
    report = export(source)
    output = tmp_path / "checkpoint_0199.torchvision.pth"
    assert report["output"] == str(output)
    state = torch.load(output, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    loaded = torchvision.models.resnet50()
    outcome = loaded.load_state_dict(state, strict=False)
    assert outcome.missing_keys == ["fc.weight", "fc.bias"]
    assert outcome.unexpected_keys == []
    assert same(plain(loaded.state_dict()), query(source))


def test_facts_in_the_file_change_nothing_for_a_loader(moco_r18):
    output = Path(export(moco_r18)["output"])
    state = torch.load(output, weights_only=True)
    facts = json.loads(state._metadata[EXTRA_KEY])
    assert (facts["arch"], facts["layout"], facts["epoch"]) == ("resnet18", "moco", 9)
    loaded = torchvision.models.resnet18()
    loaded.fc = torch.nn.Identity()
    own = loaded.state_dict()
    assert {k: v for k, v in state._metadata.items() if EXTRA_KEY not in k} == own._metadata
    loaded.load_state_dict(state, strict=True)
    assert same(plain(loaded.state_dict()), query(moco_r18))


def test_timm_loads_it_as_its_own(moco_r18, tmp_path):
    timm = pytest.importorskip("timm")
    for name in ("out.pth", "out.safetensors"):
        export(moco_r18, tmp_path / name)
        path = str(tmp_path / name)
        loaded = timm.create_model("resnet18", num_classes=0, checkpoint_path=path).eval()
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            want = load_backbone(moco_r18).build()(image)
            assert torch.allclose(loaded(image), want, atol=1e-6), name


def test_safetensors_hold_the_same_and_say_the_same(moco_r18, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    from safetensors.torch import load_file

    export(moco_r18, tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), query(moco_r18))
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        words = file.metadata()
    assert words["format"] == "pt"
    assert json.loads(words[EXTRA_KEY]) == load_backbone(moco_r18).facts.as_dict()


def test_a_round_trip_through_every_format_is_bit_equal(tmp_path, moco_v2_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(certificate, "can_prove", lambda: False)
    certificate.convert(moco_v2_file, tmp_path / "a.pkl")
    export(tmp_path / "a.pkl", tmp_path / "b.pth")
    export(tmp_path / "b.pth", tmp_path / "c.safetensors")
    certificate.convert(tmp_path / "c.safetensors", tmp_path / "d.pkl")
    first = load_backbone(moco_v2_file)
    for name in ("a.pkl", "b.pth", "c.safetensors", "d.pkl"):
        found = load_backbone(tmp_path / name)
        assert same(found.weights, first.weights), name
        assert found.facts == first.facts, name


def test_a_fine_tuned_detectors_backbone_comes_back(tmp_path):
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    config = get_cfg()
    config.MODEL.DEVICE = "cpu"
    config.MODEL.RESNETS.NORM = "BN"
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False
    model = build_model(config)  # Faster R-CNN C4: the last stage is in its head
    torch.save({"model": model.state_dict(), "iteration": 89999}, tmp_path / "model_final.pth")
    options = Options(pixels=IMAGENET_PIXELS, stride_in_1x1=False)
    export(tmp_path / "model_final.pth", tmp_path / "out.pth", options=options)
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    assert len(state) == 318
    weights = model.state_dict()
    for name, value in state.items():
        home = "roi_heads." if name.startswith("layer4") else "backbone."
        assert torch.equal(value, weights[home + to_detectron2(name)]), name


def test_a_stride_in_the_1x1_is_refused_with_the_reason(detector, tmp_path):
    path, _ = detector
    options = Options(pixels=IMAGENET_PIXELS, stride_in_1x1=True)
    line = refusal(path, tmp_path / "out.pth", options=options)
    assert "stride in the 1x1 convolutions (given)" in line
    assert "names and shapes would fit, and the features be wrong" in line
    assert "convert/to_detectron2.py" in line
    assert list(tmp_path.iterdir()) == [path]


def test_a_bgr_stem_is_flipped_so_that_features_of_rgb_images_are_the_same(detector, tmp_path):
    path, source = detector
    options = Options(pixels=CAFFE_PIXELS, stride_in_1x1=False)
    report = export(path, tmp_path / "out.pth", options=options)
    assert report["flipped"]
    assert "this one takes RGB" in describe(report)
    found = load_backbone(tmp_path / "out.pth")
    assert found.facts.pixels == replace(CAFFE_PIXELS, channel_order="RGB")
    assert found.facts.sources["pixels"] == "given"
    source.fc = torch.nn.Identity()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want, got = source(image.flip(1)), found.build()(image)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert not torch.allclose(got, source(image), rtol=1e-2)


def test_an_rgb_stem_stays_as_it_is(moco_r18):
    report = export(moco_r18)
    assert not report["flipped"]
    assert "flipped" not in describe(report)
    assert same(torch.load(report["output"], weights_only=True), query(moco_r18))


def test_a_cifar_stem_is_written_and_said(tmp_path):
    source = network(stem="cifar")
    torch.save(source.state_dict(), tmp_path / "small.pth")
    report = export(tmp_path / "small.pth")
    assert "a 3x3 convolution and no pool" in describe(report)
    found = load_backbone(report["output"])
    assert found.facts.stem == "cifar"
    assert same(found.weights, plain(source.state_dict()))


def test_the_table_says_what_was_known_and_what_assumed(tmp_path, moco_r18):
    torch.save(network().state_dict(), tmp_path / "flat.pth")
    assert "(RGB order, of 0..1): assumed" in describe(export(tmp_path / "flat.pth"))
    table = describe(export(moco_r18))
    assert "(RGB order, of 0..1): known" in table
    assert "all 120 written and read back equal, 130 dropped" in table
    assert "encoder_k" in table


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_the_same_again_is_already_converted(moco_r18, tmp_path, name):
    options = Options(branch="key")
    first = export(moco_r18, tmp_path / name, options=options)
    stamp = (tmp_path / name).stat().st_mtime_ns
    again = export(moco_r18, tmp_path / name, options=options)
    assert again == first | {"already": True}
    assert describe(again).startswith("already converted\n")
    assert (tmp_path / name).stat().st_mtime_ns == stamp


def test_other_options_another_source_or_a_changed_output_need_force(moco_r18, tmp_path):
    output = tmp_path / "out.pth"
    export(moco_r18, output)
    assert "add --force" in refusal(moco_r18, output, options=Options(branch="key"))
    torch.save(network().state_dict(), tmp_path / "other.pth")
    assert "add --force" in refusal(tmp_path / "other.pth", output)
    state = torch.load(output, weights_only=True)
    state["conv1.weight"][0] += 1
    torch.save(state, output)  # keeps our facts beside weights that are no longer ours
    assert "add --force" in refusal(moco_r18, output)
    assert not export(moco_r18, output, force=True)["already"]
    assert same(torch.load(output, weights_only=True), query(moco_r18))


@pytest.mark.parametrize("content", [b"precious", b"", b"PK\x03\x04 precious"])
def test_an_output_of_something_else_is_kept(moco_r18, tmp_path, content):
    (tmp_path / "out.pth").write_bytes(content)
    assert "add --force" in refusal(moco_r18, tmp_path / "out.pth")
    assert (tmp_path / "out.pth").read_bytes() == content


def test_a_source_is_never_its_own_output(moco_r18, tmp_path):
    source = tmp_path / "in.pth"
    os.link(moco_r18, source)
    before = source.read_bytes()
    assert "is the checkpoint itself" in refusal(source, source, force=True)
    assert source.read_bytes() == before


def test_another_suffix_is_refused(moco_r18, tmp_path):
    assert "want .pth for torchvision and timm" in refusal(moco_r18, tmp_path / "out.onnx")


def test_a_full_disk_is_one_line_and_leaves_nothing(moco_r18, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "the disk is full; nothing was written" in refusal(moco_r18, tmp_path / "out.pth")
    assert list(tmp_path.iterdir()) == [moco_r18]


def test_a_file_that_reads_back_otherwise_is_not_kept(moco_r18, tmp_path, monkeypatch):
    real = exporting._serialised

    def lying(backbone, *rest):
        weights = backbone.weights | {"bn1.bias": backbone.weights["bn1.bias"] + 1e-7}
        return real(replace(backbone, weights=weights), *rest)

    monkeypatch.setattr(exporting, "_serialised", lying)
    assert "is not what was written" in refusal(moco_r18, tmp_path / "out.pth")
    assert list(tmp_path.iterdir()) == [moco_r18]


def test_bad_files_are_refused_and_leave_no_output(tmp_path, moco_v2_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, line in bad_files(tmp_path, moco_v2_file).items():
        assert line in refusal(name, Path("out.pth")), name
    assert not list(tmp_path.glob("*out.pth*"))
    with pytest.raises(UserError, match="is a folder"):  # as of a shell's variable that is not set
        export("")


def test_typed_as_in_the_readme_it_writes_beside_the_input_and_says_so(
    script, moco_r18, tmp_path, monkeypatch
):
    done = script("convert/to_torchvision.py", moco_r18.name)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ckpt.torchvision.pth").is_file()
    assert done.stdout.startswith("converted\n")
    again = script("convert/to_torchvision.py", moco_r18.name, "--json")
    report = json.loads(again.stdout)
    assert report["already"]
    assert report["facts"] == load_backbone(moco_r18).facts.as_dict()
