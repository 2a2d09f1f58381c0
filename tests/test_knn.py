import json
import re
import time

import numpy as np
import pytest
import torch

from convert.errors import UserError
from tests.conftest import ROOT
from tests.small_sets import on_processes, write_images
from transfer import knn

SMALL = ["k", "3,5", "image_size", "32"]


def run(weights, images, out, *words):
    pretrained = ["--pretrained", str(weights), "--output-dir", str(out), "--device", "cpu"]
    status = knn.main([str(images), *pretrained, "--quiet", *SMALL, *words])
    assert status == 0
    return json.loads((out / "results.json").read_text())


def test_a_run_leaves_a_whole_record(weights, images, tmp_path, capsys):
    record = run(weights, images, tmp_path / "out")
    assert record["task"] == "knn"
    assert set(record["metrics"]) == {"knn3/top1", "knn5/top1"}
    assert record["metrics"]["knn3/top1"] > 60  # colours: a random network sees them
    assert record["spread"] == {}
    assert record["recipe"]["name"] == "knn_imagenet"
    assert {"k", "view"} <= set(record["recipe"]["changed"])
    assert record["protocol"]["bank"] == "whole"
    assert record["protocol"]["temperature"] == 0.07
    assert record["checkpoint"]["arch"] == "resnet18"
    assert record["data"]["train"]["images"] == 24
    assert record["data"]["val"]["images"] == 12
    assert capsys.readouterr().out.startswith("knn3/top1 ")


def test_what_cannot_be_judged_is_refused_in_one_line(weights, images, tmp_path):
    one = write_images(tmp_path / "one", train=5, val=2)
    gone = write_images(tmp_path / "gone", train=5, val=2)
    (gone / "val/red/9.png").symlink_to(tmp_path / "nowhere.png")
    for part in ("train", "val"):
        for name in ("green", "red"):
            (one / part / name).rename(tmp_path / f"{part} {name}")
    for folder, words, line in (
        (one, [], "has one class, 'blue'; want two or more to tell apart"),
        (gone, [], r"image .*val/red/9\.png: cannot be read \(No such file"),
        (images, ["--resume", str(weights)], "--resume FILE: name the run by --output-dir"),
    ):
        with pytest.raises(UserError, match=line) as caught:
            run(weights, folder, tmp_path / "out", *words)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_two_processes_see_each_image_once_and_vote_once(weights, tmp_path):
    images = write_images(tmp_path / "set", train=7, val=3)  # 21 and 9: no even shares
    one = run(weights, images, tmp_path / "one", "--seeds", "2")
    words = ["--pretrained", weights, "--output-dir", "two", "--device", "cpu", "--seeds", 2]
    done = on_processes(2, "transfer/knn.py", images, *words, *SMALL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("knn3/top1") == done.stdout.count("output: two") == 1
    two = json.loads((tmp_path / "two/results.json").read_text())
    assert two["per_seed"] == one["per_seed"]
    assert two["data"] == one["data"]


def test_seeds_vote_with_different_banks_and_repeat_exactly(weights, images, tmp_path):
    first = run(weights, images, tmp_path / "a", "--seeds", "4")
    again = run(weights, images, tmp_path / "b", "--seeds", "4")
    other = run(weights, images, tmp_path / "c", "--seeds", "4", "--seed", "50")
    assert first["per_seed"] == again["per_seed"] != other["per_seed"]
    assert len(first["per_seed"]) == 4
    assert max(first["spread"].values()) > 0
    assert "90%" in first["protocol"]["bank"]
    assert first["fingerprint"] == other["fingerprint"]
    assert first["fingerprint"] != run(weights, images, tmp_path / "d")["fingerprint"]


def test_random_init_is_drawn_anew_for_each_seed(images, tmp_path):
    features = tmp_path / "features"
    words = ["-a", "resnet18", "--seeds", "2", "feature_cache", str(features)]
    record = run("random", images, tmp_path / "out", *words)
    assert record["checkpoint"]["method"] == "random init"
    banks = [torch.from_numpy(np.load(path)) for path in features.glob("*.npy")]
    assert len(banks) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(banks) for b in banks[:i])


