import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchvision
import yaml

from convert.backbone import load_backbone
from convert.errors import UserError
from pretrain.config import load_config
from pretrain.sources import image_folder
from tests.conftest import ROOT
from tests.small_sets import files_of_at_most, on_processes, write_images, write_resnet18
from transfer import main_lincls
from transfer.classification import linear
from transfer.classification.features import Features, FrozenNetwork, Views
from transfer.classification.heads import LinearConfig, Standardizer, score
from transfer.classification.request import ProbeConfig

CACHED = ["features", "cached", "standardize", "true", "image_size", "32"]
AUGMENTED = ["features", "augmented", "image_size", "32"]
SHORT = ["--lr", "0.05", "-b", "10", "--schedule", "3", "--device", "cpu"]


def run(weights, images, out, *words):
    named = ["--pretrained", str(weights), "--output-dir", str(out), "--quiet"]
    assert main_lincls.main([str(images), *named, *SHORT, *map(str, words)]) == 0
    return json.loads((out / "results.json").read_text())


def load(path):
    return torch.load(path, weights_only=True)


def saved_features(out):
    """The cached features of the training and of the test images, 8 and 4 a class."""
    values = [torch.from_numpy(np.load(path)) for path in (out / "features").glob("*.npy")]
    labels = {24: [0] * 8 + [1] * 8 + [2] * 8, 12: [0] * 4 + [1] * 4 + [2] * 4}
    return [Features(value, torch.tensor(labels[len(value)])) for value in values]


