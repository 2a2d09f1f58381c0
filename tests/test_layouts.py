"""Every origin's file is recognised, and gives the network that its origin meant."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from convert.backbone import Backbone, load_backbone
from convert.certificate import Options, convert
from convert.errors import UserError
from convert.pixels import PRESETS
from tests.origins import ORIGINS, REFUSED, Origin, Written, odd_objects, write

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# One origin for each layout; all of them are built, where it is cheap.
FIRST = {origin.slug: origin for origin in reversed(ORIGINS)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, which does not stay: the files are large.

    One thread: the tensors are many and small, and threads that wait for each other cost the most.
    """
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    monkeypatch.undo()
    shutil.rmtree(tmp_path)


def named(origins: Any) -> dict[str, Any]:
    return {"argvalues": list(origins), "ids": lambda origin: origin.name.replace(" ", "-")}


def built(origin: Origin, arch: str | None = None) -> Written:
    for package in origin.needs:
        pytest.importorskip(package)
    return origin.build(arch or origin.small)


def given(origin: Origin) -> dict[str, Any]:
    if origin.given is None:
        return {}
    return {"pixels": PRESETS[origin.given[0]], "stride_in_1x1": origin.given[1]}


def assert_holds(backbone: Backbone, expected: Mapping[str, Tensor]) -> None:
    assert backbone.weights.keys() == expected.keys()
    for name, tensor in backbone.weights.items():
        floating = not name.endswith("num_batches_tracked")
        assert tensor.dtype == (torch.float32 if floating else torch.int64), name
        assert torch.equal(tensor, expected[name]), name


def assert_facts(backbone: Backbone, written: Written, origin: Origin, arch: str) -> None:
    facts, said = backbone.facts, IMAGENET | written.facts
    assert (facts.layout, facts.arch) == (origin.slug, arch)
    assert facts.stride_in_1x1 == said.get("stride_in_1x1", False)
    assert facts.stem == said.get("stem", "imagenet")
    assert facts.pixels.channel_order == said.get("channel_order", "RGB")
    assert facts.pixels.mean == pytest.approx(said["mean"], abs=1e-4)
    assert facts.pixels.std == pytest.approx(said["std"], abs=1e-4)
    for key in {"epoch", "method"} & said.keys():
        assert getattr(facts, key) == said[key], key


@pytest.mark.parametrize("origin", **named(ORIGINS))
def test_every_origins_file_gives_each_of_its_networks(folder, origin):
    written = built(origin)
    path = write(written, folder / "checkpoint.pth")
    for branch, expected in written.backbones.items():
        backbone = load_backbone(path, branch=branch, **given(origin))
        assert backbone.facts.branch == branch
        assert_holds(backbone, expected)
        assert_facts(backbone, written, origin, origin.small)


@pytest.mark.parametrize("origin", **named(ORIGINS))
def test_key_order_wrappers_and_the_files_name_change_nothing(folder, origin):
    written = built(origin)
    prefix = "" if written.format == "pickle" else "module.module._orig_mod."
    written.content = rewrapped(written.content, prefix)
    path = write(written, folder / "renamed.of-any-kind")
    branch, expected = next(iter(written.backbones.items()))  # it is the default one
    backbone = load_backbone(path, **given(origin))
    assert (backbone.facts.layout, backbone.facts.branch) == (origin.slug, branch)
    assert_holds(backbone, expected)


