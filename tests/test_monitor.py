import csv
import math
import time

import pytest
import torch

from convert.errors import UserError
from pretrain import monitor
from pretrain.checks import check
from pretrain.loader import on_device
from pretrain.loop import Run, train
from pretrain.monitor import (
    COLUMNS,
    KnnMonitor,
    Log,
    Waiting,
    Watch,
    knn_top1,
    mean_of_last_tenth,
    open_knn,
    read_log,
    verdict,
)
from pretrain.sources import image_folder, open_set
from tests import reference
from tests.small_sets import write_images
from tests.test_main_moco import (  # noqa: F401
    SMALL,
    assert_equal_files,
    pictures,
    read_config,
    small_config,
)


def clusters(count: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.eye(3, 8)
    return centres[labels] + spread * torch.randn(count, 8, generator=draw), labels


@pytest.mark.parametrize(("k", "tau"), [(1, 0.1), (5, 0.07), (20, 0.1), (60, 0.5)])
def test_the_vote_equals_the_slow_one(k, tau):
    bank, bank_labels = clusters(60, 0.8, 0)
    queries, labels = clusters(40, 0.8, 1)
    got = knn_top1(bank, bank_labels, queries, labels, k=k, tau=tau, num_classes=3)
    want = reference.knn_top1(bank, bank_labels, queries, labels, k, tau)
    assert got == pytest.approx(want)
    assert 34 < got < 100


def test_perfect_features_give_100_and_the_features_length_does_not_matter():
    bank, bank_labels = clusters(60, 0.01, 0)
    queries, labels = clusters(40, 0.01, 1)
    scale = torch.rand(40, 1) * 100
    top1 = knn_top1(bank, bank_labels, queries * scale, labels, k=10, num_classes=3)
    assert top1 == 100


def test_a_log_goes_on_after_the_step_that_was_saved(tmp_path):
    log = Log(tmp_path, 0)
    for step in (10, 20, 30):
        log.add(step=step, loss=1 / step)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # cut short by a kill
    Log(tmp_path, 20).add(step=30, loss=0.5)
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [
        (10, 0.1),
        (20, 0.05),
        (30, 0.5),
    ]


def test_the_verdict_holds_the_last_tenth_against_chance():
    lines = [{"step": i, "loss": 9.0} for i in range(18)] + [{"step": 18, "knn_top1": 3.0}]
    lines += [{"step": 19, "loss": 3.0}, {"step": 20, "loss": 4.0}]
    assert mean_of_last_tenth(lines, "loss") == 3.5
    assert "50% under chance, log(K + 1) = 6.93" in verdict(3.5, 1024, 50.0, 32)
    assert "over chance" in verdict(8.0, 1024, 50.0, 32)
    assert "50.0% of queries" in verdict(3.5, 1024, 50.0, 32)
    assert "chance 3.1%" in verdict(3.5, 1024, 50.0, 32)
    assert math.isnan(mean_of_last_tenth([], "loss"))


def read_csv(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_tensorboard(folder, key):
    name = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(name).EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def test_csv_and_tensorboard_say_what_the_json_lines_say_and_are_cut_back_with_them(tmp_path):
    log = Log(tmp_path, 0)
    log.add(step=10, epoch=0.5, loss=2.5, lr=1 / 3)
    log.add(step=20, epoch=1.0, loss=math.nan, verdicts=["one, with a comma", "two"])
    log.add(step=30, epoch=1.5, loss=1.25)
    log.close()
    log = Log(tmp_path, 20)
    log.add(step=30, epoch=1.5, loss=1.5)
    log.close()
    lines = read_log(tmp_path)
    assert lines == [
        {"step": 10, "epoch": 0.5, "loss": 2.5, "lr": 0.333333},
        {"step": 20, "epoch": 1.0, "verdicts": ["one, with a comma", "two"]},
        {"step": 30, "epoch": 1.5, "loss": 1.5},
    ]
    rows = read_csv(tmp_path)
    assert [row["loss"] for row in rows] == ["2.5", "", "1.5"]
    assert rows[1]["verdicts"] == "one, with a comma | two"
    assert tuple(rows[0]) == COLUMNS
    assert read_tensorboard(tmp_path, "loss") == [(10, 2.5), (30, 1.5)]


def test_without_tensorboard_the_other_two_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "find_spec", lambda name: None)
    Log(tmp_path, 0).add(step=1, loss=1.0)
    assert len(read_log(tmp_path)) == len(read_csv(tmp_path)) == 1
    assert not (tmp_path / "tensorboard").exists()


def test_a_run_logs_every_column_but_votes_and_each_is_what_it_is_called(pictures, tmp_path):  # noqa: F811
    config = small_config(pictures, epochs=2, K=48, allow_small_set=True)
    train(config, image_folder(pictures / "train"), tmp_path, quiet=True)
    lines = read_log(tmp_path)
    assert set(COLUMNS) - lines[0].keys() <= {
        "knn_top1",
        "verdicts",
        "leak_same",
        "leak_shuffled",
        "leak_apart",
    }
    assert lines[0].keys() <= set(COLUMNS)
    assert [line["queue_age_steps"] for line in lines] == [1, 2, 3, 3]
    assert [line["queue_random"] for line in lines] == pytest.approx([66.6667, 33.3333, 0, 0])
    assert all(line["chance_loss"] == pytest.approx(math.log(49), abs=1e-4) for line in lines)
    assert all(0 < line["data_wait"] < 100 for line in lines)
    assert all(1 <= line["effective_rank"] <= 16 for line in lines)
    assert all(line["uniformity"] < 0 < line["alignment"] for line in lines)


def test_the_logged_gradient_norm_is_the_length_of_a_plain_step(pictures, tmp_path):  # noqa: F811
    config = small_config(pictures, momentum=0.0, weight_decay=0.0, lr=0.5)
    run = Run(config, image_folder(pictures / "train"), tmp_path, None)
    before = [p.clone() for p in run.model.encoder_q.parameters()]
    values = run.take_step(on_device(next(run.batches()), run.device, config.image_size))
    moved = zip(before, run.model.encoder_q.parameters(), strict=True)
    length = torch.stack([(b - p).detach().norm() for b, p in moved]).norm() / 0.5
    assert values[3] == pytest.approx(float(length), rel=1e-4)


@pytest.mark.parametrize("dictionary", ["bank", "end-to-end", "simclr"])
def test_each_method_logs_its_spread(dictionary, pictures, tmp_path):  # noqa: F811
    config = small_config(pictures, dictionary=dictionary, epochs=1)
    train(config, image_folder(pictures / "train"), tmp_path, quiet=True)
    for line in read_log(tmp_path):
        assert 1 <= line["effective_rank"] <= 16
        assert 0 < line["alignment"] < 4
        assert ("queue_age_steps" in line) == (dictionary == "bank")
    if dictionary == "bank":  # 40 entries, 16 a step
        assert [line["queue_random"] for line in read_log(tmp_path)] == pytest.approx([60, 20])


def test_waiting_counts_the_time_of_the_items_and_not_of_the_work():
    def slow():
        for i in range(2):
            time.sleep(0.05)
            yield i

    items = Waiting(slow())
    started = time.monotonic()
    for _ in items:
        time.sleep(0.1)
    whole = time.monotonic() - started
    assert 0.1 <= items.since_asked() <= whole - 0.2 + 0.02
    assert items.since_asked() == 0


def test_what_a_watch_remembers_survives_a_resume(tmp_path, capsys):
    line = {"chance_loss": 5.0, "batch_top1": 3.0, "queue_random": 0.0, "epoch": 1.0}
    series = [{"step": step, "loss": 5.0, **line} for step in range(1, 6)]
    series += [{"step": step, "loss": 3.0, **line} for step in range(6, 10)]
    (tmp_path / "whole").mkdir()
    watch = Watch(tmp_path / "whole", 0)
    for values in series:
        watch.add(**values)
    watch.log.close()
    (tmp_path / "parts").mkdir()
    for step, values in enumerate(series):
        part = Watch(tmp_path / "parts", step)
        part.add(**values)
        part.log.close()
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")
    said = [words for line in read_log(tmp_path / "whole") for words in line.get("verdicts", [])]
    assert [words.split(",")[0] for words in said] == [
        "chance: the loss has been 5.000 or so since step 1",
        "chance: over after 5 steps (0 epochs): the loss is 3.000",
    ]
    assert capsys.readouterr().out.splitlines() == said * 2


def test_votes_come_when_asked_for_and_change_no_bit_of_the_training(pictures, tmp_path, capsys):  # noqa: F811
    labelled = write_images(tmp_path / "labelled")
    words = [str(pictures), *SMALL, "-j", "0", "--epochs", "3"]
    images, val = open_set(str(pictures))
    files = []
    for extra in ([], ["--knn-dir", str(labelled), "--knn-every", "2"]):
        config = check(read_config([*words, *extra]), len(images))
        folder, knn = tmp_path / str(len(files)), open_knn(config, images, val)
        files.append(train(config, images, folder, knn=knn, quiet=True))
    said = f"kNN every 2 epochs: 24 images of {labelled} vote on 12, k 8, tau 0.1, chance 33.3%"
    assert said in capsys.readouterr().out
    lines = [line for line in read_log(files[1].parent) if "knn_top1" in line]
    assert [line["epoch"] for line in lines] == [0, 2, 3]
    assert lines[0]["knn_top1"] > 34  # random features see colours
    for path in files:
        content = torch.load(path, weights_only=True)
        content["moco_transfer"].pop("config")
        torch.save(content, path)
    assert_equal_files(*files)


def test_a_named_folder_votes_every_epoch_unless_told_otherwise():
    assert read_config(["DIR", "--knn-dir", "LABELLED"]).knn_every == 1
    assert read_config(["DIR", "--knn-dir", "LABELLED", "knn_every", "3"]).knn_every == 3
    assert read_config(["DIR"]).knn_every == 0


def test_a_set_without_labels_to_vote_on_says_so(pictures, capsys):  # noqa: F811
    config = small_config(pictures, knn_every=1)
    assert open_knn(config, image_folder(pictures / "train"), None) is None
    assert "has no val/; name a labelled folder: --knn-dir DIR" in capsys.readouterr().out


SPOILED = {
    "other names": (
        lambda folder: (folder / "val/red").rename(folder / "val/rose"),
        "train/ has 3 classes, val/ 3; only train/ has red; only val/ has rose; want the same",
    ),
    "no val": (lambda folder: (folder / "val").rename(folder / "test"), "has no val/; want "),
    "gone": (lambda folder: folder.rename(folder.with_name("gone")), "found nothing"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_folder_that_cannot_vote_is_refused(how, pictures, tmp_path):  # noqa: F811
    spoil, line = SPOILED[how]
    labelled = write_images(tmp_path / "labelled")
    spoil(labelled)
    config = small_config(pictures, knn_dir=str(labelled), knn_every=1)
    with pytest.raises(UserError, match=line):
        open_knn(config, image_folder(pictures / "train"), None)


def test_a_refused_folder_is_one_line_and_status_2_before_anything_is_written(script, tmp_path):
    (write_images(tmp_path / "labelled") / "val/red").rename(tmp_path / "labelled/val/rose")
    done = script("pretrain/main_moco.py", "--knn-dir", "labelled", "--device", "cpu")
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("embedded set: ")]
    assert len(lines) == 1
    assert lines[0].startswith("main_moco.py: kNN folder labelled: train/ has 3 classes")
    assert not (tmp_path / "output").exists()


def test_the_neighbours_are_at_most_those_of_a_class(tmp_path):
    images = image_folder(write_images(tmp_path) / "train")
    assert KnnMonitor(images, images, 32).k == 8