def same(a, b):
    """Equality of nested containers, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("mode", [CACHED, AUGMENTED], ids=["cached", "augmented"])
def test_only_the_classifier_moves_and_the_file_has_the_references_layout(
    weights, images, tmp_path, mode
):
    record = run(weights, images, tmp_path / "out", "--epochs", 2, *mode)
    content = load(tmp_path / "out/checkpoint.pth.tar")
    assert {"epoch", "arch", "state_dict", "best_acc1", "optimizer"} <= content.keys()
    assert (content["epoch"], content["arch"]) == (2, "resnet18")
    assert content["state_dict"]["fc.weight"].shape == (3, 512)  # classes from the data, not 1000
    assert content["state_dict"]["fc.weight"].std() > 0.0101  # it was .01 before it learned
    assert len(content["optimizer"]["state"]) == 2
    before = load(weights)
    for name, tensor in before.items():
        if not name.startswith("fc."):
            assert torch.equal(content["state_dict"][name], tensor), name
    assert content["state_dict"].keys() == before.keys()
    assert load_backbone(tmp_path / "out/checkpoint.pth.tar").facts.arch == "resnet18"
    assert set(record["metrics"]) == {"linear/top1", "linear/top5"}
    assert record["metrics"]["linear/top5"] == 100.0  # of three classes
    assert record["protocol"]["selection"] == "last epoch"


def test_a_backbone_that_moves_voids_the_number(weights, images, tmp_path, monkeypatch):
    still = FrozenNetwork.look

    def moving(self, images):
        self.resnet.bn1.train()
        return still(self, images)

    monkeypatch.setattr(FrozenNetwork, "look", moving)
    with pytest.raises(RuntimeError, match="the frozen backbone changed"):
        run(weights, images, tmp_path / "out", "--epochs", 1, *AUGMENTED)
    assert not (tmp_path / "out/results.json").exists()


def test_the_number_is_the_last_epochs_not_the_best(weights, images, tmp_path):
    record = run(weights, images, tmp_path / "out", "--epochs", 5, "--lr", "3", *AUGMENTED)
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4, 5]
    assert record["metrics"]["linear/top1"] == log[-1]["val_top1"]
    best = max(entry["val_top1"] for entry in log)
    assert load(tmp_path / "out/checkpoint.pth.tar")["best_acc1"] == best


def test_the_saved_network_alone_gives_the_reported_number(weights, images, tmp_path):
    record = run(weights, images, tmp_path / "out", "--epochs", 5, *CACHED)
    content = load(tmp_path / "out/checkpoint.pth.tar")
    network = torchvision.models.resnet18(num_classes=3)
    network.load_state_dict(content["state_dict"])
    pixels = load_backbone(weights).facts.pixels
    views = Views(image_folder(images / "val"), ProbeConfig(image_size=32), pixels)
    with torch.no_grad():
        logits = network.eval()(torch.stack([views[0, i][0] for i in range(12)]))
    right = logits.argmax(1) == torch.tensor(views.images.labels)
    assert 100 * right.float().mean().item() == pytest.approx(record["metrics"]["linear/top1"])
    train, val = sorted(saved_features(tmp_path / "out"), key=lambda f: -len(f.labels))
    trained = content["moco_transfer"]["fc"]
    standardized = Standardizer.of(train.values)(val.values)
    expected = standardized @ trained["weight"].T + trained["bias"]
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", [CACHED, AUGMENTED], ids=["cached", "augmented"])
def test_resuming_equals_not_stopping(weights, images, tmp_path, mode):
    whole = run(weights, images, tmp_path / "whole", "--epochs", 5, *mode)
    run(weights, images, tmp_path / "parts", "--epochs", 2, *mode)
    parts = run(weights, images, tmp_path / "parts", "--epochs", 5, "--resume", *mode)
    assert parts["per_seed"] == whole["per_seed"]
    files = [load(tmp_path / name / "checkpoint.pth.tar") for name in ("parts", "whole")]
    assert same(*files)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("parts", "whole")]
    assert logs[0] == logs[1]


def test_a_full_disk_is_one_line(weights, images, tmp_path):
    refused = pytest.raises(UserError, match=r"pth\.tar: File too large; nothing was written")
    with refused, files_of_at_most(2**20):  # the features are smaller, the network is not
        run(weights, images, tmp_path / "out", "--epochs", 1, *CACHED)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["features"]


def test_ctrl_c_saves_the_last_whole_epoch_and_ends_with_130(weights, images, tmp_path):
    out = tmp_path / "out"
    words = [images, "--pretrained", weights, "--output-dir", out, *SHORT, *CACHED]
    command = [sys.executable, str(ROOT / "transfer/main_lincls.py"), *map(str, words)]
    process = subprocess.Popen(
        [*command, "--epochs", "10000000"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    features = out / "features"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len([*features.glob("*.npy")]) < 2:
        time.sleep(0.1)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "main_lincls.py: stopped by SIGINT"
    assert "Traceback" not in errors
    done = load(out / "checkpoint.pth.tar")["epoch"]
    assert done > 0
    assert not (out / "results.json").exists()
    with pytest.raises(UserError, match="not finished; go on with --resume"):
        run(weights, images, out, "--epochs", done + 1, *CACHED)
    run(weights, images, out, "--epochs", done + 1, "--resume", *CACHED)
    assert load(out / "checkpoint.pth.tar")["epoch"] == done + 1


def test_evaluate_scores_the_saved_classifier_again(weights, images, tmp_path, capsys):
    record = run(weights, images, tmp_path / "out", "--epochs", 3, *CACHED)
    printed = capsys.readouterr().out
    run(weights, images, tmp_path / "out", "--epochs", 3, "--resume", "-e", *CACHED)
    assert capsys.readouterr().out == printed
    again = json.loads((tmp_path / "out/evaluate/results.json").read_text())
    assert again["metrics"] == record["metrics"]
    with pytest.raises(UserError, match="--evaluate needs the trained classifier"):
        run(weights, images, tmp_path / "new", "-e", *CACHED)


def test_a_classifier_that_the_reference_saved_is_gone_on_with(weights, images, tmp_path):
    run(weights, images, tmp_path / "ours", "--epochs", 2, *AUGMENTED)
    content = load(tmp_path / "ours/checkpoint.pth.tar")
    theirs = {k: content[k] for k in ("epoch", "arch", "best_acc1", "optimizer")}
    theirs["state_dict"] = {f"module.{k}": v for k, v in content["state_dict"].items()}
    path = tmp_path / "theirs.pth.tar"
    torch.save(theirs, path)
    run(weights, images, tmp_path / "on", "--epochs", 4, "--resume", path, *AUGMENTED)
    run(weights, images, tmp_path / "ours", "--epochs", 4, "--resume", *AUGMENTED)
    on, ours = (load(tmp_path / name / "checkpoint.pth.tar") for name in ("on", "ours"))
    assert same(on["state_dict"], ours["state_dict"])


def test_seeds_are_repeated_with_their_spread(weights, images, tmp_path):
    words = ["--epochs", 2, "--seeds", 3, *CACHED]
    record = run(weights, images, tmp_path / "a", *words)
    assert len(record["per_seed"]) == 3
    assert set(record["spread"]) == {"linear/top1", "linear/top5"}
    heads = [
        load(tmp_path / f"a/seed_{i}/checkpoint.pth.tar")["moco_transfer"]["fc"] for i in (0, 1)
    ]
    assert not torch.equal(heads[0]["weight"], heads[1]["weight"])
    assert run(weights, images, tmp_path / "b", *words)["per_seed"] == record["per_seed"]
    alone = run(weights, images, tmp_path / "c", "--epochs", 2, "--seed", 1, *CACHED)
    assert alone["per_seed"] == record["per_seed"][1:2]
    assert alone["fingerprint"] == record["fingerprint"]


def test_random_init_is_drawn_anew_for_each_seed(images, tmp_path):
    words = ["-a", "resnet18", "--epochs", 1, "--seeds", 2, *CACHED]
    run("random", images, tmp_path / "out", *words)
    states = [load(tmp_path / f"out/seed_{i}/checkpoint.pth.tar")["state_dict"] for i in (0, 1)]
    assert not torch.equal(states[0]["conv1.weight"], states[1]["conv1.weight"])


def test_a_finished_folder_is_printed_again_only_with_resume(weights, images, tmp_path, capsys):
    out = tmp_path / "out"
    run(weights, images, out, "--epochs", 1, *CACHED)
    printed = capsys.readouterr().out
    with pytest.raises(UserError, match=r"already holds a result .*--resume, or .*--output-dir"):
        run(weights, images, out, "--epochs", 1, *CACHED)
    record = (out / "results.json").read_bytes()
    run(weights, images, out, "--epochs", 1, "--resume", *CACHED)
    assert capsys.readouterr().out == printed
    assert (out / "results.json").read_bytes() == record
    with pytest.raises(UserError, match=r"another run: found lr 0\.05; want lr 0\.5"):
        run(weights, images, out, "--epochs", 1, "--resume", "--lr", "0.5", *CACHED)
    other = write_resnet18(tmp_path / "other.pth", seed=1)
    with pytest.raises(UserError, match="another run: found checkpoint"):
        run(other, images, out, "--epochs", 1, "--resume", *CACHED)


def test_a_file_of_another_run_is_not_gone_on_with(weights, images, tmp_path):
    run(weights, images, tmp_path / "a", "--epochs", 2, *CACHED)
    path = tmp_path / "a/checkpoint.pth.tar"

    def resume(*words, source=weights):
        run(source, images, tmp_path / "b", "--resume", path, *words, *CACHED)

    with pytest.raises(UserError, match=r"another run: found momentum 0\.9; want momentum 0\.5"):
        resume("--momentum", "0.5")
    with pytest.raises(UserError, match=r"its backbone is not that of other\.pth"):
        resume(source=write_resnet18(tmp_path / "other.pth", seed=1))
    with pytest.raises(UserError, match="is of one seed"):
        resume("--seeds", "2")
    with pytest.raises(UserError, match="has 2 epochs, more than 1"):
        resume("--epochs", "1")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be read; it is cut short"):
        resume()


@pytest.mark.long
def test_the_references_flags_work_as_typed(weights, images, tmp_path, script):
    done = script(
        "transfer/main_lincls.py",
        *f"-a resnet18 --lr 30.0 --batch-size 256 -j 1 --epochs 2 --start-epoch 1 --schedule 60 80 "
        f"--momentum 0.9 --wd 0. -p 10 --seed 1 --pretrained {weights} {images}".split(),
        *["image_size", "32"],
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "output: output/linear/defaults/resnet18" in lines
    assert lines[-1].startswith("linear/top1 ")
    record = json.loads((tmp_path / "output/linear/defaults/resnet18/results.json").read_text())
    protocol = record["protocol"]
    values = [protocol[k] for k in ("lr", "batch_size", "epochs", "schedule", "weight_decay")]
    assert values == [30.0, 256, 2, [60, 80], 0.0]


def test_a_rate_too_high_for_the_features_is_said(weights, images, tmp_path, capsys):
    words = [str(images), "--pretrained", str(weights), "--output-dir", str(tmp_path / "out")]
    assert main_lincls.main([*words, "--epochs", "2", "--lr", "3000", *CACHED]) == 0
    assert "far above chance, log(3) = 1.10: lr 3000 is too high" in capsys.readouterr().out
    words[-1] = str(tmp_path / "good")
    assert main_lincls.main([*words, "--epochs", "2", "--lr", "0.01", *CACHED]) == 0
    assert "above chance" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "--pretrained is missing"),
        (["--pretrained", "gone.pth"], "checkpoint gone.pth: no such file"),
        (["--pretrained", "text.pth"], "checkpoint text.pth: cannot be read"),
        (["--pretrained", "W", "--world-size", "2"], "--rank -1: want 0 to 1"),
        (["--pretrained", "W", "--branch", "key"], "has no branch 'key'"),
        (["--pretrained", "W", "--pixels", "purple"], "purple"),
        (["--pretrained", "W", "stage", "output"], "feature 'output': found no head"),
        (["--pretrained", "random", "--branch", "key"], "are of a checkpoint, not of random"),
        (["--pretrained", "part.pth"], "1 of 120 tensors of resnet18 are missing"),
        (["--pretrained", "other.pth"], "holds no ResNet backbone that is known here"),
        (["--pretrained", "W", "--also-test", "gone"], "--also-test gone: no such folder"),
        (["--pretrained", "W", "epoch", "1"], "unknown key 'epoch'"),
        (["--pretrained", "W", "--epochs", "many"], "argument --epochs: invalid int value"),
        (["--pretrained", "W", "-a", "resnet50"], "holds a resnet18, --arch wants resnet50"),
        (["--pretrained", "W", "--gpu", "9"], "--device cuda:9"),
        (["--pretrained", "W", "--output-dir", "text.pth"], "output folder text.pth: cannot"),
        (["--pretrained", "W", "--resume", "gone.pth.tar"], "--resume gone.pth.tar: no such file"),
        (["--pretrained", "W", "--resume", "W"], "has no epoch, state_dict, best_acc1, optimizer"),
        (
            ["--pretrained", "W", "--start-epoch", "100"],
            "start_epoch is 100 of 100 epochs: nothing",
        ),
        (["--pretrained", "W", "grid_lr", "1,inf"], "grid_lr holds inf, want numbers above 0"),
        (["--pretrained", "W", "-e"], "--evaluate needs the trained classifier"),
        (["--pretrained", "W", "-e", "--resume"], "checkpoint.pth.tar: no such file"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    weights, images, tmp_path, monkeypatch, words, line
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("not a checkpoint")
    state = load(weights)
    state.pop("layer4.1.bn2.bias")
    torch.save(state, tmp_path / "part.pth")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    written = {tmp_path / f"{name}.pth" for name in ("text", "part", "other")}
    words = [str(weights) if word == "W" else word for word in words]
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        main_lincls.main([str(images), *words, "image_size", "32"])
    assert "\n" not in str(caught.value)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == written


def test_sets_that_cannot_be_judged_on_are_refused_in_one_line(weights, tmp_path):
    sets = {
        name: write_images(tmp_path / name, train=1, val=1) for name in ("one", "empty", "test")
    }
    for part in ("train", "val"):
        for colour in ("green", "red"):
            (sets["one"] / part / colour / "0.png").unlink()
            (sets["one"] / part / colour).rmdir()
    (sets["empty"] / "train/red/0.png").unlink()
    (sets["test"] / "val/red/0.png").write_bytes(b"no image")
    for name, line in (
        ("one", "has one class, 'blue'; want two or more"),
        ("empty", "class folder 'red' holds no image"),
        ("test", "val/red/0.png: cannot be decoded"),
    ):
        with pytest.raises(UserError, match=line) as caught:
            run(weights, sets[name], tmp_path / f"{name}_out", "--epochs", 1, *CACHED)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / f"{name}_out/results.json").exists()


def test_a_classifier_that_ran_away_in_its_only_step_is_no_number(weights, images, tmp_path):
    words = ["--epochs", 1, "-b", 24, "--lr", "1e38", "--momentum", "0.9"]
    with pytest.raises(UserError, match="linear: the classifier answers with no numbers; lower lr"):
        run(weights, images, tmp_path / "out", *words, *AUGMENTED, "--weight-decay", "1e5")
    assert not (tmp_path / "out/results.json").exists()


def test_the_references_command_line_runs_with_only_the_scripts_path_changed(
    moco_v2_file, tmp_path, script
):
    images = write_images(tmp_path / "imagenet", train=1, val=1)
    typed = (
        f"-a resnet50 --lr 30.0 --batch-size 256 --pretrained {moco_v2_file} --dist-url "
        "tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0 "
    )
    done = script("transfer/main_lincls.py", *typed.split(), images, "--max-steps", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("linear/top1 ")
    (record,) = (tmp_path / "output/linear/defaults").rglob("results.json")
    protocol = json.loads(record.read_text())["protocol"]
    values = [protocol[k] for k in ("lr", "batch_size", "epochs", "schedule", "max_steps")]
    assert values == [30.0, 256, 100, [60, 80], 1]


def test_two_processes_see_each_image_once_and_give_one_process_numbers(weights, tmp_path):
    images = write_images(tmp_path / "set", train=7, val=3)  # 21 and 9: no even shares
    words = ["--epochs", 1, "-j", 0, "--grid"]
    keys = [*AUGMENTED, "grid_lr", "0.01,0.1", "grid_features", "res4"]
    named = ["--pretrained", weights, "--output-dir", tmp_path / "two", *SHORT]
    script = "transfer/main_lincls.py"
    done = on_processes(2, script, images, *named, *words, *keys, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linear/top1") == 1
    run(weights, images, tmp_path / "one", *words, *keys)
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert two["metrics"] == one["metrics"]
    assert two["data"] == one["data"]
    one, two = (load(tmp_path / n / "checkpoint.pth.tar") for n in ("one", "two"))
    torch.testing.assert_close(two["state_dict"]["fc.weight"], one["state_dict"]["fc.weight"])
    grids = [x["moco_transfer"]["grid"]["judged"]["res4"]["weight"] for x in (two, one)]
    torch.testing.assert_close(*grids, rtol=1e-3, atol=1e-4)
    for path in (tmp_path / "one/features").glob("*.npy"):
        found = np.load(tmp_path / "two/features" / path.name)
        np.testing.assert_allclose(found, np.load(path), rtol=1e-3, atol=1e-4)


def test_shifted_sets_are_scored_with_the_same_classifier(weights, images, tmp_path):
    shifted = write_images(tmp_path / "Images-R", train=1, val=5, seed=3) / "val"
    (shifted / "green").rename(tmp_path / "left out")
    folder = shifted.rename(tmp_path / "images-R")
    words = ["--epochs", 5, *CACHED, "feature_cache", tmp_path / "cache"]
    plain = run(weights, images, tmp_path / "out", *words)
    with pytest.raises(UserError, match="not scored on images-r; score its classifier there with"):
        run(weights, images, tmp_path / "out", "--resume", "--also-test", folder, *words)
    run(weights, images, tmp_path / "out", "--resume", "-e", "--also-test", folder, *words)
    record = json.loads((tmp_path / "out/evaluate/results.json").read_text())
    assert record["metrics"]["linear/top1"] == plain["metrics"]["linear/top1"]
    found = record["metrics"]["linear/images-r/top1"]
    assert record["data"]["also_test"]["images-r"]["images"] == 10
    assert record["data"]["also_test"]["images-r"]["classes"] == 2
    network = torchvision.models.resnet18(num_classes=3)
    network.load_state_dict(load(tmp_path / "out/checkpoint.pth.tar")["state_dict"])
    views = Views(
        image_folder(folder), ProbeConfig(image_size=32), load_backbone(weights).facts.pixels
    )
    with torch.no_grad():
        logits = network.eval()(torch.stack([views[0, i][0] for i in range(10)]))
    right = logits[:, [0, 2]].argmax(1) == torch.tensor(views.images.labels)  # blue and red compete
    assert found == pytest.approx(100 * right.float().mean().item())


def test_tensorboard_has_every_epoch(weights, images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(weights, images, tmp_path / "out", "--epochs", 2, "--tensorboard", *CACHED)
    run(weights, images, tmp_path / "out", "--epochs", 3, "--tensorboard", "--resume", *CACHED)
    events = EventAccumulator(str(tmp_path / "out/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("linear/val_top1")] == [1, 2, 3]


def test_help_answers_at_once_with_an_example_and_the_reason_for_lr_30(script):
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = script("transfer/main_lincls.py", "--help")
        seconds.append(time.monotonic() - started)
    assert done.returncode == 0
    assert "python transfer/main_lincls.py --pretrained ckpt.pth IMAGES" in done.stdout
    assert "Why lr 30" in done.stdout
    assert min(seconds) < 1


def test_shipped_recipes_load_and_the_published_one_is_the_default():
    folder = ROOT / "configs/classification"
    published = load_config(LinearConfig, folder / "linear_imagenet.yaml")
    assert published == LinearConfig()
    embedded = load_config(LinearConfig, folder / "linear_embedded.yaml")
    assert (embedded.features, embedded.standardize) == ("cached", True)
    for path in folder.glob("linear_*.yaml"):
        assert set(yaml.safe_load(path.read_text())) <= set(vars(LinearConfig()))
        assert "Command: python transfer/main_lincls.py" in path.read_text()


def test_the_reported_score_is_that_of_the_classifier(weights, images, tmp_path):
    request = linear.Request(str(weights), images, tmp_path / "out", quiet=True, device="cpu")
    config = LinearConfig(features="cached", image_size=32, lr=0.001, epochs=2)
    record = linear.evaluate(config, request)
    content = load(tmp_path / "out/checkpoint.pth.tar")
    fc = torch.nn.Linear(512, 3)
    fc.load_state_dict(content["moco_transfer"]["fc"])
    (val,) = [found for found in saved_features(tmp_path / "out") if len(found.labels) == 12]
    assert score(fc, val)[0] == record["metrics"]["linear/top1"]