@pytest.mark.parametrize("prefix", ["module.", "module.module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("slug", ["moco", "torchvision"])
def test_each_wrapper_alone_changes_nothing(folder, slug, prefix):
    written = built(FIRST[slug])
    written.content = rewrapped(written.content, prefix)
    backbone = load_backbone(write(written, folder / "a.ckpt"))
    assert backbone.facts.layout == slug
    assert_holds(backbone, next(iter(written.backbones.values())))


@pytest.mark.parametrize("format", ["torch", "torch-legacy"])
def test_odd_objects_beside_the_weights_change_nothing(folder, format):
    written = built(FIRST["moco"])
    written.content, written.format = odd_objects() | written.content, format
    backbone = load_backbone(write(written, folder / "a.pth.tar"))
    assert backbone.facts.layout == "moco"
    assert_holds(backbone, written.backbones["query"])


def rewrapped(content: Any, prefix: str) -> Any:
    """Turn every state dict in a nest around, and put a prefix before its names."""
    if not isinstance(content, dict):
        return content
    values = content.values()
    if sum(isinstance(value, Tensor | np.ndarray) for value in values) > 50:
        return {f"{prefix}{name}": content[name] for name in reversed(content)}
    return {name: rewrapped(value, prefix) for name, value in content.items()}


def cast(content: Any, dtype: torch.dtype) -> Any:
    if isinstance(content, Tensor) and content.is_floating_point():
        return content.to(dtype)
    if isinstance(content, dict):
        return {name: cast(value, dtype) for name, value in content.items()}
    return content


@pytest.mark.parametrize(
    "origin", **named(o for o in FIRST.values() if o.slug not in {"detectron2", "caffe2"})
)
def test_half_precision_is_read_as_float32(folder, origin):
    written = built(origin)
    dtype = torch.bfloat16 if len(origin.name) % 2 else torch.float16  # both occur
    written.content = cast(written.content, dtype)
    path = write(written, folder / "half.pth")
    expected = next(iter(written.backbones.values()))
    backbone = load_backbone(path, **given(origin))
    assert_holds(backbone, {k: cast(v, dtype).to(v.dtype) for k, v in expected.items()})


@pytest.mark.parametrize("origin", **named({o.slug: o for o in ORIGINS if o.given}.values()))
def test_where_a_file_does_not_say_what_it_expects_one_must(folder, origin):
    path = write(built(origin), folder / "model.pkl")
    pixels, stride = given(origin).values()
    for words in ({}, {"pixels": pixels}, {"stride_in_1x1": stride}):
        with pytest.raises(UserError, match="--pixels" if "pixels" not in words else "--stride"):
            load_backbone(path, **words)


def convertible() -> list[Any]:
    """The first origin of each layout; the others take minutes."""
    return [
        pytest.param(origin, marks=[] if origin is FIRST[origin.slug] else pytest.mark.long)
        for origin in ORIGINS
        if origin.slug != "moco-cifar"
    ]


@pytest.mark.parametrize("origin", convertible(), ids=lambda origin: origin.name.replace(" ", "-"))
def test_each_converts_and_detectron2_gives_the_same_features(folder, origin):
    pytest.importorskip("detectron2")
    path = write(built(origin, "resnet50"), folder / "checkpoint.pth")
    proof = convert(path, folder / "out.pkl", options=Options(**given(origin)))["proof"]
    assert proof["ran"]
    for target in ("c4", "fpn"):
        assert proof[target]["relative"] <= 1e-5
        assert proof[target]["scale"] > 1  # features, and not zeros, were compared


@pytest.mark.parametrize("refusal", **named(REFUSED))
def test_what_cannot_become_a_detector_is_refused_in_one_line(folder, refusal):
    path = write(refusal.build(), folder / "checkpoint.pth")
    act: Callable[[Path], Any] = load_backbone
    if refusal.loads:
        assert load_backbone(path).facts.stem.startswith("cifar")
        act = convert
    with pytest.raises(UserError, match=refusal.words) as caught:
        act(path)
    assert "\n" not in str(caught.value)
    assert "checkpoint.pth" in str(caught.value)
    assert [each.name for each in folder.iterdir()] == ["checkpoint.pth"]


def test_a_branch_that_a_file_lacks_is_refused_and_its_own_are_listed(folder):
    path = write(FIRST["dino"].build("resnet18"), folder / "a.pth")
    with pytest.raises(UserError, match=r"'key'.*teacher, student"):
        load_backbone(path, branch="key")


# ---- files written by the origins' own code ------------------------------------------------------


def shaken(network: nn.Module) -> nn.Module:
    """Move what a fresh network's norms hold away from 0 and 1, and go to evaluation mode."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.1)
    return network.eval()


def image(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def last_map(network: Any, x: Tensor) -> Tensor:
    """Give the last stage's features of a network with torchvision's attributes."""
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    return network.layer4(network.layer3(network.layer2(network.layer1(x))))


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    scale = float(wanted.abs().max())
    assert scale > 0.1  # features, and not zeros
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_torchvisions_own_network_and_ours_give_the_same_features(folder, arch):
    network = shaken(getattr(torchvision.models, arch)())
    torch.save(network.state_dict(), folder / "a.pth")
    backbone = load_backbone(folder / "a.pth")
    assert backbone.facts.arch == arch
    assert torch.equal(last_map(backbone.build(), image()), last_map(network, image()))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_timms_own_network_and_ours_give_the_same_features(folder, arch):
    timm = pytest.importorskip("timm")
    network = shaken(timm.create_model(arch))
    torch.save({"epoch": 3, "arch": arch, "state_dict": network.state_dict()}, folder / "a.pth")
    backbone = load_backbone(folder / "a.pth")
    assert (backbone.facts.layout, backbone.facts.arch) == ("torchvision", arch)
    with torch.no_grad():
        wanted = network.forward_features(image())
    assert_close(last_map(backbone.build(), image()), wanted)


def test_timms_own_safetensors_are_read(folder):
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    network = timm.create_model("resnet18").eval()
    safetensors.save_file(network.state_dict(), folder / "a.bin", metadata={"format": "pt"})
    backbone = load_backbone(folder / "a.bin")
    for name, tensor in backbone.weights.items():
        assert torch.equal(tensor, network.state_dict()[name]), name


@pytest.mark.parametrize("arch", ["resnet50d", "resnet18d", "resnetv2_50", "vit_tiny_patch16_224"])
def test_timms_other_networks_are_refused(folder, arch):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model(arch).state_dict(), folder / "a.pth")
    with pytest.raises(UserError, match=r"stem|no ResNet backbone|vision transformer"):
        load_backbone(folder / "a.pth")


@pytest.mark.parametrize("kind", ["classifier", "model", "basic", "stride in 1x1"])
def test_huggingfaces_own_network_and_ours_give_the_same_features(folder, kind):
    transformers = pytest.importorskip("transformers")
    shape: dict[str, Any] = {}
    if kind == "basic":
        shape = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    config = transformers.ResNetConfig(downsample_in_bottleneck=kind == "stride in 1x1", **shape)
    plain = kind != "classifier"
    name = "ResNetModel" if plain else "ResNetForImageClassification"
    network = shaken(getattr(transformers, name)(config))
    network.save_pretrained(folder)
    # Its config.json stands beside it and tells where the stride is.
    backbone = load_backbone(folder / "model.safetensors")
    facts = backbone.facts
    assert (facts.layout, facts.arch) == ("huggingface", "resnet18" if shape else "resnet50")
    assert facts.stride_in_1x1 == (kind == "stride in 1x1")
    with torch.no_grad():
        wanted = (network if plain else network.resnet)(image()).last_hidden_state
    assert_close(last_map(backbone.build(), image()), wanted)


def lightly_checkpoint(model: nn.Module) -> dict[str, Any]:
    return {"epoch": 9, "pytorch-lightning_version": "2.0.0", "state_dict": model.state_dict()}


def lightly_model(backbone: nn.Module) -> Any:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead

    model = nn.Module()
    model.backbone = backbone
    model.projection_head = MoCoProjectionHead(512, 64, 32)
    model.criterion = NTXentLoss(memory_bank_size=(64, 32))
    return model


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_lightlys_own_split_norms_and_ours_give_the_same_features(folder, mode):
    batchnorm = pytest.importorskip("lightly.models.batchnorm")

    def norm(features: int) -> nn.Module:
        return batchnorm.SplitBatchNorm(features, num_splits=2)

    network = torchvision.models.resnet18(norm_layer=norm)
    network.train()
    for seed in range(3):  # each split sees its own half of a batch
        network(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed)))
    network.train(mode == "train")
    model = lightly_model(nn.Sequential(*list(network.children())[:-1]))
    torch.save(lightly_checkpoint(model), folder / "a.ckpt")
    backbone = load_backbone(folder / "a.ckpt")
    assert (backbone.facts.layout, backbone.facts.stem) == ("lightly", "imagenet")
    network.eval()
    assert_close(last_map(backbone.build(), image()), last_map(network, image()))


@pytest.mark.parametrize("splits", [0, 4])
def test_lightlys_own_small_network_and_ours_give_the_same_features(folder, splits):
    models = pytest.importorskip("lightly.models")
    network = models.ResNetGenerator("resnet-18", num_splits=splits)
    network.train()(torch.randn(8, 3, 32, 32))
    parts = nn.Sequential(*list(network.children())[:-1], nn.AdaptiveAvgPool2d(1))
    torch.save(lightly_checkpoint(lightly_model(parts)), folder / "a.ckpt")
    backbone = load_backbone(folder / "a.ckpt")
    assert (backbone.facts.layout, backbone.facts.stem) == ("lightly", "cifar")
    network.eval()
    with torch.no_grad():
        x = torch.relu(network.bn1(network.conv1(image(32))))
        wanted = network.layer4(network.layer3(network.layer2(network.layer1(x))))
    assert_close(last_map(backbone.build(), image(32)), wanted)


def detectron2_model(*, stride_in_1x1: bool, norm: str) -> Any:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    config = get_cfg()
    config.MODEL.DEVICE = "cpu"
    config.MODEL.RESNETS.NORM = norm
    config.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    return build_model(config).eval()


@torch.no_grad()
def detectron2_map(model: Any) -> Tensor:
    found: Tensor = model.roi_heads.res5(model.backbone(image())["res4"])
    return found


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_detectron2s_own_model_and_ours_give_the_same_features(folder, stride_in_1x1):
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer

    model = shaken(detectron2_model(stride_in_1x1=stride_in_1x1, norm="BN"))
    DetectionCheckpointer(model, str(folder)).save("model_final", iteration=90000)
    backbone = load_backbone(
        folder / "model_final.pth", pixels=PRESETS["imagenet"], stride_in_1x1=stride_in_1x1
    )
    assert backbone.facts.layout == "detectron2"
    assert_close(last_map(backbone.build(), image()), detectron2_map(model))


@pytest.mark.parametrize("origin", **named(o for o in ORIGINS if o.slug == "caffe2"))
def test_caffe2s_files_mean_to_us_what_they_mean_to_detectron2(folder, origin):
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer

    path = write(built(origin), folder / "R-50.pkl")
    model = detectron2_model(stride_in_1x1=True, norm="FrozenBN")
    DetectionCheckpointer(model).load(str(path))
    backbone = load_backbone(path, **given(origin))
    # Detectron2 reads an affine map as a norm of variance 1, so that its epsilon counts a little in
    # each of 53 layers; the map itself has none.
    assert_close(last_map(backbone.build(), image()), detectron2_map(model), 1e-3)
