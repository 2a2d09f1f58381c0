"""The FCN on small drawings: shapes of four colours, each a class, on a grey ground."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convert.backbone import load_backbone, random_backbone
from convert.errors import UserError
from convert.pixels import Pixels
from tests.conftest import ROOT
from transfer import semseg
from transfer.segmentation.config import SegmentationConfig
from transfer.segmentation.crops import Crops, cut, normalised
from transfer.segmentation.network import Fcn
from transfer.segmentation.scoring import Confusion
from transfer.segmentation.sets import CITY_CLASSES, IGNORED, open_pairs

COLOURS = {0: (120, 120, 120), 3: (220, 40, 40), 7: (40, 200, 60), 15: (60, 80, 220)}
SMALL = ["--batch-size", "4", "--device", "cpu", "--quiet", "train_split", "train"]
SMALL += ["crop_size", "64", "scale", "0.8,1.25"]


def draw(seed: int) -> tuple[Image.Image, np.ndarray]:
    """Draw one, two or three rectangles; the outermost pixels are ignored."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((64, 80), np.uint8)
    for number in rng.choice([3, 7, 15], rng.integers(1, 4), replace=False):
        top, left = rng.integers(2, 30), rng.integers(2, 40)
        labels[top : top + rng.integers(16, 32), left : left + rng.integers(16, 36)] = number
    pixels = np.zeros((64, 80, 3))
    for number, colour in COLOURS.items():
        pixels[labels == number] = colour
    labels[:2] = IGNORED
    noisy = (pixels + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(noisy), labels


def write_voc(root: Path, train: int = 8, val: int = 3) -> Path:
    lists = root / "VOC2012/ImageSets/Segmentation"
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / "VOC2012" / folder).mkdir(parents=True)
    lists.mkdir(parents=True)
    names = [f"{place:03d}" for place in range(train + val)]
    for place, name in enumerate(names):
        image, labels = draw(place)
        image.save(root / f"VOC2012/JPEGImages/{name}.jpg", quality=95)
        numbered = Image.fromarray(labels).convert("P")
        numbered.putpalette(list(range(256)) * 3)
        numbered.save(root / f"VOC2012/SegmentationClass/{name}.png")
    (lists / "train.txt").write_text("\n".join(names[:train]))
    (lists / "val.txt").write_text("\n".join(names[train:]))
    return root


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc"))


def run(voc: Path, weights: Path, out: Path, *words: object) -> dict:
    flags = ["--pretrained", weights, "--output-dir", out, *SMALL, *words]
    assert semseg.main([str(voc), *map(str, flags)]) == 0
    return json.loads((out / "results.json").read_text())


