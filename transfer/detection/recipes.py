"""Detectron2 recipes: read strictly, fitted to the machine, and what of them makes a number.

Defaults < `_BASE_` < file < KEY VALUE pairs, as everywhere; the files are Detectron2's own YAML and
load in Detectron2 too. Detectron2's own loader runs code that a YAML file names and reports an
unknown key without its file; this one does neither.
"""

import ast
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer

from convert.errors import UserError, nearest
from convert.files import detectron2_version
from pretrain.config import layers
from transfer.detection import coco_metric, datasets, dense_pose, voc_metric
from transfer.results import name_recipe

DETECTRON2_OUTPUT = "./output"  # Detectron2's default, where our link to the weights lives
PRECISIONS = ("fp32", "bf16")
VOC_METRICS = ("year", voc_metric.ELEVEN_POINTS, voc_metric.AREA)
CLASSES_KEY = "MODEL.ROI_HEADS.NUM_CLASSES"
SUFFIXES = (".tar", ".pth", ".pt", ".pkl")

# Keys that change where or how fast, not what: they stay out of a protocol. Seed and weights have
# their own places in a result; parts of a batch are in it as the images of a norm and of a loss.
_NO_PROTOCOL = (
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "GLOBAL",
    "MOCO.COCO_EVALUATOR",  # tests hold their numbers equal to the last bit
    "MOCO.ACCUMULATE",
    "MOCO.CHANNELS_LAST",
    "MOCO.CHECKPOINT_EVERY",
    "MOCO.KEEP",
    "MOCO.REFERENCE_GPUS",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "OUTPUT_DIR",
    "SEED",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    "TEST.EXPECTED_RESULTS",
    "VERSION",
    "VIS_PERIOD",
)


_NORMED = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD")
_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")


def add_config(cfg: CfgNode) -> None:
    """Add this project's own keys, with their defaults, to a Detectron2 config."""
    cfg.MOCO = CfgNode()
    cfg.MOCO.PRECISION = "fp32"  # or bf16: autocast in training and evaluation
    cfg.MOCO.TRAIN_FRACTION = 1.0  # share of the training images, 0..1
    cfg.MOCO.SPLIT_SEED = 0  # decides which images a fraction has
    cfg.MOCO.VOC_METRIC = (
        "year"  # the test set's: 11-point for 2007 and one's own; or 11-point, area
    )
    cfg.MOCO.COCO_EVALUATOR = "auto"  # faster-coco-eval where installed, else pycocotools
    cfg.MOCO.CHANNELS_LAST = False  # how weights and features lie in memory
    cfg.MOCO.ACCUMULATE = 1  # parts of a batch that each process takes one after the other
    cfg.MOCO.REFERENCE_GPUS = 8  # that the recipe's batch and schedule are made for
    cfg.MOCO.CHECKPOINT_EVERY = ""  # iterations, or minutes as 5m; empty: SOLVER.CHECKPOINT_PERIOD
    cfg.MOCO.KEEP = 1  # states kept while training runs, 0: all; the one of 1 goes when it ends


def load_recipe(file: Path, pairs: Sequence[str] = ()) -> CfgNode:
    """Build a Detectron2 config from a recipe and the command line.

    Args:
        file: a Detectron2 YAML file; its `_BASE_` (a path or a list of them) comes before it.
        pairs: trailing words, `KEY VALUE KEY VALUE ...`.

    Raises:
        UserError: a file is missing or not a mapping, a key is unknown, a value has another type.
    """
    cfg = get_cfg()
    add_config(cfg)
    _merge_file(cfg, file)
    _merge_pairs(cfg, pairs)
    if cfg.OUTPUT_DIR == DETECTRON2_OUTPUT:
        cfg.OUTPUT_DIR = str(_default_output(file, cfg.MODEL.WEIGHTS))
    _check_values(cfg)
    _follow_data(cfg, CLASSES_KEY in pairs[::2])
    return cfg


def scale_to_gpus(cfg: CfgNode, processes: int) -> list[str]:
    """Apply the linear rule to another number of GPUs, in place: k times fewer, k times longer.

    Batch and learning rate fall with the processes; warm-up, steps, length, and the periods of
    checkpoints and evaluations grow (Goyal et al., arXiv:1706.02677; Detectron2's own rule).

    Args:
        cfg: a loaded recipe, made for MOCO.REFERENCE_GPUS.
        processes: how many will train together.

    Returns:
        A line for each value that changes, old -> new.

    Raises:
        UserError: the recipe's batch does not divide over its GPUs.
    """
    gpus, batch = cfg.MOCO.REFERENCE_GPUS, cfg.SOLVER.IMS_PER_BATCH
    if batch % gpus:
        raise UserError(
            f"--scale-to-gpus: SOLVER.IMS_PER_BATCH {batch} is no multiple of the {gpus} GPUs of "
            "MOCO.REFERENCE_GPUS"
        )
    before = flatten(cfg)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = gpus
    logger = logging.getLogger("detectron2.engine.defaults")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the same lines, in other words
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    logger.setLevel(level)
    cfg.merge_from_other_cfg(scaled)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    now = flatten(cfg)
    lines = [f"{k}: {before[k]} -> {now[k]}" for k in sorted(now) if before[k] != now[k]]
    return [f"scaled from {gpus} GPUs to {processes}:", *(f"  {line}" for line in lines)]


