"""Linear classification on frozen features, as in MoCo's Sec. 4.1 and Table 1."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convert.errors import Stopped, UserError
from convert.progress import Progress
from pretrain import distributed
from transfer.classification.board import Board
from transfer.classification.features import (
    Features,
    FrozenNetwork,
    Views,
    reading_processes,
)
from transfer.classification.grid import Cell, Grid, Outcome, edge_note, write_grid
from transfer.classification.head_file import HeadFile
from transfer.classification.heads import (
    INIT_STD,
    LR_DECAY,
    TRAIN_VIEW,
    Batches,
    Head,
    LinearConfig,
    Standardizer,
    augmented_batches,
    cached_batches,
    one_thread,
    score,
    standardized,
    train_head,
)
from transfer.classification.held_out import Part, held_out
from transfer.classification.probe import Probe
from transfer.classification.request import Request
from transfer.classification.shifted import shifted_metrics

AUTO = "auto"
# Multiply-adds of a step below which waking a second thread costs more than it brings: beside
# another busy process 25 times more was seen.
SMALL_STEP = 50_000_000


def evaluate(config: LinearConfig, request: Request, only_score: bool = False) -> dict[str, Any]:
    """Train a classifier on a checkpoint's frozen features and write `results.json`.

    Args:
        config: the protocol.
        request: checkpoint, images, folders.
        only_score: train nothing; score the classifier in the file that `resume` names, and write
            the result into `evaluate/` in the output folder.

    Raises:
        UserError: bad input, a diverging loss, or an output folder in use.
        RuntimeError: the frozen backbone moved.
    """
    if request.resume not in (None, AUTO) and config.seeds > 1:
        raise UserError("--resume FILE is of one seed; with --seeds use --resume alone")
    if only_score and request.resume is None:
        raise UserError("--evaluate needs the trained classifier: --resume, or --resume FILE")
    probe = Probe("linear", config, request, _protocol)
    if not only_score:
        done = probe.finished(may_change=("epochs",), from_file=True)
        if done is not None:
            _refuse_unscored(probe, done)
            return done
    per_seed = [_one_seed(probe, config, seed, only_score) for seed in config.all_seeds]
    return probe.write(per_seed, request.output_dir / ("evaluate" if only_score else ""))


def _refuse_unscored(probe: Probe, done: Mapping[str, Any]) -> None:
    """Refuse to pass for done what has not been scored on a shifted set that is asked for."""
    for part in probe.shifted:
        if f"linear/{part.name}/top1" not in done["metrics"]:
            raise UserError(
                f"{probe.request.output_dir}: is done, and was not scored on {part.name}; score "
                "its classifier there with --resume --evaluate"
            )


def _one_seed(probe: Probe, config: LinearConfig, seed: int, only_score: bool) -> dict[str, float]:
    """Train, or only score, the classifier of one seed."""
    network = probe.network(seed, config.grid_features if config.grid else ())
    folder = probe.request.output_dir / ("" if config.seeds == 1 else f"seed_{seed}")
    file = HeadFile(folder, network.backbone, probe.identity(seed))
    saved = _earlier(file, probe.request, must_exist=only_score)
    if saved is not None and saved["epoch"] > config.epochs and not only_score:
        raise UserError(f"--resume: has {saved['epoch']} epochs, more than {config.epochs}")
    sets = _sets(probe, config, network, seed)
    file.standardizer = sets.scale.get(config.stage)
    val = sets.val[config.stage]
    head = Head.untrained(config, val.values.shape[1], probe.num_classes, seed, probe.device)
    grid = _grid(probe, config, sets, seed) if config.grid else None
    if saved is not None:
        head.restore(saved)
        if grid is not None:
            grid.restore(saved["grid"])
    if not only_score:
        _train(head, grid, sets.batches, val, file, probe, config)
        _comment(head, probe, config)
    network.prove_unmoved()
    metrics = _score(probe, network, sets, "linear", head.fc, config.stage)
    if grid is None:
        return metrics
    best = _choose(grid, sets, config, probe)
    if distributed.rank() == 0:
        reference = Cell(config.stage, config.lr, config.weight_decay)
        output = folder / ("evaluate" if only_score else "")
        write_grid(output, best, len(sets.held_places), reference)
    fc, source = grid.classifier(best[0].cell), best[0].cell.source
    return metrics | _score(probe, network, sets, "linear_best", fc, source)


def _score(
    probe: Probe, network: FrozenNetwork, sets: "_Sets", task: str, fc: nn.Linear, source: str
) -> dict[str, float]:
    """Score a classifier on the test set and on the shifted ones."""
    top1, top5 = score(fc, sets.val[source])
    scale = sets.scale.get(source)
    shifted = [
        (part, found[source] if scale is None else scale.features(found[source]))
        for part, found in probe.shifted_features(network)
    ]
    metrics = {f"{task}/top1": top1, f"{task}/top5": top5}
    return metrics | shifted_metrics(task, fc, shifted)


@dataclass(frozen=True)
class _Sets:
    """What a classifier and its grid learn from, are chosen on and are judged on.

    Attributes:
        batches: of training images, with the features of every source.
        val: source -> features of the test images.
        held: source -> features of the held-out training images, where there is a grid.
        held_places: (n,) which training images are held out.
        scale: source -> what its features were standardised by, where the config says so.
    """

    batches: Batches
    val: dict[str, Features]
    held: dict[str, Features]
    held_places: Tensor
    scale: dict[str, Standardizer]


def _sets(probe: Probe, config: LinearConfig, network: FrozenNetwork, seed: int) -> _Sets:
    """Return batches and features, all standardised where the config says so."""
    cached = config.features == "cached"
    train = probe.all_train_features(network) if cached or config.standardize else {}
    val = probe.all_val_features(network)
    if cached:
        batches = cached_batches(train[config.stage], config.batch_size, seed, train)
    else:
        pixels = network.backbone.facts.pixels
        views = Views(probe.sets.train, config, pixels, TRAIN_VIEW, seed)
        workers = reading_processes(probe.request.workers, probe.device)
        batches = augmented_batches(network, views, config.batch_size, workers)
    places, held = torch.zeros(0, dtype=torch.int64), {}
    if config.grid:
        places = held_places(probe, config, seed)
        held = {source: features.take(places) for source, features in train.items()}
        held = held or probe.features_of(network, Part.of(probe.sets.train, places), "held out")
    if not config.standardize:
        return _Sets(batches, val, held, places, {})
    # Means and deviations are of all training images, the held-out ones too: no class is told.
    scale = {source: Standardizer.of(features.values) for source, features in train.items()}
    val, held = ({s: scale[s].features(f) for s, f in found.items()} for found in (val, held))
    return _Sets(standardized(batches, scale[config.stage], scale), val, held, places, scale)


def held_places(probe: Probe, config: LinearConfig, seed: int) -> Tensor:
    """Return which training images a choice is made on: those that the set's makers named, or some.

    Raises:
        UserError: nothing can be held out, or nothing of a class would be left to learn from.
    """
    apart, labels = probe.sets.apart, torch.tensor(probe.sets.train.labels)
    if not apart:
        return held_out(labels, config.grid_held_out, seed)
    places = torch.tensor(apart)
    learnt = torch.ones(len(labels), dtype=torch.bool)
    learnt[places] = False
    missing = sorted(set(labels.tolist()) - set(labels[learnt].tolist()))
    if missing:
        name = probe.sets.train.classes[missing[0]]
        raise UserError(
            f"images {probe.sets.name}: every training image of class '{name}' is in the set's own "
            "validation part; nothing of it is left to learn from"
        )
    return places


def _grid(probe: Probe, config: LinearConfig, sets: _Sets, seed: int) -> Grid:
    widths = {source: sets.val[source].values.shape[1] for source in config.grid_features}
    images = len(probe.sets.train)
    return Grid(config, widths, probe.num_classes, seed, probe.device, images, sets.held_places)


def _choose(grid: Grid, sets: _Sets, config: LinearConfig, probe: Probe) -> list[Outcome]:
    """Rank the grid's classifiers on the held-out images, and say which is chosen."""
    ranking = grid.ranking(sets.held)
    best = ranking[0]
    probe.request.say(
        f"chosen of {len(grid)} on {len(sets.held_places)} held-out training images: {best.cell} "
        f"({best.top1:.2f})"
    )
    note = edge_note(best.cell, config)
    if note is not None:
        probe.request.say(note)
    return ranking


