import pytest
import torch
from torchvision import transforms

from convert.backbone import Backbone, Facts, build_resnet, load_backbone
from convert.errors import UserError
from convert.pixels import Pixels
from pretrain.sources import image_folder
from pretrain.views import Augmentation
from tests.small_sets import write_images, write_resnet18
from transfer.classification.features import (
    FrozenNetwork,
    Views,
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
    network = FrozenNetwork(backbone, config.stage, CPU)
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
    assert f"from {next(iter(files))}" in capfd.readouterr().out


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
    path, other = images.paths[3], images.paths[20]
    size = max(path.stat().st_size, other.stat().st_size)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    before = values()
    path.write_bytes(other.read_bytes().ljust(size, b"\0"))  # same name and size: the date tells
    assert not torch.equal(values()[3], before[3])


def test_a_damaged_cache_is_computed_again(tmp_path, backbone, images):
    before = compute(tmp_path, backbone, images)
    (path,) = (tmp_path / "out/features").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(compute(tmp_path, backbone, images).values, before.values)
    assert path.stat().st_size > 1000


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