def fit_to_machine(cfg: CfgNode, processes: int) -> list[str]:
    """Replace what this machine cannot do, in place.

    Args:
        cfg: a loaded recipe.
        processes: how many will train together.

    Returns:
        A line for each replacement.
    """
    said = []
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        said.append("device: cpu (no CUDA device was found)")
    parts = [getattr(cfg.MODEL, name) for name in _NORMED]
    refused = [part for part in parts if part.NORM == "SyncBN"]
    if cfg.MODEL.DEVICE == "cpu" and processes > 1 and refused:
        for part in refused:
            part.NORM = "naiveSyncBN"
        said.append("norm: naiveSyncBN (SyncBN refuses tensors on a CPU)")
    steps = tuple(step for step in cfg.SOLVER.STEPS if step < cfg.SOLVER.MAX_ITER)
    if steps != tuple(cfg.SOLVER.STEPS):  # Detectron2 leaves some out and stumbles over others
        late = [step for step in cfg.SOLVER.STEPS if step not in steps]
        said.append(f"steps: without {late}, as SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}")
        cfg.SOLVER.STEPS = steps
    if cfg.SEED < 0:
        cfg.SEED = int.from_bytes(os.urandom(3), "big")
        said.append(f"seed: {cfg.SEED} (drawn, as SEED was negative)")
    return said


def protocol(cfg: CfgNode, processes: int) -> dict[str, Any]:
    """Return everything of a config that changes its number, flat, for the fingerprint."""
    norm = cfg.MODEL.RESNETS.NORM
    together = cfg.SOLVER.IMS_PER_BATCH // cfg.MOCO.ACCUMULATE
    return number_keys(flatten(cfg)) | {
        "DATASETS.TRAIN": [datasets.label(name) for name in cfg.DATASETS.TRAIN],
        "DATASETS.TEST": [datasets.label(name) for name in cfg.DATASETS.TEST],
        "detectron2": detectron2_version(),
        "norm": norm,
        "norm_group_images": together if "SyncBN" in norm else together // processes,
    }