def state(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pth", weights_only=True)["network"]


# --- the network ----------------------------------------------------------------------------------


def test_the_network_is_the_papers():
    network = Fcn(random_backbone("resnet50", 0), 21, seed=0)
    conv5 = [m for m in network.body[4].modules() if isinstance(m, torch.nn.Conv2d)]
    assert {m.stride for m in conv5} == {(1, 1)}
    assert [m.dilation for m in conv5 if m.kernel_size == (3, 3)] == [(2, 2)] * 3
    head = 2048 * 256 * 9 + 512 + 256 * 256 * 9 + 512 + 256 * 21 + 21
    assert sum(p.numel() for p in network.parameters()) == 23_508_032 + head
    with torch.no_grad():
        assert network.body(torch.zeros(1, 3, 64, 96)).shape == (1, 2048, 4, 6)  # stride 16
        assert network.eval()(torch.zeros(1, 3, 50, 70)).shape == (1, 21, 50, 70)


def test_the_backbones_weights_arrive_whole(weights):
    backbone = load_backbone(weights)
    body = Fcn(backbone, 21, seed=0).body.state_dict()
    held = sorted(float(t.double().sum()) for t in body.values())
    assert held == sorted(float(t.double().sum()) for t in backbone.weights.values())


def test_a_cifar_stem_is_refused():
    from dataclasses import replace

    backbone = random_backbone("resnet18", 0)
    cifar = replace(backbone, facts=replace(backbone.facts, stem="cifar"))
    with pytest.raises(UserError, match="ImageNet stem"):
        Fcn(cifar, 21, seed=0)


# --- crops ----------------------------------------------------------------------------------------


def test_a_crop_depends_on_its_place_alone_and_labels_follow_their_pixels(voc):
    pairs = open_pairs("voc12", voc, "train")
    crops = Crops(pairs, Pixels(), 48, (0.5, 2.0), seed=1)
    ground, sides = torch.tensor(Pixels().mean), set()
    for place in range(24):
        item, again = crops[place], crops[place]
        assert not isinstance(item, UserError)
        assert not isinstance(again, UserError)
        x, y = item
        assert torch.equal(x, again[0])
        assert torch.equal(y, again[1])
        assert (x.shape, y.shape) == ((3, 48, 48), (48, 48))
        shown = (x * torch.tensor(Pixels().std)[:, None, None] + ground[:, None, None]) * 255
        for number, colour in COLOURS.items():
            inside = shown[:, y == number]
            if inside.shape[1] > 200:  # the seam between two colours is smooth, a shape is not
                near = (inside.median(dim=1).values - torch.tensor(colour).float()).abs()
                assert near.max() < 40
        sides.add(int((y == IGNORED).sum()))
    assert len(sides) > 5
    assert not torch.equal(crops[0][0], Crops(pairs, Pixels(), 48, (0.5, 2.0), seed=2)[0][0])


def test_half_of_the_crops_are_mirrored(voc):
    pairs = open_pairs("voc12", voc, "train")
    crops = Crops(pairs, Pixels(), 80, (1.0, 1.0), seed=0)
    whole = {i: torch.from_numpy(pairs.read(i)[1].copy()).long() for i in range(len(pairs))}
    mirrored = 0
    for place in range(64):
        item = crops[place]
        assert not isinstance(item, UserError)
        seen = item[1][:64]
        plain = any(torch.equal(seen, labels) for labels in whole.values())
        flipped = any(torch.equal(seen, labels.flip(1)) for labels in whole.values())
        assert plain or flipped
        mirrored += flipped and not plain
    assert 20 < mirrored < 44


def test_every_epoch_has_every_image_once(voc):
    pairs = open_pairs("voc12", voc, "train")
    seen: list[int] = []

    class Listening(type(pairs)):
        def read(self, index):
            seen.append(index)
            return pairs.read(index)

    crops = Crops(Listening(**vars(pairs)), Pixels(), 32, (1.0, 1.0), seed=0)
    for place in range(16):
        crops[place]
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
    assert seen[:8] != seen[8:]


def test_what_is_too_small_is_padded_and_ignored():
    x, y = cut(torch.ones(3, 10, 40), torch.ones(10, 40).long(), 20, 0.999, 0.5)
    assert (x.shape, y.shape) == ((3, 20, 20), (20, 20))
    assert (x[:, 10:] == 0).all()  # the mean pixel
    assert (y[10:] == IGNORED).all()
    assert (y[:10] == 1).all()


def test_a_bgr_backbone_sees_bgr():
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    x = normalised(image, Pixels("BGR", (0, 0, 0), (1, 1, 1)))
    assert x[:, 0, 0].tolist() == [0, 0, 1]


# --- scoring --------------------------------------------------------------------------------------


def test_mean_iou_worked_out_by_hand():
    confusion = Confusion(["ground", "cat", "dog", "bird"])
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255], [2, 2, 2, 2]])
    found = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 3], [2, 2, 0, 2]])
    confusion.add(found, truth)
    # ground: 3 hits, 4 true, 5 found -> 3/6; cat: 2 hits, 3 true, 3 found -> 2/4; dog: 3/4;
    # bird was found under an ignored pixel only, so it does not count.
    assert confusion.iou() == pytest.approx({"ground": 50, "cat": 50, "dog": 75})
    wanted = {"voc12/mIoU": 175 / 3, "voc12/pixel_accuracy": 100 * 8 / 11}
    assert confusion.metrics("voc12") == pytest.approx(wanted)


