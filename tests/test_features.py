import json

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms

from convert.backbone import Backbone, Facts, build_resnet, load_backbone
from convert.errors import UserError
from convert.pixels import Pixels
from pretrain.sources import image_folder
from pretrain.views import Augmentation
from tests.conftest import moco_state
from tests.small_sets import files_of_at_most, write_images, write_resnet18
from transfer.classification.features import (
    FrozenNetwork,
    Views,
    all_features,
    frozen_features,
    open_backbone,
    pick_device,
)
from transfer.classification.request import ProbeConfig, Request
from transfer.classification.sets import open_sets

CPU = torch.device("cpu")
CROPS = Augmentation(jitter_p=0, gray_p=0)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone(write_resnet18(tmp_path_factory.mktemp("weights") / "resnet18.pth"))


@pytest.fixture
def images(tmp_path):
    return image_folder(write_images(tmp_path / "set") / "train")


def request(tmp_path, **changes):
    return Request(pretrained="x.pth", folder=None, output_dir=tmp_path / "out", **changes)


def compute(tmp_path, backbone, images, quiet=True, **keys):
    config = ProbeConfig(**{"image_size": 32} | keys)
    network = FrozenNetwork(backbone, config.stage, CPU, precision=config.precision)
    return frozen_features(network, images, config, request(tmp_path, quiet=quiet), "train")


def reference_batch(images, pixels):
    view = transforms.Compose(
        [
            transforms.Resize(37),  # 32 * 256 / 224
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(pixels.mean, pixels.std),
        ]
    )
    return torch.stack([view(images.read(i)) for i in range(len(images))])


def test_features_are_the_networks_pooled_output_on_the_references_test_view(
    tmp_path, backbone, images
):
    network = build_resnet("resnet18", backbone.weights)
    with torch.no_grad():
        expected = network(reference_batch(images, backbone.facts.pixels))
    found = compute(tmp_path, backbone, images)
    assert found.values.shape == (24, 512)
    assert found.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("stage", "layer"), [("res2", 1), ("res3", 2), ("res4", 3)])
def test_a_stage_gives_its_own_averaged_output(tmp_path, backbone, images, stage, layer):
    network = build_resnet("resnet18", backbone.weights)
    seen = []
    getattr(network, f"layer{layer}").register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        network(reference_batch(images, backbone.facts.pixels))
    found = compute(tmp_path, backbone, images, stage=stage)
    torch.testing.assert_close(found.values, seen[0].mean(dim=(2, 3)), rtol=1e-3, atol=1e-4)


def test_cells_are_pooled_apart_and_all_sources_come_from_one_pass(backbone):
    images = torch.randn(3, 3, 96, 96)
    network = FrozenNetwork(backbone, "res5", CPU, beside=("res4-2x2", "res5", "res3"))
    found = network.look(images)
    assert list(found) == ["res5", "res4-2x2", "res3"]
    resnet = build_resnet("resnet18", backbone.weights)
    seen = {}
    for i in (2, 3):
        layer = getattr(resnet, f"layer{i}")
        layer.register_forward_hook(lambda *a, i=i: seen.update({i: a[2]}))
    with torch.no_grad():
        expected = {"res5": resnet(images)}
    corners = [seen[3][:, :, y : y + 3, x : x + 3].mean((2, 3)) for y in (0, 3) for x in (0, 3)]
    expected["res4-2x2"] = torch.stack(corners, dim=2).flatten(1)
    expected["res3"] = seen[2].mean((2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for source in found:
        assert torch.equal(FrozenNetwork(backbone, source, CPU)(images), found[source])


@pytest.fixture(scope="module")
def moco_files(tmp_path_factory):
    """Checkpoints of MoCo v1 and v2 as the reference saves them."""
    paths = {}
    for version, mlp in (("v1", False), ("v2", True)):
        paths[version] = tmp_path_factory.mktemp("moco") / f"{version}.pth.tar"
        state = moco_state("resnet18", mlp=mlp)
        torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state}, paths[version])
    return paths


@pytest.mark.parametrize("branch", ["query", "key"])
def test_the_heads_layers_are_those_of_the_branch(moco_files, branch):
    images = torch.randn(2, 3, 64, 64)
    backbone = load_backbone(moco_files["v2"], branch=branch)
    network = FrozenNetwork(backbone, "output", CPU, beside=("hidden", "res5"))
    found = network.look(images)
    prefix = f"module.encoder_{branch[0]}."
    state = torch.load(moco_files["v2"], weights_only=True)["state_dict"]
    head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    head.load_state_dict(
        {k.removeprefix(prefix + "fc."): v for k, v in state.items() if k.startswith(prefix + "fc")}
    )
    with torch.no_grad():
        torch.testing.assert_close(found["hidden"], head[:2](found["res5"]))
        torch.testing.assert_close(found["output"], head(found["res5"]))
    v1 = FrozenNetwork(load_backbone(moco_files["v1"], branch=branch), "output", CPU)
    assert v1(images).shape == (2, 128)


