import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from convert.errors import UserError
from convert.progress import Progress
from pretrain.sources import image_folder
from tests.conftest import ROOT
from tests.test_sets import make_dtd
from transfer import main_lincls
from transfer.classification.features import Features
from transfer.classification.grid import (
    Cell,
    Grid,
    Outcome,
    curves,
    edge_note,
    write_grid,
)
from transfer.classification.heads import (
    Batch,
    Head,
    LinearConfig,
    cached_batches,
    score,
    train_head,
)
from transfer.classification.held_out import Part, held_out
from transfer.classification.linear import held_places
from transfer.classification.sets import open_sets

CPU = torch.device("cpu")
WORDS = ["features", "cached", "standardize", "true", "image_size", "32"]
GRID = ["--grid", "grid_lr", "0.001,0.1", "grid_weight_decay", "0,1e-2"]
SOURCES = ["grid_features", "res5,res4-2x2,res3"]
SHORT = ["-b", "10", "--lr", "0.1", "--device", "cpu", "--schedule", "3"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(weights, images, cache, out, *words):
    named = ["--pretrained", str(weights), "--output-dir", str(out), "--quiet"]
    keys = [*WORDS, "feature_cache", str(cache)]
    assert main_lincls.main([str(images), *named, *SHORT, *map(str, words), *keys]) == 0
    return json.loads((out / "results.json").read_text())


def noisy(count=120, classes=5, width=7, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    shifts = noise * torch.randn(count, width, generator=generator)
    return Features(torch.eye(classes, width)[labels] + shifts, labels)


def train(config, sources, held, classes=5, seed=3):
    """Train a fixed head and a grid beside it; the first source is the head's."""
    first = next(iter(sources.values()))
    widths = {source: features.values.shape[1] for source, features in sources.items()}
    grid = Grid(config, widths, classes, seed, CPU, len(first.labels), held)
    head = Head.untrained(config, first.values.shape[1], classes, seed, CPU)
    batches = cached_batches(first, config.batch_size, seed, sources)
    with Progress(1, "linear", quiet=True) as progress:
        train_head(head, batches, first, config, progress, beside=grid.step)
    return head, grid


def train_alone(config, cell, features, learns, classes=5, seed=3):
    """Train one classifier with torch's own layer, loss and optimizer on the rows that it sees."""
    head = Head.untrained(config, features.values.shape[1], classes, seed, CPU)
    optimizer = torch.optim.SGD(
        head.fc.parameters(), cell.lr, config.momentum, weight_decay=cell.weight_decay
    )
    for epoch in range(config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = cell.lr * config.lr_at(epoch) / config.lr
        for batch in cached_batches(features, config.batch_size, seed)(epoch):
            rows = learns[batch.places]
            if rows.any():
                loss = torch.nn.functional.cross_entropy(
                    head.fc(batch.values[rows]), batch.labels[rows]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return head.fc


def test_every_classifier_of_the_grid_equals_one_trained_alone():
    config = LinearConfig(
        epochs=4, schedule=(2, 3), batch_size=32, grid=True,
        grid_lr=(0.05, 0.7, 4.0), grid_weight_decay=(0.0, 0.03), grid_features=("res4", "res5"),
    )  # fmt: skip
    sources = {"res5": noisy(), "res4": noisy(width=11)}
    held = held_out(sources["res5"].labels, 0.2, 0)
    _, grid = train(config, sources, held)
    assert len(grid) == 12
    everything = torch.ones(120, dtype=torch.bool)
    for stacks, learns in ((grid.judged, everything), (grid.choosing, grid.learns)):
        for stack in stacks.values():
            for cell in stack.cells:
                alone = train_alone(config, cell, sources[cell.source], learns)
                found = stack.classifier(cell)
                torch.testing.assert_close(found.weight, alone.weight, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found.bias, alone.bias, rtol=1e-4, atol=1e-5)
    assert not torch.equal(grid.choosing["res5"].weight, grid.judged["res5"].weight)


def test_the_published_settings_in_the_grid_give_the_fixed_protocols_classifier():
    config = LinearConfig(epochs=100, batch_size=32, grid_lr=(1.0, 30.0), grid_weight_decay=(0.0,))
    # Classes that are apart, else lr 30 on a bias is chaos, where a bit of rounding grows.
    small = noisy(noise=0.1)
    held = held_out(small.labels, 0.1, 0)
    head, grid = train(config, {"res5": small}, held)
    fc = grid.classifier(Cell("res5", 30.0, 0.0))
    torch.testing.assert_close(fc.weight, head.fc.weight, rtol=1e-3, atol=1e-3)
    assert score(fc, small) == score(head.fc, small)
    alone = Head.untrained(config, 7, 5, 3, CPU)
    with Progress(1, "linear", quiet=True) as progress:
        train_head(alone, cached_batches(small, 32, 3), small, config, progress)
    assert torch.equal(alone.fc.weight, head.fc.weight)  # a grid beside it moves no bit of it


def test_a_classifier_that_diverges_takes_no_other_with_it_and_is_not_chosen():
    config = LinearConfig(
        epochs=3, batch_size=32, lr=0.1, grid_lr=(0.1, 1e30), grid_weight_decay=(0.0, 1e9)
    )
    features = noisy()
    held = held_out(features.labels, 0.2, 0)
    _, grid = train(config, {"res5": features}, held)
    ranking = grid.ranking({"res5": features.take(held)})
    assert ranking[0].cell == Cell("res5", 0.1, 0.0)
    assert math.isfinite(ranking[0].loss)
    diverged = [outcome for outcome in ranking if not math.isfinite(outcome.loss)]
    assert {o.cell for o in diverged} >= {Cell("res5", 1e30, 1e9), Cell("res5", 0.1, 1e9)}
    assert all(outcome.top1 == 0 for outcome in diverged)
    alone = train_alone(config, ranking[0].cell, features, grid.learns)
    torch.testing.assert_close(
        grid.choosing["res5"].classifier(ranking[0].cell).weight, alone.weight
    )
    config = LinearConfig(epochs=3, lr=0.1, grid_lr=(1e30,), grid_weight_decay=(1e9,))
    _, grid = train(config, {"res5": features}, held)
    with pytest.raises(UserError, match="every classifier diverged; name smaller rates"):
        grid.ranking({"res5": features.take(held)})


def test_outcomes_are_accuracy_and_loss_of_the_copies_for_choosing():
    config = LinearConfig(epochs=2, lr=0.1, batch_size=32, grid_lr=(0.1, 1.0))
    features = noisy()
    held = held_out(features.labels, 0.3, 0)
    _, grid = train(config, {"res5": features}, held)
    mine = features.take(held)
    for outcome in grid.ranking({"res5": mine}):
        fc = grid.choosing["res5"].classifier(outcome.cell)
        assert outcome.top1 == pytest.approx(score(fc, mine)[0])
        loss = torch.nn.functional.cross_entropy(fc(mine.values), mine.labels).item()
        assert outcome.loss == pytest.approx(loss, rel=1e-5)


def test_a_batch_of_held_out_images_alone_moves_only_the_copies_to_be_judged():
    config = LinearConfig(grid_lr=(1.0,), grid_weight_decay=(0.0,))
    grid = Grid(config, {"res5": 7}, 5, 0, CPU, 120, torch.arange(10))
    before = grid.snapshot()
    features = noisy().take(torch.arange(10))
    beside = {"res5": features.values}
    grid.step(Batch(features.values, features.labels, torch.arange(10), beside), 1.0)
    after = grid.snapshot()
    for name in ("weight", "velocity", "bias"):
        kept = [state["choosing"]["res5"][name] for state in (before, after)]
        assert torch.equal(*kept)
        moved = [state["judged"]["res5"][name] for state in (before, after)]
        assert not torch.equal(*moved)


def test_held_out_images_are_of_the_training_set_and_each_class_gives_its_share(images):
    labels = [0] * 40 + [1] * 20 + [2] * 2 + [3] * 7
    held = held_out(labels, 0.1, 5)
    counts = torch.tensor(labels)[held].bincount(minlength=4).tolist()
    assert counts == [4, 2, 1, 1]
    assert torch.equal(held, held_out(labels, 0.1, 5))
    assert not torch.equal(held, held_out(labels, 0.1, 6))
    train, val = image_folder(images / "train"), image_folder(images / "val")
    part = Part.of(train, held_out(train.labels, 0.25, 0))
    assert len(part) == 6
    assert not {*part.paths} & {*val.paths}
    assert {*part.paths} < {*train.paths}
    assert [part.read(i).tobytes() for i in range(6)] == [
        train.read(place).tobytes() for place in part.places
    ]
    assert part.listing_hash() != Part.of(train, held_out(train.labels, 0.25, 1)).listing_hash()


def test_a_set_without_two_images_of_a_class_has_nothing_to_choose_by():
    assert held_out([0, 0, 1], 0.1, 0).tolist() in ([0], [1])
    with pytest.raises(UserError, match="1 training images and no class with two of them"):
        held_out([0], 0.1, 0)


def test_a_set_with_a_validation_part_of_its_own_is_chosen_on_that(tmp_path):
    make_dtd(tmp_path / "dtd")
    probe = SimpleNamespace(sets=open_sets(tmp_path / "dtd"))
    named = [path.name for path in probe.sets.train.paths]
    for seed in (0, 1):
        places = held_places(probe, LinearConfig(grid=True), seed)
        assert [named[i] for i in places] == ["d_2.jpg", "l_2.jpg"]  # of labels/val1.txt
    one_left = SimpleNamespace(sets=replace(probe.sets, apart=(1, 2, 3)))
    with pytest.raises(UserError, match="every training image of class 'lines' is in"):
        held_places(one_left, LinearConfig(grid=True), 0)


def test_the_chosen_one_is_reported_beside_the_fixed_protocol(weights, images, cache, tmp_path):
    words = ["--epochs", 4, *GRID, *SOURCES]
    record = run(weights, images, cache, tmp_path / "grid", *words)
    plain = run(weights, images, cache, tmp_path / "plain", "--epochs", 4)
    assert set(record["metrics"]) == {
        "linear/top1", "linear/top5", "linear_best/top1", "linear_best/top5"
    }  # fmt: skip
    assert record["metrics"]["linear/top1"] == plain["metrics"]["linear/top1"]
    both = [
        torch.load(tmp_path / name / "checkpoint.pth.tar", weights_only=True)["moco_transfer"]["fc"]
        for name in ("grid", "plain")
    ]
    assert all(torch.equal(both[0][name], both[1][name]) for name in ("weight", "bias"))
    assert record["fingerprint"] != plain["fingerprint"]
    content = json.loads((tmp_path / "grid/grid.json").read_text())
    assert content["held_out_images"] == 3
    assert len(content["outcomes"]) == 12
    best = max(outcome["held_out_top1"] for outcome in content["outcomes"])
    assert content["chosen"] == content["outcomes"][0]
    assert content["chosen"]["held_out_top1"] == best
    assert (tmp_path / "grid/grid.png").read_bytes().startswith(b"\x89PNG")


def test_new_views_train_the_grid_too(weights, images, cache, tmp_path):
    words = ["--epochs", 1, *GRID, *SOURCES, "features", "augmented", "standardize", "false"]
    record = run(weights, images, cache, tmp_path / "out", *words)
    assert 0 <= record["metrics"]["linear_best/top1"] <= 100


def test_a_grid_that_is_killed_and_gone_on_with_equals_one_that_is_not(
    weights, images, cache, tmp_path
):
    whole = run(weights, images, cache, tmp_path / "whole", "--epochs", 400, *GRID, *SOURCES)
    out = tmp_path / "killed"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from transfer.classification import head_file\nhead_file.SECONDS_BETWEEN = 0\n"
        "from transfer import main_lincls\nmain_lincls.main(sys.argv[1:])"
    )
    words = [str(images), "--pretrained", weights, "--output-dir", out, *SHORT, "--epochs", 400]
    keys = [*GRID, *SOURCES, *WORDS, "feature_cache", cache]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, [*words, *keys])])
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.pth.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = torch.load(out / "checkpoint.pth.tar", weights_only=True)["epoch"]
    assert 0 < done < 400
    record = run(weights, images, cache, out, "--epochs", 400, "--resume", *GRID, *SOURCES)
    assert record["per_seed"] == whole["per_seed"]
    grids = [
        torch.load(folder / "checkpoint.pth.tar", weights_only=True)["moco_transfer"]["grid"]
        for folder in (out, tmp_path / "whole")
    ]
    for kind in ("choosing", "judged"):
        for source in ("res5", "res4-2x2", "res3"):
            for name in ("weight", "bias", "velocity", "bias_velocity"):
                assert torch.equal(*(grid[kind][source][name] for grid in grids))
    ours, theirs = ((folder / "grid.json").read_bytes() for folder in (out, tmp_path / "whole"))
    assert ours == theirs