def test_perfect_predictions_score_a_hundred():
    confusion = Confusion(["a", "b"])
    truth = torch.tensor([[0, 1], [1, 255]])
    confusion.add(truth.clamp(max=1), truth)
    assert confusion.metrics("t") == {"t/mIoU": 100.0, "t/pixel_accuracy": 100.0}


# --- runs -----------------------------------------------------------------------------------------


def test_the_learning_rate_falls_at_70_and_90_percent():
    config = SegmentationConfig()
    rates = [config.lr_at(i) for i in (0, 20_999, 21_000, 26_999, 27_000, 29_999)]
    assert rates == pytest.approx([0.003, 0.003, 0.0003, 0.0003, 0.00003, 0.00003])


def test_it_learns_the_colours_and_leaves_a_whole_record(voc, weights, tmp_path):
    start = run(voc, weights, tmp_path / "a", "--iterations", 1)
    record = run(voc, weights, tmp_path / "b", "--iterations", 40, "--lr", 0.02)
    assert record["metrics"]["voc12/mIoU"] > start["metrics"]["voc12/mIoU"] + 20
    assert record["task"] == "voc12"
    assert record["protocol"]["iterations"] == 40
    assert record["checkpoint"]["arch"] == "resnet18"
    assert (record["data"]["train"]["images"], record["data"]["val"]["images"]) == (8, 3)
    assert record["fingerprint"] != start["fingerprint"]
    assert record["recipe"]["name"] == "voc12_R50_FCN_30k"
    assert record["recipe"]["changed"]["iterations"] == [30000, 40]
    assert set(record["details"]["per_class"]["voc12/IoU"]) >= {"background", "bird"}


def test_a_killed_run_ends_in_the_same_bits(voc, weights, tmp_path):
    words = ["--iterations", "8", "checkpoint_every", "1"]
    run(voc, weights, tmp_path / "whole", *words)
    command = [sys.executable, ROOT / "transfer/semseg.py", voc, "--pretrained", weights]
    command += ["--output-dir", tmp_path / "cut", *SMALL, *words]
    process = subprocess.Popen([str(word) for word in command])
    while not (tmp_path / "cut/checkpoint.pth").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    resumed = run(voc, weights, tmp_path / "cut", *words, "--resume")
    whole, cut_ = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut_[name]) for name in whole)
    first = json.loads((tmp_path / "whole/results.json").read_text())
    assert resumed["metrics"] == first["metrics"]


def test_sigterm_saves_and_leaves_with_its_number(voc, weights, tmp_path):
    words = ["--iterations", "500", "checkpoint_every", "1"]
    command = [sys.executable, ROOT / "transfer/semseg.py", voc, "--pretrained", weights]
    command += ["--output-dir", tmp_path / "out", *SMALL, *words]
    process = subprocess.Popen([str(word) for word in command])
    while not (tmp_path / "out/checkpoint.pth").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not (tmp_path / "out/results.json").exists()


def test_two_processes_compute_what_one_does(voc, weights, tmp_path):
    words = ["--iterations", "3", "checkpoint_every", "1"]
    run(voc, weights, tmp_path / "one", *words)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", ROOT / "transfer/semseg.py", voc]
    command += ["--pretrained", weights, "--output-dir", tmp_path / "two", *SMALL, *words]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for name, tensor in one.items():
        assert torch.allclose(tensor.float(), two[name].float(), atol=2e-4), name
    first, second = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")
    )
    assert second["metrics"]["voc12/mIoU"] == pytest.approx(first["metrics"]["voc12/mIoU"], abs=1)
    assert second["protocol"]["processes"] == 2