def test_a_head_that_is_not_there_is_said_in_one_line(moco_files, backbone):
    for held, source, line in (
        (backbone, "output", "no head that is known"),
        (load_backbone(moco_files["v1"]), "hidden", "a head of one layer, without a hidden one"),
    ):
        with pytest.raises(UserError, match=f"feature '{source}': found {line}") as caught:
            FrozenNetwork(held, source, CPU)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "stage", ["res6", "res5-1x1", "res4-2x3", "hidden-2x2", "res4-", "res4-9x9"]
)
def test_a_source_that_is_none_is_refused(stage):
    with pytest.raises(UserError, match=rf"stage is '{stage}', want one of res2, .*as res4-2x2"):
        ProbeConfig(stage=stage)


def test_bf16_is_near_fp32_and_cached_apart(tmp_path, backbone, images):
    exact = compute(tmp_path, backbone, images).values
    rough = compute(tmp_path, backbone, images, precision="bf16").values
    assert rough.dtype == torch.float32
    difference = (rough - exact).norm() / exact.norm()
    assert 1e-4 < difference < 0.04  # bf16 has 8 bits
    assert len(list((tmp_path / "out/features").glob("*.npy"))) == 2


def test_features_lie_in_the_file_and_not_in_memory(tmp_path, backbone, images):
    values = compute(tmp_path, backbone, images).values
    assert isinstance(values.numpy().base, np.memmap | type(values))
    (path,) = (tmp_path / "out/features").glob("*.npy")
    assert np.array_equal(np.load(path), values.numpy())
    values[0] = 7  # a private page: the file stays as it is
    assert not np.array_equal(np.load(path), values.numpy())


def test_only_missing_sources_are_computed_and_any_script_finds_them(
    tmp_path, backbone, images, monkeypatch
):
    config = ProbeConfig(image_size=32, feature_cache=str(tmp_path / "cache"))
    alone = FrozenNetwork(backbone, "res4", CPU)
    first = all_features(alone, images, config, request(tmp_path, quiet=True), "train")
    both = FrozenNetwork(backbone, "res5", CPU, beside=("res4",))
    found = all_features(both, images, config, request(tmp_path, quiet=True), "train")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    assert torch.equal(found["res4"].values, first["res4"].values)
    monkeypatch.setattr(FrozenNetwork, "look", None)  # nothing is computed any more
    again = frozen_features(alone, images, config, request(tmp_path, quiet=True), "train")
    assert torch.equal(again.values, first["res4"].values)


def test_pixels_are_those_the_checkpoint_expects(images):
    ours = Views(images, ProbeConfig(image_size=32), Pixels("RGB", (0.1, 0.2, 0.3), (1, 2, 4)))
    bgr = Views(images, ProbeConfig(image_size=32), Pixels("BGR", (0.1, 0.2, 0.3), (1, 2, 4)))
    plain = Views(images, ProbeConfig(image_size=32), Pixels("RGB", (0, 0, 0), (1, 1, 1)))
    view, values = ours[0, 5][0], plain[0, 5][0]
    for channel, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (1, 2, 4), strict=True)):
        torch.testing.assert_close(view[channel], (values[channel] - mean) / std)
    assert torch.equal(bgr[0, 5][0], view.flip(0))


def test_features_are_computed_once(tmp_path, backbone, images, capfd):
    first = compute(tmp_path, backbone, images, quiet=False)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").iterdir()}
    assert "24/24 images" in capfd.readouterr().err
    second = compute(tmp_path, backbone, images, quiet=False)
    assert torch.equal(first.values, second.values)
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").iterdir()
    } == files
    (path,) = (path for path in files if path.suffix == ".npy")
    assert f"from {path}" in capfd.readouterr().out
    description = json.loads(path.with_suffix(".json").read_text())
    assert (description["source"], description["precision"]) == ("res5", "fp32")


def test_cached_features_are_never_stale(tmp_path, backbone, images):
    def values(backbone=backbone, **keys):
        return compute(tmp_path, backbone, images, **keys).values

    before = values()
    moved = dict(backbone.weights)
    moved["bn1.running_mean"] = moved["bn1.running_mean"] + 0.5
    assert not torch.equal(values(Backbone(moved, backbone.facts)), before)
    shifted = Facts(**{**vars(backbone.facts), "pixels": Pixels(mean=(0, 0, 0))})
    assert not torch.equal(values(Backbone(backbone.weights, shifted)), before)
    assert not torch.equal(values(image_size=48), before)
    assert values(stage="res4").shape == (24, 256)
    padded = Facts(**{**vars(backbone.facts), "stem": "cifar"})
    other = FrozenNetwork(backbone, "res5", CPU)
    other.backbone = Backbone(backbone.weights, padded)  # the same weights in another network
    config = ProbeConfig(image_size=32)
    count = len(list((tmp_path / "out/features").glob("*.npy")))
    frozen_features(other, images, config, request(tmp_path, quiet=True), "train")
    assert len(list((tmp_path / "out/features").glob("*.npy"))) == count + 1
    path, other = images.paths[3], images.paths[20]
    size = max(path.stat().st_size, other.stat().st_size)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    before = values()
    path.write_bytes(other.read_bytes().ljust(size, b"\0"))  # same name and size: the date tells
    assert not torch.equal(values()[3], before[3])