def images_at_once(cfg: CfgNode, processes: int) -> int:
    """Return how many images one process takes through the network together.

    Raises:
        UserError: the batch does not divide over processes and parts.
    """
    batch, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.MOCO.ACCUMULATE
    if processes < 1 or batch % (processes * parts):
        count = f"{processes} processes" + (f" of {parts} parts each" if parts > 1 else "")
        raise UserError(f"SOLVER.IMS_PER_BATCH: found {batch} for {count}, want a multiple of them")
    return int(batch // (processes * parts))


def checkpoint_every(cfg: CfgNode) -> tuple[int, float]:
    """Return how often a state is saved: iterations (0: never), and seconds.

    Raises:
        UserError: it is no number.
    """
    every = cfg.MOCO.CHECKPOINT_EVERY
    if not every:
        return int(cfg.SOLVER.CHECKPOINT_PERIOD), math.inf
    if not re.fullmatch(r"\d*[1-9]\d*m?", every):
        raise UserError(
            f"MOCO.CHECKPOINT_EVERY '{every}': want iterations, as 500, or minutes, as 5m"
        )
    return (0, 60.0 * int(every[:-1])) if every.endswith("m") else (int(every), math.inf)


def named(file: Path | None, cfg: CfgNode, processes: int) -> dict[str, Any]:
    """Name a run's recipe, and what of its protocol the command line changed, for the record."""
    if file is None:
        return {}
    own = load_recipe(file)
    fit_to_machine(own, processes)
    return name_recipe(file.stem, protocol(own, processes), protocol(cfg, processes))


def number_keys(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the keys that change a number."""
    return {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(f"{name}.") for name in _NO_PROTOCOL)
    }


def flatten(cfg: CfgNode) -> dict[str, Any]:
    """Return a config as dotted keys and plain values."""
    return dict(_walk(as_dict(cfg)))


def read_saved(file: Path) -> dict[str, Any]:
    """Read the config that a run has saved, flat.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return dict(_walk(yaml.safe_load(file.read_text(encoding="utf-8"))))
    except (AttributeError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read ({error}); remove this run's folder") from error


def as_dict(cfg: CfgNode) -> dict[str, Any]:
    """Return a config as nested dictionaries of plain values, as its YAML says them."""
    plain: dict[str, Any] = _plain(cfg)
    return plain


def _plain(value: Any) -> Any:
    """Return what YAML would read back; to write it first takes a third of a second."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def _walk(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merge_file(cfg: CfgNode, file: Path) -> None:
    """Merge a recipe's bases, then itself; whatever is wrong is blamed on the right file."""
    for layer, content in layers(file):
        if any("DENSEPOSE" in key for key in dict(_walk(content))):
            dense_pose.add_keys(cfg, f"recipe {layer}")
        _check_keys(cfg, dict(_walk(content)), f"recipe {layer}")
        if content.get("VERSION", cfg.VERSION) != cfg.VERSION:
            raise UserError(f"recipe {layer}: VERSION is {content['VERSION']}, want {cfg.VERSION}")
        _merge(cfg, content, f"recipe {layer}")


def _merge(cfg: CfgNode, content: dict[str, Any], where: str) -> None:
    try:
        cfg.merge_from_other_cfg(CfgNode(content))
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error


def _merge_pairs(cfg: CfgNode, pairs: Sequence[str]) -> None:
    if len(pairs) % 2:
        raise UserError(f"command line: '{pairs[-1]}' has no value; overrides are KEY VALUE pairs")
    _check_keys(cfg, pairs[::2], "command line")
    defaults = dict(_walk(cfg))
    try:
        for key, word in zip(pairs[::2], pairs[1::2], strict=True):
            cfg.merge_from_list([key, _quoted(word) if isinstance(defaults[key], str) else word])
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"command line: {error}") from error


def _quoted(word: str) -> str:
    """Keep a word that is wanted as such from being read as a number: 500, or a file named so."""
    try:
        return word if isinstance(ast.literal_eval(word), str) else repr(word)
    except (SyntaxError, ValueError):
        return word


def _check_keys(cfg: CfgNode, keys: Sequence[str] | Mapping[str, Any], where: str) -> None:
    known = dict(_walk(cfg))
    for key in keys:
        if key not in known:
            near = nearest(key, known)
            raise UserError(f"{where}: unknown key '{key}'; known keys near it: {near}")


def _check_values(cfg: CfgNode) -> None:
    if cfg.MOCO.PRECISION not in PRECISIONS:
        wanted = " or ".join(PRECISIONS)
        raise UserError(f"MOCO.PRECISION: found '{cfg.MOCO.PRECISION}', want {wanted}")
    if cfg.SOLVER.AMP.ENABLED:  # float16, in training only: another number under the same name
        raise UserError("SOLVER.AMP.ENABLED: is not used here; take MOCO.PRECISION bf16")
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise UserError("SOLVER.REFERENCE_WORLD_SIZE: is not used here; set the schedule itself")
    if not 0 < cfg.MOCO.TRAIN_FRACTION <= 1:
        found = cfg.MOCO.TRAIN_FRACTION
        raise UserError(f"MOCO.TRAIN_FRACTION: found {found}, want above 0 and up to 1 (1%: 0.01)")
    if cfg.MOCO.VOC_METRIC not in VOC_METRICS:
        wanted = " or ".join(VOC_METRICS)
        raise UserError(f"MOCO.VOC_METRIC: found '{cfg.MOCO.VOC_METRIC}', want {wanted}")
    coco_metric.choose(cfg.MOCO.COCO_EVALUATOR)
    if cfg.DATALOADER.SAMPLER_TRAIN not in _SAMPLERS:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN: found '{cfg.DATALOADER.SAMPLER_TRAIN}', want "
            f"{' or '.join(_SAMPLERS)}"
        )
    for key, least in (("ACCUMULATE", 1), ("REFERENCE_GPUS", 1), ("KEEP", 0)):
        if cfg.MOCO[key] < least:
            raise UserError(f"MOCO.{key}: found {cfg.MOCO[key]}, want {least} or more")
    checkpoint_every(cfg)
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(
            f"DATASETS.TEST: found {len(cfg.DATASETS.TEST)} sets; a result has one: name it alone"
        )


def _follow_data(cfg: CfgNode, given: bool) -> None:
    """Give the detector as many classes as one's own data have.

    Raises:
        UserError: the command line gives another number.
    """
    classes = datasets.own_classes((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    if classes is None:
        return
    if given and cfg.MODEL.ROI_HEADS.NUM_CLASSES != len(classes):
        raise UserError(
            f"{CLASSES_KEY}: found {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, the data have {len(classes)} "
            f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}); leave it out"
        )
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)


def _default_output(file: Path, weights: str) -> Path:
    name = Path(weights).resolve().name if weights else "random"
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return Path("output/detection") / file.stem / name
