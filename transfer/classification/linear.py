"""Linear classification on frozen features, as in MoCo's Sec. 4.1 and Table 1."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from convert.errors import Stopped, UserError
from convert.progress import Progress
from transfer.classification.features import (
    Features,
    FrozenNetwork,
    Views,
    reading_processes,
)
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
from transfer.classification.probe import Probe
from transfer.classification.request import Request

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
    probe = Probe("linear", config, request, _protocol(config))
    if not only_score:
        done = probe.finished(may_change=("epochs",))
        if done is not None:
            return done
    per_seed = [_one_seed(probe, config, seed, only_score) for seed in config.all_seeds]
    return probe.write(per_seed, request.output_dir / ("evaluate" if only_score else ""))


def _one_seed(probe: Probe, config: LinearConfig, seed: int, only_score: bool) -> dict[str, float]:
    """Train, or only score, the classifier of one seed."""
    network = probe.network(seed)
    folder = probe.request.output_dir / ("" if config.seeds == 1 else f"seed_{seed}")
    file = HeadFile(folder, network.backbone, probe.identity(seed))
    saved = _earlier(file, probe.request, must_exist=only_score)
    if saved is not None and saved["epoch"] > config.epochs and not only_score:
        raise UserError(f"--resume: has {saved['epoch']} epochs, more than {config.epochs}")
    batches, val, file.standardizer = _features(probe, config, network, seed)
    head = Head.untrained(config, val.values.shape[1], probe.num_classes, seed, probe.device)
    if saved is not None:
        head.restore(saved)
    if not only_score:
        _train(head, batches, val, file, probe, config)
        _comment(head, probe, config)
    network.prove_unmoved()
    top1, top5 = score(head.fc, val)
    return {"linear/top1": top1, "linear/top5": top5}


def _features(
    probe: Probe, config: LinearConfig, network: FrozenNetwork, seed: int
) -> tuple[Batches, Features, Standardizer | None]:
    """Return training batches and test features, both standardised where the config says so."""
    cached = config.features == "cached"
    train = probe.train_features(network) if cached or config.standardize else None
    val = probe.val_features(network)
    if cached and train is not None:
        batches = cached_batches(train, config.batch_size, seed)
    else:
        pixels = network.backbone.facts.pixels
        views = Views(probe.sets.train, config, pixels, TRAIN_VIEW, seed)
        workers = reading_processes(probe.request.workers, probe.device)
        batches = augmented_batches(network, views, config.batch_size, workers)
    if not config.standardize or train is None:
        return batches, val, None
    standardizer = Standardizer.of(train.values)
    val = Features(standardizer(val.values), val.labels)
    return standardized(batches, standardizer), val, standardizer


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
    batches: Batches,
    val: Features,
    file: HeadFile,
    probe: Probe,
    config: LinearConfig,
) -> None:
    left = (config.epochs - head.epoch) * len(probe.sets.train)
    small = config.features == "cached" and config.batch_size * head.fc.weight.numel() < SMALL_STEP
    try:
        with (
            one_thread() if small else nullcontext(),
            Progress(left, "linear", quiet=probe.request.quiet) as progress,
        ):
            train_head(head, batches, val, config, progress, lambda: file.keep(head))
    except Stopped:  # the epoch that was cut short is not in what the file keeps
        file.write()
        raise
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
    }
