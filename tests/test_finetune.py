import json
import re
import signal

import pytest
import torch

from convert.backbone import load_backbone
from convert.errors import Stopped, StopRequest, UserError
from pretrain.config import load_config
from pretrain.sources import image_folder
from tests import tuning_processes
from tests.conftest import ROOT
from tests.small_sets import files_of_at_most, on_processes, write_images
from transfer import finetune
from transfer.classification.features import Views
from transfer.classification.few_labels import labelled
from transfer.classification.finetuning import FinetuneConfig, Tuning

SHORT = ["image_size", "32", "-b", "8", "--epochs", "3", "--schedule", "2", "--device", "cpu"]


def run(weights, images, out, *words):
    named = ["--pretrained", str(weights), "--output-dir", str(out), "--quiet"]
    assert finetune.main([str(images), *named, *SHORT, *map(str, words)]) == 0
    return json.loads((out / "results.json").read_text())


def saved(out):
    return torch.load(out / "checkpoint.pth.tar", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_all_of_the_network_learns_and_the_colours_are_told_apart(weights, images, tmp_path):
    record = run(weights, images, tmp_path / "out", "--epochs", "12", "--schedule", "9")
    assert record["metrics"]["finetune/top1"] > 60
    assert record["metrics"]["finetune/top5"] == 100
    before, after = load_backbone(weights).weights, saved(tmp_path / "out")["state_dict"]
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert not still
    losses = [entry["loss"] for entry in saved(tmp_path / "out")["moco_transfer"]["history"]]
    assert losses[-1] < losses[0]


def test_frozen_batch_norm_stays_to_the_bit(weights, images, tmp_path):
    record = run(weights, images, tmp_path / "out", "--lr", "0.001", "bn", "frozen")
    assert record["protocol"]["bn"] == "frozen"
    before, after = load_backbone(weights).weights, saved(tmp_path / "out")["state_dict"]
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert still == {name for name in before if "bn" in name or "downsample.1" in name}


class StopAfter(StopRequest):
    """A signal that comes before a step ends."""

    def __init__(self, network, steps):
        super().__init__()
        self.left = steps
        network.register_forward_hook(self.count)

    def count(self, *_):
        self.left -= 1
        if self.left == 0:
            self.signum = signal.SIGTERM


def test_a_stopped_run_goes_on_to_the_same_bits(weights, images, tmp_path, monkeypatch):
    whole = run(weights, images, tmp_path / "whole")
    train = Tuning.train
    monkeypatch.setattr(
        Tuning,
        "train",
        lambda self, *args: train(self, *args[:5], StopAfter(self.network, 4), args[6]),
    )
    with pytest.raises(Stopped):
        run(weights, images, tmp_path / "cut")
    monkeypatch.undo()
    assert saved(tmp_path / "cut")["moco_transfer"]["step"] == 4  # in the middle of the 2nd epoch
    with pytest.raises(UserError, match="a run that was not finished; go on with --resume"):
        run(weights, images, tmp_path / "cut")
    with pytest.raises(UserError, match="belongs to another run: found lr"):
        run(weights, images, tmp_path / "cut", "--resume", "--lr", "0.5")
    resumed = run(weights, images, tmp_path / "cut", "--resume")
    assert resumed["metrics"] == whole["metrics"]
    first, second = saved(tmp_path / "whole"), saved(tmp_path / "cut")
    assert same(first["state_dict"], second["state_dict"])
    momenta = [x["optimizer"]["state"] for x in (first, second)]
    assert all(same(momenta[0][k], momenta[1][k]) for k in momenta[0])


def test_three_processes_take_the_steps_of_one_and_resume_to_the_bit(weights, tmp_path):
    images = write_images(tmp_path / "set", train=6, val=3)
    spec = {
        "request": {"pretrained": str(weights), "folder": str(images), "device": "cpu"},
        # 18 images: shares of 2, 2 and 3, and in the last step of an epoch of 1, 1 and 2.
        "config": {"image_size": 32, "batch_size": 7, "epochs": 2, "lr": 0.01},
        "folder": str(tmp_path),
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    words = [tmp_path / "spec.json"]
    done = on_processes(3, "tests/tuning_processes.py", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    tuning_processes.train(spec, "one")
    tuning_processes.train(spec, "one few", **tuning_processes.FEW)
    one, three, parts = (saved(tmp_path / name) for name in ("one", "three", "parts"))
    for name, value in one["state_dict"].items():  # float64
        torch.testing.assert_close(three["state_dict"][name], value, rtol=1e-6, atol=1e-8)
    few = [saved(tmp_path / name)["state_dict"] for name in ("one few", "three few")]
    for name, value in few[0].items():  # statistics of two images magnify rounding
        torch.testing.assert_close(few[1][name], value, rtol=1e-5, atol=1e-7)
    losses = [[e["loss"] for e in x["moco_transfer"]["history"]] for x in (one, three)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    assert same(parts["state_dict"], three["state_dict"])
    records = [json.loads((tmp_path / f"{n}/results.json").read_text()) for n in ("one", "three")]
    assert records[1]["metrics"] == records[0]["metrics"]
    assert records[1]["fingerprint"] == records[0]["fingerprint"]
    assert [record["config"]["processes"] for record in records] == [1, 3]


def test_a_full_disk_is_one_line(weights, images, tmp_path):
    refused = pytest.raises(UserError, match=r"pth\.tar: File too large; nothing was written")
    with refused, files_of_at_most(2**20):
        run(weights, images, tmp_path / "out", "--epochs", 1)
    assert not list((tmp_path / "out").iterdir())


def test_one_step_is_sgd_on_the_cross_entropy(weights, images):
    config = FinetuneConfig(image_size=32, batch_size=24, epochs=1, lr=0.1, head_lr=0.7)
    backbone = load_backbone(weights)
    tuning = Tuning(config, backbone, 3, 0, 24, torch.device("cpu"))
    network = backbone.build()
    network.fc = torch.nn.Linear(512, 3)
    network.load_state_dict(tuning.network.state_dict())
    listed = image_folder(images / "train")
    views = Views(listed, config, backbone.facts.pixels)
    batch, labels = next(iter(views.batches([(0, i) for i in range(24)], 24, tuning.device, 0)))
    tuning._train_mode()
    tuning._take_step(batch, labels, 24)
    network.train()
    torch.nn.functional.cross_entropy(network(batch), labels).backward()
    for name, value in network.named_parameters():
        rate = 0.7 if name.startswith("fc") else 0.1
        moved = value - rate * (value.grad + 1e-4 * value)
        torch.testing.assert_close(
            tuning.network.state_dict()[name], moved.detach(), rtol=1e-3, atol=1e-4
        )


def test_the_rate_falls_as_the_recipe_says():
    step, cosine = FinetuneConfig(), FinetuneConfig(decay="cos", epochs=10)
    assert [step.factor(e) for e in (0, 69.9, 70, 89, 90)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert [cosine.factor(e) for e in (0, 5, 10)] == pytest.approx([1, 0.5, 0])


# --- few labels -----------------------------------------------------------------------------------


def test_a_share_of_the_labels_is_drawn_class_by_class(tmp_path):
    listed = image_folder(write_images(tmp_path, train=20, val=1) / "train")
    places = labelled(listed, "10%", 0)
    assert [listed.labels[place] for place in places] == [0, 0, 1, 1, 2, 2]
    assert places == labelled(listed, "10%", 0) != labelled(listed, "10%", 1)
    assert len(labelled(listed, "1%", 0)) == 3  # one a class at least
    assert labelled(listed, "", 0) == tuple(range(60))


def test_a_list_names_the_images_that_keep_their_labels(images, weights, tmp_path):
    (tmp_path / "list.txt").write_text("blue/1.png\ngreen/0.png\nred/3.png\nred/2.png\n")
    record = run(weights, images, tmp_path / "out", "labels", tmp_path / "list.txt", "-b", "2")
    assert record["protocol"]["labels"] == "listed"
    listed = image_folder(images / "train")
    places = labelled(listed, str(tmp_path / "list.txt"), 0)
    names = [f"{listed.paths[p].parent.name}/{listed.paths[p].name}" for p in places]
    assert names == ["blue/1.png", "green/0.png", "red/2.png", "red/3.png"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("blue/1.png\nblue/77.png\ncat.JPEG\n", "2 of 3 lines name no image in .*blue/77.png"),
        ("blue/1.png\nred/1.png\n", r"leaves class 'green' without an image \(1 such"),
        ("blue/1.png\nblue/1.png\nred/1.png\ngreen/1.png\n", "names an image twice"),
        ("1.png\n", "several classes have images of the same name"),
        (None, "cannot be read"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_in_one_line(images, tmp_path, text, line):
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=line) as caught:
        labelled(image_folder(images / "train"), str(tmp_path / "list.txt"), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["labels", "0%"], "labels is 0%, want a share above 0% and up to 100%"),
        (["labels", "some%"], "labels is some%"),
        (["bn", "gone"], "bn is 'gone', want one of tuned, frozen"),
        (["batch_size", "1"], "batch_size is 1, want at least 2"),
        (["stage", "res4"], "stage is res4: fine-tuning trains the whole backbone"),
        (["decay", "line"], "decay is 'line', want one of step, cos"),
        (["--lr", "-1"], "lr is -1.0, want at least 0"),
        (["--lr", "inf"], "lr is inf, want at least 0"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    weights, images, tmp_path, monkeypatch, words, line
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(line)):
        finetune.main([str(images), "--pretrained", str(weights), "image_size", "32", *words])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_rate_that_is_too_high_for_the_only_step_says_so(weights, images, tmp_path):
    with pytest.raises(UserError, match=r"after step 1 the network answers with no numbers"):
        run(weights, images, tmp_path / "out", "-b", "24", "--epochs", "1", "--lr", "1e38")
    assert not (tmp_path / "out/results.json").exists()


def test_a_rate_that_is_too_high_says_so(weights, images, tmp_path):
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+ .*lower --lr"):
        run(weights, images, tmp_path / "out", "--lr", "1e30")


@pytest.mark.parametrize("name", ["imagenet", "inat18", "imagenet_1percent", "imagenet_10percent"])
def test_the_shipped_recipes_load(name):
    config = load_config(FinetuneConfig, ROOT / f"configs/classification/finetune_{name}.yaml")
    rates = {"imagenet": (0.03, 100), "inat18": (0.025, 100)}
    expected = rates.get(name, (0.05, 30 if "10" in name else 60))
    assert (config.lr, config.epochs) == expected