def _earlier(file: HeadFile, request: Request, must_exist: bool) -> dict[str, Any] | None:
    """Read the file that is to be gone on with; refuse one that would be overwritten."""
    if request.resume is None:
        if file.path.exists():
            raise UserError(
                f"{file.path}: a run that was not finished; go on with --resume, or choose "
                "another --output-dir"
            )
    elif request.resume != AUTO:
        return file.read(Path(request.resume))
    elif must_exist or file.path.exists():
        return file.read(file.path)
    return None


def _train(
    head: Head,
    grid: Grid | None,
    batches: Batches,
    val: Features,
    file: HeadFile,
    probe: Probe,
    config: LinearConfig,
) -> None:
    left = (config.epochs - head.epoch) * len(probe.sets.train)
    weights = head.fc.weight.numel() + (0 if grid is None else grid.size)
    small = config.features == "cached" and config.batch_size * weights < SMALL_STEP
    beside = None if grid is None else grid.step
    board = Board(file.path.parent, head.epoch) if probe.request.tensorboard else None

    def after_epoch() -> None:
        file.keep(head, grid)
        if board is not None:
            board.add("linear", head.history[-1])

    try:
        with (
            one_thread() if small else nullcontext(),
            Progress(left, "linear", quiet=probe.request.quiet) as progress,
        ):
            train_head(head, batches, val, config, progress, after_epoch, beside)
    except Stopped:  # the epoch that was cut short is not in what the file keeps
        file.write()
        raise
    finally:
        if board is not None:
            board.close()
    file.write()