def test_cityscapes_ids_become_training_ids(tmp_path):
    for split in ("train", "val"):
        for folder in ("leftImg8bit", "gtFine"):
            (tmp_path / "cityscapes" / folder / split / "ulm").mkdir(parents=True)
        ids = np.array([[7, 8, 33], [0, 34 - 1, 4], [255, 24, 26]], np.uint8)
        name = f"cityscapes/{{}}/{split}/ulm/ulm_000_{{}}.png"
        Image.new("RGB", (3, 3)).save(tmp_path / name.format("leftImg8bit", "leftImg8bit"))
        Image.fromarray(ids).save(tmp_path / name.format("gtFine", "gtFine_labelIds"))
    pairs = open_pairs("cityscapes", tmp_path, "val")
    _, numbers = pairs.read(0)
    assert numbers.tolist() == [[0, 1, 18], [255, 18, 255], [255, 11, 13]]
    assert CITY_CLASSES[11] == "person"
    assert CITY_CLASSES[13] == "car"


# --- bad input ------------------------------------------------------------------------------------


def damaged(voc: Path, root: Path, how: str) -> Path:
    import shutil

    copy = root / "copy"
    shutil.copytree(voc, copy)
    inside = copy / "VOC2012"
    labels = np.asarray(Image.open(inside / "SegmentationClass/000.png"))
    if how == "unknown id":
        Image.fromarray(np.where(labels == 0, 77, labels).astype(np.uint8)).save(
            inside / "SegmentationClass/000.png"
        )
    elif how == "other size":
        Image.fromarray(labels[:10]).save(inside / "SegmentationClass/000.png")
    elif how == "missing":
        (inside / "JPEGImages/001.jpg").unlink()
    elif how == "broken":
        (inside / "SegmentationClass/000.png").write_bytes(b"no png")
    elif how == "no list":
        (inside / "ImageSets/Segmentation/train.txt").unlink()
    elif how == "empty list":
        (inside / "ImageSets/Segmentation/train.txt").write_text("\n")
    elif how == "no photographs":
        shutil.rmtree(inside / "JPEGImages")
    return copy


@pytest.mark.parametrize(
    ("how", "words", "line"),
    [
        ("unknown id", [], "000.png: holds id 77, want 0 to 20, or 255"),
        ("other size", [], "has shape (10, 80), its photograph (64, 80)"),
        ("missing", [], "1 of 16 files of train are missing, first"),
        ("broken", [], "000.png: cannot be read"),
        ("no list", [], "train.txt: no such list"),
        ("empty list", [], "names no image"),
        ("no photographs", [], "has no JPEGImages/ in it"),
        ("", ["layout", "cityscapes"], "has no leftImg8bit/ in it"),
        ("", ["train_split", "train_aug"], "Semantic Boundaries Dataset"),
        ("", ["layout", "ade20k"], "want one of voc12, cityscapes"),
        ("", ["lr", "-1"], "lr is -1.0, want more than 0"),
        ("", ["lr", "1e9"], "lower lr"),
        ("", ["scale", "2,1"], "want two factors"),
        ("", ["crop", "3"], "unknown key 'crop'"),
    ],
)
def test_a_mistake_is_one_line(how, words, line, voc, weights, tmp_path, capsys):
    folder = damaged(voc, tmp_path, how) if how else voc
    flags = ["--pretrained", str(weights), "--output-dir", str(tmp_path / "out"), *SMALL]
    with pytest.raises(UserError) as caught:
        semseg.main([str(folder), *flags, "iterations", "4", *words])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/results.json").exists()


def test_a_cityscapes_folder_without_fine_annotations_is_one_line(tmp_path):
    (tmp_path / "leftImg8bit/train/ulm").mkdir(parents=True)
    with pytest.raises(UserError, match="has no gtFine/train"):
        open_pairs("cityscapes", tmp_path, "train")
