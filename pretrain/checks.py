"""What a run can be: every value in its range, batch, groups and set fitting each other."""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from convert.errors import UserError
from convert.resnets import CIFAR_STEM, IMAGENET_STEM, find_arch
from pretrain import distributed
from pretrain.config import PretrainConfig, as_dict
from pretrain.contrast import Contrast
from pretrain.dictionaries import find_method
from pretrain.encoders import WHOLE_BATCH
from pretrain.loader import choose_backend
from pretrain.norm import PAPERS_GROUPS, choose_groups, of_processes
from pretrain.presets import AUTO
from pretrain.schedule import run_length
from pretrain.views import AUGMENTATIONS

# What each process may have its own value of: a machine's cores, where its images lie.
OWN_KEYS = frozenset({"workers", "data", "init_from", "keep"})
LARGEST = 2**53  # beyond it a seed or a count is a typing mistake


def check(
    config: PretrainConfig, images: int, settled: Mapping[str, Any] | None = None
) -> PretrainConfig:
    """Return the config with every default that depends on the machine filled in.

    Args:
        config: as a user gave it.
        images: in the training set.
        settled: what a run that is gone on with was started with, in place of such defaults.

    Raises:
        UserError: a value outside its range, sizes that do not fit each other or the set.
    """
    _check_ranges(config)
    find_arch(config.arch)
    method = find_method(config.dictionary)
    _check_sizes(config, method, images)
    device = best_device(config.device)
    if settled and not config.bn_groups:
        config = replace(config, bn_groups=settled["bn_groups"])
    config = replace(
        config,
        device=device,
        precision=config.precision or ("bf16" if _has_bf16(device) else "fp32"),
        workers=loading_workers(config.workers),
        views=choose_backend(config.views, device, randaugment=bool(config.randaugment)),
        bn_groups=_groups(config, method),
        compile=config.compile and _can_compile(device),
    )
    groups_of_a_pass(config)
    _check_group_size(config)
    return config


def check_alike(config: PretrainConfig, **more: object) -> None:
    """See that all processes were started with one config, and found the same.

    Raises:
        UserError: they differ; each would train something else, or wait for the others for ever.
    """
    values = {key: v for key, v in as_dict(config).items() if key not in OWN_KEYS} | more
    differ = distributed.differing(values)
    if differ:
        raise UserError(
            f"the processes of this run differ in {', '.join(differ)}; start all of them with the "
            "same words, images and output folder: one that all machines see"
        )


def best_device(wanted: str) -> str:
    """Return the device asked for, or the best at hand.

    Raises:
        UserError: it is not at hand.
    """
    if wanted not in {"", "cpu", "cuda"}:
        raise UserError(f"device is '{wanted}', want one of cpu, cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: no CUDA device is at hand; want --device cpu")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def _can_compile(device: str) -> bool:
    """Say whether torch can compile here; for a CPU it asks for a C++ compiler."""
    probe = torch.compile(lambda x: x.sin() + 1)
    length = 1 + time.time_ns() % 100_003  # one never compiled before, or torch's cache answers
    try:
        probe(torch.ones(length, device=device))
    except Exception as error:  # whatever compilers raise
        reason = str(error).strip().partition("\n")[0][:200]
        distributed.say(f"compile: not possible here ({reason}); the encoders run as they are")
        return False
    return True


def loading_workers(wanted: int) -> int:
    """Return how many processes load images on a machine: as asked, or its cores but one."""
    return wanted if wanted >= 0 else min(32, max(1, (os.cpu_count() or 1) - 1))


def groups_of_a_pass(config: PretrainConfig) -> int:
    """Return the batch norm groups of one forward pass on one process.

    Raises:
        UserError: the groups of a process cannot be shared out among the parts of a step.
    """
    processes = distributed.size()
    method = find_method(config.dictionary)
    if config.accumulate > 1 and not method.accumulates:
        raise UserError(
            f"accumulate {config.accumulate}: {config.method} holds a batch against itself, which "
            "cannot be cut; want 1, and more processes for a large batch"
        )
    if method.whole_batch_norm or (config.bn_groups == 1 and processes > 1):
        mine, groups = 1, WHOLE_BATCH
    else:
        mine = config.bn_groups // processes
        groups = mine // config.accumulate
    if mine % config.accumulate:
        raise UserError(
            f"accumulate {config.accumulate}: a process has {mine} batch norm groups; want parts "
            "that hold whole groups: a divisor of them"
        )
    return groups


def _groups(config: PretrainConfig, method: type[Contrast]) -> int:
    processes = distributed.size()
    if method.whole_batch_norm:
        if config.bn_groups not in {0, 1} or config.batch_size % processes:
            raise UserError(
                f"batch of {config.batch_size} on {of_processes(processes)} in {config.bn_groups} "
                f"batch norm groups: {config.method} has one over all processes, of equal shares"
            )
        return 1
    groups = choose_groups(
        config.batch_size,
        config.bn_groups,
        processes=processes,
        leak=config.leak,
        leaks=method.leaks,
    )
    if not config.bn_groups and processes == 1 and groups < PAPERS_GROUPS:
        cut = "1 group" if groups == 1 else f"{groups} groups"
        distributed.say(
            f"batch norm in {cut} of {config.batch_size // groups} images: more than "
            f"{groups} would leave fewer than 8 a group"
        )
    return groups