def _comment(head: Head, probe: Probe, config: LinearConfig) -> None:
    """Say it when the loss ended far above chance: the number then tells of the rate."""
    chance = math.log(probe.num_classes)
    loss = head.history[-1]["loss"] if head.history else 0.0
    if loss > 2 * chance:
        otherwise = "" if config.standardize else ", or standardize true"
        probe.request.say(
            f"note: the last epoch's loss {loss:.3g} is far above chance, log({probe.num_classes}) "
            f"= {chance:.2f}: lr {config.lr:g} is too high for the scale of these features; try a "
            f"tenth of it{otherwise}"
        )


def _protocol(config: LinearConfig) -> dict[str, Any]:
    augmented = config.features == "augmented"
    view = f"resize {config.resize}, centre crop {config.image_size}"
    drawn = f"random crop of 8 to 100% to {config.image_size}, flip"
    return {
        "task": "linear",
        "features": f"{config.stage}, average-pooled",
        "standardize": config.standardize,
        "train_view": drawn if augmented else view,
        "val_view": view,
        "precision": config.precision,
        "epochs": config.epochs,
        "start_epoch": config.start_epoch,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "schedule": list(config.schedule),
        "lr_decay": LR_DECAY,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "init": f"N(0, {INIT_STD}), bias 0",
        "selection": "last epoch",  # the best one on the test set would be chosen by the test set
        **({"max_steps": config.max_steps} if config.max_steps else {}),
        **(_grid_protocol(config) if config.grid else {}),
    }


def _grid_protocol(config: LinearConfig) -> dict[str, Any]:
    return {
        "grid_lr": list(config.grid_lr),
        "grid_weight_decay": list(config.grid_weight_decay),
        "grid_features": list(config.grid_features),
        "grid_selection": "top-1 on the set's own validation part, where it has none on "
        f"{config.grid_held_out:g} of each class's training images, refitted on all",
    }