def test_a_run_stops_after_the_steps_that_it_was_given(weights, images, cache, tmp_path):
    record = run(weights, images, cache, tmp_path / "out", "--max-steps", 2)
    content = torch.load(tmp_path / "out/checkpoint.pth.tar", weights_only=True)
    assert content["moco_transfer"]["steps"] == 2
    assert content["epoch"] == 1
    assert record["protocol"]["max_steps"] == 2
    log = (tmp_path / "out/log.jsonl").read_text().splitlines()
    assert len(log) == 1


def test_a_choice_on_the_grids_edge_is_said_and_one_inside_is_not():
    config = LinearConfig(grid_lr=(0.1, 1.0, 10.0))
    assert "lr 0.1 is the grid's smallest, and a smaller" in edge_note(
        Cell("res5", 0.1, 0.0), config
    )
    assert "lr 10 is the grid's largest" in edge_note(Cell("res5", 10.0, 0.0), config)
    assert edge_note(Cell("res5", 1.0, 0.0), config) is None


def test_the_curve_has_a_line_for_each_feature_and_decay_by_rising_rate(tmp_path):
    cells = [Cell("res5", 10.0, 0.0), Cell("res5", 0.1, 0.0), Cell("res4", 1.0, 1e-5)]
    ranking = [Outcome(cell, 50.0 - i, 1.0) for i, cell in enumerate(cells)]
    assert curves(ranking) == {
        "res4, weight decay 1e-05": [(1.0, 48.0)],
        "res5, weight decay 0": [(0.1, 49.0), (10.0, 50.0)],
    }
    for name in ("a", "b"):
        write_grid(tmp_path / name, ranking, 7, Cell("res5", 30.0, 0.0))
    assert (tmp_path / "a/grid.png").read_bytes() == (tmp_path / "b/grid.png").read_bytes()


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"grid_lr": ()}, "grid_lr is .*want one value or more, each once"),
        ({"grid_lr": (1.0, 1.0)}, "grid_lr is .*each once"),
        ({"grid_lr": (0.0, 1.0)}, "grid_lr holds 0.0, want numbers above 0"),
        ({"grid_weight_decay": (-1.0,)}, "grid_weight_decay is -1.0"),
        ({"grid_features": ("res5", "res7")}, "grid_features is 'res7', want one of"),
        ({"grid_held_out": 1.0}, "grid_held_out is 1.0, want a share between 0 and 1"),
        ({"max_steps": -1}, "max_steps is -1, want at least 0"),
    ],
)
def test_settings_that_no_grid_can_have_are_refused(keys, line):
    with pytest.raises(UserError, match=line):
        LinearConfig(**keys)