def test_a_damaged_cache_is_computed_again(tmp_path, backbone, images):
    before = compute(tmp_path, backbone, images).values.clone()  # not the file that is cut
    (path,) = (tmp_path / "out/features").glob("*.npy")
    path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(compute(tmp_path, backbone, images).values, before)
    assert path.stat().st_size > 1000


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(tmp_path, backbone, images):
    refused = pytest.raises(UserError, match=r"\.npy: File too large; nothing was written")
    with refused, files_of_at_most(4096):  # of 48 KiB
        compute(tmp_path, backbone, images)
    assert not list((tmp_path / "out/features").iterdir())
    assert compute(tmp_path, backbone, images).values.shape == (24, 512)


def test_views_depend_on_seed_epoch_and_image_alone(images):
    views = Views(images, ProbeConfig(image_size=32), Pixels(), CROPS, seed=3)
    items = [(4, i) for i in (7, 2, 23, 11, 0)]
    alone = list(views.batches(items, 2, CPU, workers=0))
    helped = list(views.batches(items, 2, CPU, workers=2))
    assert [len(labels) for _, labels in alone] == [2, 2, 1]
    for (a, b), (c, d) in zip(alone, helped, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    torch.manual_seed(17)
    assert torch.equal(views[4, 23][0], alone[1][0][0])
    other_seed = Views(images, ProbeConfig(image_size=32), Pixels(), CROPS, seed=4)
    assert not torch.equal(views[5, 23][0], views[4, 23][0])
    assert not torch.equal(other_seed[4, 23][0], views[4, 23][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_one_line(tmp_path, backbone, images, workers):
    images.paths[5].write_bytes(b"no image")
    views = Views(images, ProbeConfig(image_size=32), Pixels())
    with pytest.raises(UserError, match=r"blue/5\.png: cannot be decoded") as caught:
        list(views.batches([(0, i) for i in range(24)], 8, CPU, workers))
    assert "\n" not in str(caught.value)


def test_all_broken_images_of_a_set_are_counted_and_named(tmp_path, backbone, images):
    for i in (1, 9, 10, 23):
        images.paths[i].write_bytes(b"no image")
    with pytest.raises(UserError, match="4 images cannot be decoded") as caught:
        compute(tmp_path, backbone, images)
    line = str(caught.value)
    assert all(str(images.paths[i]) in line for i in (1, 9, 10))
    assert "\n" not in line
    assert not list(tmp_path.glob("out/features/*"))


def test_the_network_has_nothing_to_train_and_stays_in_eval_mode(backbone):
    network = FrozenNetwork(backbone, "res5", CPU)
    assert not any(p.requires_grad for p in network.resnet.parameters())
    assert not any(module.training for module in network.resnet.modules())
    network(torch.randn(4, 3, 32, 32))
    network.prove_unmoved()


@pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_var", "bn1.num_batches_tracked"])
def test_a_moved_tensor_is_noticed(backbone, name):
    network = FrozenNetwork(backbone, "res5", CPU)
    tensor = network.resnet.state_dict()[name]
    tensor[(0,) * tensor.dim()] += 1
    with pytest.raises(RuntimeError, match="the frozen backbone changed"):
        network.prove_unmoved()


def test_without_a_folder_the_embedded_digits_are_taken():
    sets = open_sets(None)
    assert sets.name == "embedded digits"
    assert sets.train.classes == tuple("0123456789")
    assert not {p.read_bytes() for p in sets.train.paths} & {p.read_bytes() for p in sets.val.paths}


def test_sets_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    root = write_images(tmp_path / "set", train=1, val=1)
    lines = {
        "nothing": (tmp_path / "nothing", "found nothing, want a folder with train/"),
        "no train": (root / "val", "has no train/"),
        "no val": (tmp_path / "half", "has no val/"),
        "classes": (root, r"different class folders \(only in train/: red; only in val/: pink\)"),
    }
    write_images(tmp_path / "half", train=1, val=1).joinpath("val").rename(tmp_path / "moved")
    (root / "val/red").rename(root / "val/pink")
    for folder, line in lines.values():
        with pytest.raises(UserError, match=line) as caught:
            open_sets(folder)
        assert "\n" not in str(caught.value)


def test_arch_must_agree_with_the_checkpoint(tmp_path):
    path = write_resnet18(tmp_path / "a.pth")
    asked = Request(pretrained=str(path), folder=None, output_dir=tmp_path, arch="resnet50")
    with pytest.raises(UserError, match="holds a resnet18, --arch wants resnet50"):
        open_backbone(asked, 0)
    drawn = Request(pretrained="random", folder=None, output_dir=tmp_path, arch="resnet18")
    assert open_backbone(drawn, 1).facts.arch == "resnet18"


@pytest.mark.parametrize("name", ["cuda:99", "meta", "abacus"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(UserError, match="--device"):
        pick_device(name)