def test_an_output_folder_in_use_is_refused_and_resume_prints_it_again(
    weights, images, tmp_path, capsys
):
    out = tmp_path / "out"
    run(weights, images, out)
    printed = capsys.readouterr().out
    before = (out / "results.json").read_bytes()
    with pytest.raises(UserError, match=r"already holds a result .* --resume, or .*--output-dir"):
        run(weights, images, out)
    run(weights, images, out, "--resume")
    assert capsys.readouterr().out == printed
    with pytest.raises(
        UserError, match=r"another run: found temperature 0\.07; want temperature 0\.2"
    ):
        run(weights, images, out, "--resume", "temperature", "0.2")
    with pytest.raises(UserError, match="another run: found checkpoint"):
        run("random", images, out, "-a", "resnet18", "--resume")
    assert (out / "results.json").read_bytes() == before


def test_the_default_output_folder_names_task_recipe_and_checkpoint(
    weights, images, tmp_path, script
):
    recipe = tmp_path / "colours.yaml"
    recipe.write_text("k: [2]\nimage_size: 32\n")
    done = script("transfer/knn.py", images, "--pretrained", weights, "--config", recipe)
    assert done.returncode == 0, done.stderr
    assert "output: output/knn/colours/resnet18" in done.stdout
    record = json.loads((tmp_path / "output/knn/colours/resnet18/results.json").read_text())
    assert done.stdout.splitlines()[-1] == f"knn2/top1 {record['metrics']['knn2/top1']:.2f}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "--pretrained is missing"),
        (["--pretrained", "gone.pth"], "checkpoint gone.pth: no such file"),
        (["--pretrained", "text.pth"], "checkpoint text.pth: cannot be read"),
        (["--pretrained", "W", "k", "3,200"], "k 200: the bank holds 24 images; name smaller"),
        (["--pretrained", "W", "k", "24", "--seeds", "2"], "the bank holds 21 images (90% of 24"),
        (["--pretrained", "W", "temprature", "1"], "unknown key 'temprature'"),
        (["--pretrained", "W", "k", "many"], "k is 'many'"),
        (["--pretrained", "W", "one", "word", "more"], "images"),
        (["--pretrained", "W", "--wrong-flag"], "unrecognized arguments: --wrong-flag"),
        (["--pretrained", "W", "--device", "cuda:9"], "--device cuda:9"),
        (["--pretrained", "W", "--output-dir", "text.pth", "k", "3"], "output folder text.pth: "),
        (["--pretrained", "W", "-j", "-1"], "--workers is -1, want at least 0"),
        (["--pretrained", "random", "-a", "alexnet"], "--arch is 'alexnet', want one of resnet18"),
        (["--pretrained", "W", "--config", "gone.yaml"], "recipe gone.yaml: cannot be read"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    weights, images, tmp_path, monkeypatch, words, line
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("not a checkpoint")
    words = [str(weights) if word == "W" else word for word in words]
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        knn.main([str(images), *words])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["text.pth"]


def test_bad_input_as_typed_is_status_2_without_a_traceback(images, script):
    done = script("transfer/knn.py", images, "--pretrained", "gone.pth")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "knn.py: checkpoint gone.pth: no such file\n"


def test_help_answers_at_once_and_shows_an_example(script):
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = script("transfer/knn.py", "--help")
        seconds.append(time.monotonic() - started)
    assert done.returncode == 0
    assert "python transfer/knn.py --pretrained ckpt.pth" in done.stdout
    assert min(seconds) < 1


def test_the_shipped_recipe_runs_on_the_embedded_digits(tmp_path, weights, capsys):
    recipe = ROOT / "configs/classification/knn_embedded.yaml"
    words = ["--config", str(recipe), "--pretrained", str(weights), "--output-dir", str(tmp_path)]
    assert knn.main([*words, "--quiet", "image_size", "32"]) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    assert set(record["metrics"]) == {f"knn{k}/top1" for k in (10, 20, 100, 200)}
    assert record["data"]["name"] == "embedded digits"
