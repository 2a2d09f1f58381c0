import contextlib
import copy
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convert.backbone import load_backbone
from convert.errors import UserError
from pretrain.checkpoint import claim, find_resume
from pretrain.checks import check
from pretrain.config import PretrainConfig
from pretrain.flags import read_command
from pretrain.loop import Run, init_from, train
from pretrain.moco import MoCo
from pretrain.monitor import KnnMonitor, read_log
from pretrain.schedule import learning_rate
from pretrain.sources import image_folder
from tests.conftest import ROOT

SMALL = ["--arch", "resnet18", "-b", "16", "--moco-k", "32", "--epochs", "2", "-j", "1"]
SMALL += ["--device", "cpu", "--precision", "fp32", "image_size", "32"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Forty small images of two classes, train/ and val/."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for label in "ab":
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
    return folder


def read_config(words):
    return read_command(words).config


def go_on(config, images, folder):
    """Train from the folder's newest checkpoint."""
    return train(config, images, folder, resume=find_resume("auto", folder), quiet=True)


def small_config(pictures, **changes):
    config = replace(read_config([str(pictures), *SMALL]), print_freq=1, workers=0, **changes)
    return check(config, 40)


def tensors(value, place=""):
    """Every tensor and number in a checkpoint, by its place."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in tensors(value[key], f"{place}/{key}").items()}
    if isinstance(value, list):
        return {
            k: v for i, one in enumerate(value) for k, v in tensors(one, f"{place}/{i}").items()
        }
    return {place: value}


def assert_equal_files(first, second):
    one, two = (tensors(torch.load(path, weights_only=True)) for path in (first, second))
    assert one.keys() == two.keys()
    for place, value in one.items():
        same = torch.equal(value, two[place]) if torch.is_tensor(value) else value == two[place]
        assert same, place


def test_a_checkpoint_has_the_references_layout(pictures, tmp_path):
    config = small_config(pictures, mlp=True, keep=0)
    path = train(config, image_folder(pictures / "train"), tmp_path, quiet=True)
    assert path.name == "checkpoint_0001.pth.tar"
    assert (tmp_path / "checkpoint_0000.pth.tar").exists()
    content = torch.load(path, weights_only=True)
    assert (content["epoch"], content["arch"]) == (2, "resnet18")
    names = list(content["state_dict"])
    assert names[:3] == ["module.queue", "module.queue_ptr", "module.encoder_q.conv1.weight"]
    assert content["state_dict"]["module.queue"].shape == (128, 32)
    assert int(content["state_dict"]["module.queue_ptr"]) == 4 * 16 % 32
    assert {"state", "param_groups"} <= content["optimizer"].keys()
    # The reference's optimizer counts both encoders' parameters; f_q's come first.
    trained = len(content["optimizer"]["state"])
    assert len(content["optimizer"]["param_groups"][0]["params"]) == 2 * trained
    assert load_backbone(path).facts.method == "MoCo v1 + MLP"


def test_log_record_and_checkpoint_agree(pictures, tmp_path):
    config = small_config(pictures, epochs=3, keep=1)
    train(config, image_folder(pictures / "train"), tmp_path, quiet=True)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert all(line["images_per_s"] > 0 and line["lr"] == 0.03 for line in lines)
    assert len(list(tmp_path.glob("checkpoint_*"))) == 1
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["checkpoint"] == "checkpoint_0002.pth.tar"
    assert record["loss_last_tenth"] == lines[-1]["loss"]
    assert record["chance_loss"] == pytest.approx(np.log(33))


def test_resume_equals_not_stopping(pictures, tmp_path):
    images = image_folder(pictures / "train")
    config = small_config(pictures, epochs=3)
    whole = train(config, images, tmp_path / "whole", quiet=True)
    for steps in (1, 3, 4, 0):  # in the middle of an epoch too; 0: to the end
        part = replace(config, max_steps=steps)
        last = go_on(part, images, tmp_path / "parts")
    assert whole.name == last.name
    stored = torch.load(whole, weights_only=True)["moco_transfer"]
    assert stored["step"] == 6
    for path in (whole, last):  # the only thing that may differ is where it was meant to stop
        content = torch.load(path, weights_only=True)
        content["moco_transfer"].pop("config")
        torch.save(content, path)
    assert_equal_files(whole, last)
    logs = [[line.get("loss") for line in read_log(tmp_path / run)] for run in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_workers_change_nothing(pictures, tmp_path):
    images = image_folder(pictures / "train")
    config = small_config(pictures, epochs=1)
    for workers in (0, 2):
        train(replace(config, workers=workers), images, tmp_path / str(workers), quiet=True)
    logs = [[line["loss"] for line in read_log(tmp_path / str(w))] for w in (0, 2)]
    assert logs[0] == logs[1]


def test_a_changed_config_is_not_resumed(pictures, tmp_path):
    images = image_folder(pictures / "train")
    config = small_config(pictures)
    train(replace(config, max_steps=1), images, tmp_path, quiet=True)
    with pytest.raises(UserError, match=r"another config: tau 0.07 -> 0.2, lr|tau 0.07 -> 0.2"):
        go_on(replace(config, tau=0.2), images, tmp_path)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(pictures, tmp_path):
    images = image_folder(pictures / "train")
    config = small_config(pictures, epochs=4)
    train(replace(config, max_steps=2), images, tmp_path, quiet=True)
    before = sorted(tmp_path.glob("checkpoint_*"))
    path = before[-1]
    content = torch.load(path, weights_only=True)
    content["state_dict"]["module.encoder_q.fc.bias"][0] = float("nan")
    torch.save(content, path)
    with pytest.raises(UserError, match=r"loss is not finite at step 3 \(learning rate 0.03\)"):
        go_on(config, images, tmp_path)
    assert sorted(tmp_path.glob("checkpoint_*")) == before


def test_weights_that_are_not_finite_are_not_saved(pictures, tmp_path, monkeypatch):
    images = image_folder(pictures / "train")
    config = small_config(pictures, keep=1)
    train(replace(config, max_steps=1), images, tmp_path, quiet=True)
    (before,) = tmp_path.glob("checkpoint_*")
    take_step = Run.take_step

    def overflow(run, views):
        loss = take_step(run, views)
        with torch.no_grad():
            run.model.encoder_q.conv1.weight[0, 0, 0, 0] = float("inf")
        return loss

    monkeypatch.setattr(Run, "take_step", overflow)
    content = before.read_bytes()
    with pytest.raises(UserError, match="weights are not finite after step 2, though the loss"):
        go_on(replace(config, max_steps=2), images, tmp_path)
    assert before.read_bytes() == content
    line = "not finite: a weight after step 2 is no number; lower --lr, and resume"
    assert read_log(tmp_path)[-1]["verdicts"] == [line]


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(pictures, tmp_path):
    images = image_folder(pictures / "train")
    config = small_config(pictures, keep=1)
    train(replace(config, max_steps=1), images, tmp_path, quiet=True)
    (before,) = tmp_path.glob("checkpoint_*")
    content = before.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"tar: File too large; nothing was") as found:
            go_on(replace(config, max_steps=2), images, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(found.value)
    assert before.read_bytes() == content
    left = {path.name for path in tmp_path.iterdir()}
    assert {name for name in left if "checkpoint" in name} == {before.name}


def test_more_workers_than_the_system_allows_are_said(pictures, tmp_path):
    command = [sys.executable, str(ROOT / "pretrain/main_moco.py"), str(pictures), *SMALL]
    done = subprocess.run(
        [*command, "-j", "60"], cwd=tmp_path, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60)),
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = (ln for ln in done.stderr.splitlines() if ln.startswith("main_moco.py: "))
    assert line.endswith("60 workers are more than this machine holds; lower --workers")


def test_a_set_that_has_changed_is_not_gone_on_with(pictures, tmp_path):
    images = image_folder(pictures / "train")
    config = small_config(pictures)
    train(replace(config, max_steps=1), images, tmp_path, quiet=True)
    fewer = replace(images, paths=images.paths[:-1], labels=images.labels[:-1])
    with pytest.raises(UserError, match="started on 40 images, the set has 39 now"):
        go_on(config, fewer, tmp_path)


def test_a_record_that_was_lost_with_its_process_is_written_by_the_resume(pictures, tmp_path):
    images = image_folder(pictures / "train")
    config = small_config(pictures, max_steps=1)
    train(config, images, tmp_path, quiet=True)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["K"], record["negatives"]) == (32, 32)
    (tmp_path / "run.json").unlink()
    go_on(config, images, tmp_path)
    again = json.loads((tmp_path / "run.json").read_text())
    assert record == again | {"seconds": pytest.approx(again["seconds"], abs=0.1)}


def test_the_record_of_a_method_without_a_dictionary_has_its_negatives_and_no_k(pictures, tmp_path):
    config = small_config(pictures, max_steps=1, dictionary="end-to-end")
    train(config, image_folder(pictures / "train"), tmp_path, quiet=True)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["negatives"] == 15
    assert "K" not in record
    assert record["chance_loss"] == pytest.approx(np.log(16))


def test_a_run_taken_up_earlier_keeps_what_it_writes(pictures, tmp_path):
    images = image_folder(pictures / "train")
    config = small_config(pictures, epochs=4, keep=0)
    train(config, images, tmp_path, quiet=True)
    first = tmp_path / "checkpoint_0000.pth.tar"
    path = train(replace(config, keep=1, max_steps=4), images, tmp_path, resume=first, quiet=True)
    assert path == tmp_path / "checkpoint_0001.pth.tar"
    assert [p.name[11:15] for p in sorted(tmp_path.glob("checkpoint_*"))] == [
        "0001",
        "0002",
        "0003",
    ]


def test_a_refused_config_leaves_the_folder_as_it_is_and_a_taken_one_tidies_it(pictures, tmp_path):
    config = small_config(pictures, max_steps=1)
    claim(tmp_path, config, resume=None, asked=False)
    path = train(config, image_folder(pictures / "train"), tmp_path, quiet=True)
    before = (tmp_path / "config.json").read_bytes()
    half = tmp_path / ".checkpoint_0001.pth.tar.x1"
    half.write_bytes(b"of a run that was killed while it wrote")
    with pytest.raises(UserError, match=r"another config: tau 0.07 -> 0.2; take it back"):
        claim(tmp_path, replace(config, tau=0.2), resume=path, asked=True)
    assert (tmp_path / "config.json").read_bytes() == before
    assert half.exists()
    claim(tmp_path, config, resume=path, asked=True)
    assert not half.exists()
    assert path.exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda c: c.pop("state_dict"), "is not as this run would have written it"),
        (lambda c: c.pop("optimizer"), "is not as this run would have written it"),
        (lambda c: c["state_dict"].pop("module.queue"), "is not as this run would have written it"),
        (lambda c: c.update(moco_transfer=[1]), "holds weights, and not the state of a run"),
        (lambda c: c["moco_transfer"].update(config="{"), "holds weights, and not the state"),
        (lambda c: c["moco_transfer"].update(config="[1]"), "holds weights, and not the state"),
    ],
)
def test_a_file_that_is_no_run_of_ours_is_not_gone_on_with(one_step, tmp_path, change, line):
    config, images, content = one_step
    content = copy.deepcopy(content)
    change(content)
    torch.save(content, tmp_path / "checkpoint_0000.pth.tar")
    with pytest.raises(UserError, match=line) as found:
        go_on(config, images, tmp_path)
    assert "\n" not in str(found.value)


@pytest.fixture(scope="module")
def one_step(pictures, tmp_path_factory):
    """A run of one step: its config, its images, and what its checkpoint holds."""
    images = image_folder(pictures / "train")
    config = small_config(pictures, max_steps=1)
    path = train(config, images, tmp_path_factory.mktemp("one"), quiet=True)
    return replace(config, max_steps=2), images, torch.load(path, weights_only=True)


def test_the_schedules_are_the_references():
    def rates(config, epochs):
        return [learning_rate(config, round(epoch * 100), 100) for epoch in epochs]

    step = rates(PretrainConfig(), (0, 119.99, 120, 159.99, 160, 199))
    assert step == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
    cos = rates(PretrainConfig(schedule="cos"), (0, 100.5, 199.5))
    last = 0.03 * 0.5 * (1 + np.cos(np.pi * 199 / 200))
    assert cos == pytest.approx([0.03, 0.015, last])
    assert rates(PretrainConfig(warmup_epochs=5), (2.5,)) == pytest.approx([0.015])
    assert rates(PretrainConfig(warmup_iterations=200), (1, 2)) == pytest.approx([0.015, 0.03])


def test_a_cosine_from_1_ends_at_0_as_the_cifar_notebooks():
    config = PretrainConfig(schedule="cos", cosine_start=1, lr=0.06)
    assert learning_rate(config, 0, 10) == pytest.approx(0.059996, abs=1e-6)
    assert learning_rate(config, 1999, 10) == 0


def test_schedules_count_iterations_where_asked():
    instagram = PretrainConfig(
        schedule="decay", schedule_unit="iterations", gamma=0.9, decay_every=62500, lr=0.12,
        iterations=1_250_000,
    )  # fmt: skip
    rates = [learning_rate(instagram, step, 7) for step in (0, 62499, 62500, 1_249_999)]
    assert rates == pytest.approx([0.12, 0.12, 0.108, 0.12 * 0.9**19])
    steps = PretrainConfig(schedule_unit="iterations", milestones=(3, 5), gamma=0.5, lr=1.0)
    assert [learning_rate(steps, step, 7) for step in (2, 3, 5)] == [1, 0.5, 0.25]
    cos = PretrainConfig(schedule="cos", iterations=100, lr=1.0)  # 10 epochs of 10 steps
    assert [learning_rate(cos, step, 10) for step in (0, 59)] == pytest.approx([1, 0.5])
    assert 0 < learning_rate(cos, 99, 10) < 0.03
    cos = PretrainConfig(schedule="cos", schedule_unit="iterations", iterations=100, lr=1.0)
    assert learning_rate(cos, 50, 7) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"m": 1.5}, "out of range: m 1.5"),
        ({"tau": 0.0}, "out of range: tau 0.0"),
        ({"K": 8}, "K 8: is below the batch of 16"),
        ({"K": 40}, "the set has 40 images"),
        ({"batch_size": 64, "K": 64}, "the set has 40 images; lower --batch-size"),
        ({"batch_size": 8}, "--leak"),
        ({"bn_groups": 3}, "batch of 16 on 1 process in 3 batch norm groups"),
        ({"bn_groups": 17}, "batch of 16: is below its 17 batch norm groups"),
        ({"momentum": -0.1}, "out of range: momentum -0.1"),
        ({"stem": "vit"}, "stem is 'vit', want one of imagenet, cifar"),
        ({"optimizer": "adam"}, "optimizer is 'adam', want one of sgd, lars"),
        ({"schedule": "decay"}, "out of range: decay_every 0"),
        ({"start_epoch": 200}, "out of range: start_epoch 200"),
        ({"start_epoch": 2, "max_steps": 4}, "at step 4, and the run ends after 4"),
        ({"start_epoch": 2, "iterations": 3}, "at step 4, and the run ends after 3"),
        ({"lr": float("nan")}, "out of range: lr nan"),
        ({"lr": float("inf")}, "out of range: lr inf"),
        ({"tau": float("inf")}, "out of range: tau inf"),
        ({"dim": 10**30}, "out of range: dim 1000"),
        ({"seed": -1}, "out of range: seed -1"),
        ({"seed": 2**70}, "out of range: seed 1180"),
        ({"knn_every": -1, "workers": -2}, "out of range: workers -2, knn_every -1"),
        ({"milestones": (-1,)}, "out of range: milestones (-1,)"),
        ({"warmup_epochs": 1.0, "warmup_iterations": 5}, "out of range: warmup_iterations 5"),
        ({"batch_size": 4, "bn_groups": 4, "image_size": 32}, "one image of 32 pixels ends in a"),
        ({"batch_size": 1, "dictionary": "simclr"}, "batch of 1: SimCLR holds a batch against"),
        ({"batch_size": 1, "dictionary": "end-to-end"}, "batch of 1: end-to-end holds a batch"),
        ({"augmentation": "v7"}, "want one of v1, v2, cifar, simclr"),
        ({"schedule": "linear"}, "want one of step, cos, decay"),
        ({"precision": "fp8"}, "want one of fp32, bf16"),
        ({"device": "tpu"}, "want one of cpu, cuda"),
        ({"checkpoint_every": "often"}, "checkpoint_every 'often'"),
    ],
)
def test_values_out_of_range_are_refused(changes, line):
    config = replace(PretrainConfig(batch_size=16, K=32, device="cpu"), **changes)
    with pytest.raises(UserError, match=re.escape(line)):
        check(config, 40)


def test_an_arch_that_is_no_resnet_is_refused(pictures):
    with pytest.raises(UserError, match="arch 'vgg16': is not a ResNet"):
        small_config(pictures, arch="vgg16")


def test_the_references_flags_mean_what_they_meant():
    line = "-a resnet50 --lr 0.03 -b 256 --mlp --moco-t 0.2 --aug-plus --cos -j 32 -p 10 --seed 1"
    config = read_config([*line.split(), "IMAGENET"])
    want = PretrainConfig(
        data="IMAGENET", mlp=True, tau=0.2, augmentation="v2", schedule="cos", workers=32, seed=1
    )
    assert config == want
    line = (
        "IMAGENET --moco-dim 64 --moco-k 4096 --moco-m 0.9 --schedule 30 40 --wd 0 --momentum 0.8"
    )
    config = read_config(line.split())
    assert (config.dim, config.K, config.m) == (64, 4096, 0.9)
    assert (config.milestones, config.weight_decay, config.momentum) == ((30, 40), 0, 0.8)


def test_trailing_words_mix_with_flags():
    assert read_config(["DIR", "--mlp", "tau", "0.3"]).tau == 0.3
    command = read_command(["--resume", "tau", "0.3"])
    assert command.config.tau == 0.3
    assert (command.name, command.resume) == ("moco_v2_r50_embedded", "auto")
    recipe = str(ROOT / "configs/pretrain/moco_v2_r50_embedded.yaml")
    assert read_config(["--config", recipe, "epochs", "1"]).epochs == 1


def test_a_folder_and_no_flags_is_v1_and_the_first_lines_say_so(script, pictures):
    done = script("pretrain/main_moco.py", pictures, *SMALL, "--max-steps", "1")
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first == f"MoCo v1, resnet18, on {pictures}/train (40 images)"
    assert second.endswith("python pretrain/main_moco.py DIR --mlp --moco-t 0.2 --aug-plus --cos")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["gone"], "found nothing, want a folder with train/"),
        (["--lr", "fast"], "lr is 'fast', want float"),
        (["--moco-z", "1"], "unrecognized arguments: --moco-z"),
        (["epoch", "3"], "unknown key 'epoch'; known keys near it: epochs"),
        (["--resume", "gone.pth.tar"], "gone.pth.tar: no such file"),
        (["--init-from", "gone.pth.tar", *SMALL], "checkpoint gone.pth.tar: no such file"),
        (["--init-from", ""], "--init-from: names no file"),
        (["--resume="], "--resume: names no file"),
        (["--dist-timeout", "nan"], "--dist-timeout nan: want seconds above 0"),
        ([*SMALL, "dim", "1e15"], "memory ran out"),
        (["--output-dir", "/proc/none"], "output folder /proc/none: cannot be written"),
        (["--config", "gone.yaml"], "recipe gone.yaml: cannot be read"),
    ],
)
def test_each_mistake_ends_in_one_line_and_status_2(script, tmp_path, words, line):
    done = script("pretrain/main_moco.py", *words)
    assert done.returncode == 2, done.stderr
    assert line in done.stderr
    said = [x for x in done.stderr.splitlines() if not x.startswith("embedded set: building")]
    assert len(said) == 1
    assert said[0].startswith("main_moco.py: ")
    assert not list(tmp_path.rglob("checkpoint_*"))


def test_a_broken_image_is_skipped_counted_and_listed_and_too_many_are_refused(script, tmp_path):
    folder = tmp_path / "set/train/a"
    folder.mkdir(parents=True)
    for i in range(40):
        Image.new("RGB", (40, 40)).save(folder / f"{i}.png")
    (folder / "7.png").write_text("no image")
    words = ["set", *SMALL, "-j", "1", "--max-steps", "1", "--output-dir", "out"]
    done = script("pretrain/main_moco.py", *words)
    assert done.returncode == 0, done.stderr
    assert "(39 images)" in done.stdout.splitlines()[0]
    assert "skipped 1 files that cannot be used: out/skipped.txt" in done.stdout
    assert (tmp_path / "out/skipped.txt").read_text() == "set/train/a/7.png\tis no image\n"
    for i in range(3):
        (folder / f"new{i}.png").write_text("no image")
    done = script("pretrain/main_moco.py", *words, "--output-dir", "other")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("main_moco.py: images set/train: 4 of 43 cannot be used, 9.3%")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_all_saves_and_leaves_with_its_status(pictures, tmp_path, signum):
    command = [sys.executable, str(ROOT / "pretrain/main_moco.py"), str(pictures), *SMALL]
    command += ["--epochs", "500", "--output-dir", "out", "-p", "1", "--checkpoint-every", "1000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    log = tmp_path / "out/log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 3)
    os.killpg(process.pid, signum)  # the workers that load images too, as a scheduler does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, errors
    assert "Traceback" not in errors
    (path,) = tmp_path.glob("out/checkpoint_*.pth.tar")
    step = torch.load(path, weights_only=True)["moco_transfer"]["step"]
    assert step == read_log(tmp_path / "out")[-1]["step"] >= 3


def children(parent):
    """The processes below one, by their ids."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(path.name))
    return found


def test_where_nothing_can_be_compiled_the_run_says_so_and_goes_on(pictures, tmp_path):
    command = [sys.executable, str(ROOT / "pretrain/main_moco.py"), str(pictures), *SMALL]
    done = subprocess.run(
        [*command, "--compile", "--max-steps", "1", "--output-dir", "out"], cwd=tmp_path,
        env=os.environ | {"CXX": str(tmp_path / "g++")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "compile: not possible here" in done.stdout
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["config"]["compile"] is False


def test_a_loading_worker_that_was_killed_is_reported_with_its_cause(pictures, tmp_path):
    command = [sys.executable, str(ROOT / "pretrain/main_moco.py"), str(pictures), *SMALL]
    process = subprocess.Popen(
        [*command, "--epochs", "500", "-p", "1", "--output-dir", "out"], cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: len(read_log(tmp_path / "out")) >= 1)
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    last = errors.splitlines()[-1]
    assert last.startswith("main_moco.py: a process that loads images ended: DataLoader worker")
    # With its signal, unless its end was seen before the system told of it.
    assert "killed by signal: Killed" in last or "exited unexpectedly" in last
    assert last.endswith("1 workers are more than this machine holds; lower --workers")
    assert "Traceback" not in errors


def test_weights_of_any_layout_start_both_encoders_and_nothing_else(moco_v2_file):
    config = PretrainConfig(mlp=True, K=64)
    model = MoCo(config, images=100, groups=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = init_from(model, str(moco_v2_file))
    assert said == "initialised from checkpoint_0199.pth.tar: MoCo v2, epoch 200, backbone only"
    wanted = load_backbone(moco_v2_file).weights
    for name, value in model.state_dict().items():
        encoder, _, short = name.partition(".")
        want = wanted[short] if short in wanted else before[name]
        assert torch.equal(value, want), (encoder, short)
    other = MoCo(replace(config, arch="resnet18"), images=100, groups=1)
    with pytest.raises(UserError, match=r"differ: a resnet50, imagenet stem.* and a resnet18"):
        init_from(other, str(moco_v2_file))
    other = MoCo(replace(config, stem="cifar"), images=100, groups=1)
    with pytest.raises(UserError, match=r"imagenet stem.* and a resnet50, cifar stem"):
        init_from(other, str(moco_v2_file))


def test_a_run_starts_from_somebodys_weights_and_its_resume_does_not(pictures, tmp_path, capsys):
    images = image_folder(pictures / "train")
    config = small_config(pictures, max_steps=1)
    source = train(config, images, tmp_path / "source", quiet=True)
    config = replace(config, init_from=str(source), max_steps=1, lr=0.0, seed=1)
    path = train(config, images, tmp_path / "run", quiet=True)
    assert "initialised from checkpoint_0000.pth.tar: MoCo v1, epoch 0" in capsys.readouterr().out
    one, two = (load_backbone(file).weights for file in (source, path))
    assert torch.equal(one["conv1.weight"], two["conv1.weight"])
    source.unlink()
    go_on(replace(config, max_steps=2), images, tmp_path / "run")


def test_a_run_can_begin_at_a_later_epoch(pictures, tmp_path):
    config = small_config(pictures, start_epoch=1, milestones=(1,))
    train(config, image_folder(pictures / "train"), tmp_path, quiet=True)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [3, 4]
    assert lines[0]["lr"] == pytest.approx(0.003)


def test_the_cifar_recipe_trains_votes_and_its_checkpoint_says_its_stem(pictures, tmp_path):
    recipe = str(ROOT / "configs/pretrain/moco_cifar10_r18_200ep.yaml")
    words = "batch_size 16 K 32 bn_groups 2 epochs 1 knn_every 1 workers 0 device cpu"
    config = check(read_config([str(pictures), "--config", recipe, *words.split()]), 40)
    images, val = (image_folder(pictures / split) for split in ("train", "val"))
    knn = KnnMonitor(images, val, 32)
    path = train(config, images, tmp_path, knn=knn, quiet=True)
    assert 0 <= read_log(tmp_path)[-1]["knn_top1"] <= 100
    found = load_backbone(path)
    assert (found.facts.arch, found.facts.stem) == ("resnet18", "cifar")
    assert found.weights["conv1.weight"].shape == (64, 3, 3, 3)


def test_a_changed_batch_scales_the_rate_only_when_asked():
    recipe = str(ROOT / "configs/pretrain/moco_v2_r50_200ep.yaml")
    words = ["DIR", "--config", recipe, "--batch-size", "128"]
    plain, scaled = read_command(words), read_command([*words, "--scale-lr"])
    assert plain.notes == ("batch_size 256 -> 128: lr stays 0.03 (--scale-lr: 0.015)",)
    assert scaled.notes == ("batch_size 256 -> 128: lr 0.03 -> 0.015",)
    assert (plain.config.lr, scaled.config.lr) == (0.03, 0.015)
    assert read_command(["DIR", "--config", recipe]).notes == ()


def test_fewer_than_8_groups_are_said(capsys):
    config = PretrainConfig(batch_size=32, K=32, device="cpu")
    assert check(config, 40).bn_groups == 4
    assert capsys.readouterr().out.startswith("batch norm in 4 groups of 8 images")
    assert check(replace(config, bn_groups=2), 40).bn_groups == 2
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """More images than the reference's queue has keys; a file has as many names as it can."""
    folder = tmp_path_factory.mktemp("imagenet")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for label in "ab":
        first = folder / "train" / label / "0.png"
        first.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(first)
        for i in range(1, 33_000):
            os.link(first, first.with_name(f"{i}.png"))
    return folder


V1 = "-a resnet50 --lr 0.03 --batch-size 256 --dist-url tcp://localhost:10001 "
V1 += "--multiprocessing-distributed --world-size 1 --rank 0"


@pytest.mark.parametrize(
    ("line", "method"), [(V1, "MoCo v1"), (f"{V1} --mlp --moco-t 0.2 --aug-plus --cos", "MoCo v2")]
)
def test_the_references_documented_command_lines_run(script, tmp_path, many, line, method):
    done = script(
        "pretrain/main_moco.py", *line.split(), many, "--max-steps", 1, "--batch-size", 16, "-j", 1
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{method}, resnet50, on {many}/train (66000 images)")
    (path,) = tmp_path.glob("output/pretrain/*/checkpoint_0000.pth.tar")
    state = torch.load(path, weights_only=True, mmap=True)["state_dict"]
    assert state["module.queue"].shape == (128, 65536)
    assert len(state) == {"MoCo v1": 642, "MoCo v2": 646}[method]


def test_a_folder_that_holds_a_run_is_not_overwritten(script, pictures):
    words = [pictures, *SMALL, "--max-steps", "1", "--output-dir", "out"]
    assert script("pretrain/main_moco.py", *words).returncode == 0
    again = script("pretrain/main_moco.py", *words)
    assert again.returncode == 2
    assert "holds a run (checkpoint_0000.pth.tar)" in again.stderr
    done = script("pretrain/main_moco.py", *words, "--resume")
    assert done.returncode == 0
    assert "finished" in done.stdout


def wait_for(true, seconds=90):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_the_scripts_folder_is_not_on_the_path():
    code = "import runpy, sys; sys.argv = ['main_moco.py', '--version']; sys.path[0] = {folder!r}\n"
    code += "try:\n    runpy.run_path({file!r}, run_name='__main__')\nexcept SystemExit:\n"
    code += "    print(sys.path[0])"
    file = ROOT / "pretrain/main_moco.py"
    done = subprocess.run(
        [sys.executable, "-c", code.format(folder=str(file.parent), file=str(file))],
        capture_output=True, text=True, check=True, env=os.environ,
    )  # fmt: skip
    assert Path(done.stdout.splitlines()[-1]) == ROOT