def _check_group_size(config: PretrainConfig) -> None:
    """Refuse batch norm over a single value: one image whose last feature map is one position."""
    images = config.batch_size // config.bn_groups
    stride = 8 if config.stem == CIFAR_STEM else 32
    if images < 2 and config.image_size <= stride:
        raise UserError(
            f"batch of {config.batch_size} in {config.bn_groups} batch norm groups: one image of "
            f"{config.image_size} pixels ends in a single value, which has no variance; want "
            "fewer --bn-groups, a larger batch or image_size"
        )


def _check_ranges(config: PretrainConfig) -> None:
    allowed = {
        "augmentation": tuple(AUGMENTATIONS),
        "preset": ("", AUTO),
        "schedule": ("step", "cos", "decay"),
        "schedule_unit": ("epochs", "iterations"),
        "optimizer": ("sgd", "lars"),
        "stem": (IMAGENET_STEM, CIFAR_STEM),
        "precision": ("", "fp32", "bf16"),
    }
    for key, choices in allowed.items():
        if getattr(config, key) not in choices:
            wanted = ", ".join(choice for choice in choices if choice)
            raise UserError(f"{key} is '{getattr(config, key)}', want one of {wanted}")
    ranges = {
        "m": 0 <= config.m <= 1,
        "bank_momentum": 0 <= config.bank_momentum <= 1,
        "momentum": 0 <= config.momentum <= 1,
        "tau": config.tau > 0,
        "K": config.K > 0,
        "dim": config.dim > 0,
        "batch_size": config.batch_size > 0,
        "accumulate": config.accumulate > 0,
        "epochs": config.epochs > 0,
        "image_size": config.image_size >= 32,
        "randaugment": config.randaugment == ()
        or (
            (len(config.randaugment) == 2 and config.randaugment[0] > 0)
            and 0 <= config.randaugment[1] <= 30
        ),
        "min_side": config.min_side > 0,
        "max_bad_share": 0 <= config.max_bad_share <= 1,
        "print_freq": config.print_freq > 0,
        "crop_scale": len(config.crop_scale) == 2
        and 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1,
        "decay_every": config.decay_every > 0 or config.schedule != "decay",
        "start_epoch": 0 <= config.start_epoch < config.epochs or config.iterations > 0,
        "milestones": all(milestone >= 0 for milestone in config.milestones),
        "workers": config.workers >= -1,
        "warmup_iterations": not (config.warmup_iterations and config.warmup_epochs),
    }
    never_negative = "lr weight_decay max_steps residual_gamma keep bn_groups iterations gamma seed"
    never_negative += " warmup_epochs warmup_iterations knn_every decay_every cosine_start"
    for key in never_negative.split():
        ranges[key] = ranges.get(key, True) and getattr(config, key) >= 0
    for key, value in as_dict(config).items():
        if isinstance(value, int | float) and not abs(value) <= LARGEST:  # NaN compares to nothing
            ranges[key] = False
    wrong = [f"{key} {getattr(config, key)}" for key, good in ranges.items() if not good]
    if wrong:
        raise UserError(
            f"out of range: {', '.join(wrong)}; momenta are in [0, 1], temperature, sizes and "
            "counts above 0, image_size 32 or more, start_epoch below epochs, no number above "
            f"{LARGEST}, warm-up in epochs or in iterations"
        )
    if not re.fullmatch(r"(\d*[1-9]\d*m?)?", config.checkpoint_every):
        raise UserError(
            f"checkpoint_every '{config.checkpoint_every}': want steps, as 500, or minutes, as 5m"
        )


def _check_sizes(config: PretrainConfig, method: type[Contrast], images: int) -> None:
    if config.batch_size > images:
        raise UserError(
            f"batch of {config.batch_size}: the set has {images} images; lower --batch-size"
        )
    per_epoch = images // config.batch_size
    length = run_length(config, per_epoch)
    end = min(length, config.max_steps or length)
    if config.start_epoch * per_epoch >= end:
        raise UserError(
            f"start_epoch {config.start_epoch}: {per_epoch} steps an epoch put it at step "
            f"{config.start_epoch * per_epoch}, and the run ends after {end}; lower --start-epoch, "
            "or raise --max-steps or the key iterations"
        )
    if config.leak_meter and (images < 2 * config.batch_size or not method.leaks):
        raise UserError(
            f"leak_meter: a batch is {config.batch_size} of {images} images, {config.method}; want "
            "two batches or more, and a method whose keys are encoded beside other images'"
        )
    if not method.holds_keys:
        if config.batch_size == 1:
            raise UserError(
                f"batch of 1: {config.method} holds a batch against itself, and there is nothing "
                "else in it; raise --batch-size"
            )
        return
    if config.K < config.batch_size:
        raise UserError(f"K {config.K}: is below the batch of {config.batch_size}; raise --moco-k")
    if config.K >= images and not config.allow_small_set:
        raise UserError(
            f"K {config.K}: the set has {images} images, so the negatives would hold older keys of "
            "the positives; lower --moco-k, or --allow-small-set to do it anyway"
        )


def _has_bf16(device: str) -> bool:
    """Tell whether this hardware multiplies bfloat16 natively; elsewhere it would be slower."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
