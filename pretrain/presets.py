"""Settings for a set of one's own, from the number of its images.

Two sets have settings that are known to work: ImageNet's 1,281,167 images (arXiv:1911.05722,
arXiv:2003.04297) and CIFAR-10's 50,000 (the reference's notebook). Each rule below gives both of
them back and carries over to what lies between and beyond; none was tuned on a third set.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from pretrain.config import PretrainConfig

AUTO = "auto"
PAPERS_K = 65536
KEPT_BACK = 12  # K is at most the set's size over this: CIFAR-10's 50,000 over its 4096
LONG_EPOCH = 1000  # steps: ImageNet's have 5004, CIFAR-10's 97
MANY = 100_000  # images: above CIFAR-10's 50,000, below ImageNet's
VIEWS_WANTED = 40_000_000  # 800 epochs of CIFAR-10
FEWEST_EPOCHS, MOST_EPOCHS = 200, 800
PAPERS_STEPS, PAPERS_BATCH = 1_000_000, 256  # 200 epochs of ImageNet
FEWEST_STEPS, SMALLEST_BATCH = 16, 16


@dataclass(frozen=True)
class Choice:
    """One setting, and why it is so."""

    key: str
    value: Any
    why: str


def fit(
    config: PretrainConfig, images: int, given: Collection[str] = ()
) -> tuple[PretrainConfig, list[str]]:
    """Fit a config to a set, where its `preset` asks for that.

    Args:
        config: as recipe and command line say.
        images: in the training set.
        given: keys that the command line set; they stay.

    Returns:
        The config, and a line for each setting with its reason.
    """
    if config.preset != AUTO:
        return config, []
    if "batch_size" not in given:
        choice = _batch(config, images)
        rate = config.lr * choice.value / config.batch_size
        config = replace(config, batch_size=choice.value)
        chosen = [choice]
        if "lr" not in given:
            config = replace(config, lr=rate)
            chosen.append(Choice("lr", rate, "the recipe's, scaled with the batch"))
    else:
        chosen = []
    free = [choice for choice in _choices(config, images) if choice.key not in given]
    config = replace(config, **{choice.key: choice.value for choice in free})
    lines = [
        f"preset {AUTO}: {choice.key} {choice.value}: {choice.why}" for choice in chosen + free
    ]
    return config, [f"preset {AUTO}: {images} images", *lines]


def _batch(config: PretrainConfig, images: int) -> Choice:
    batch = config.batch_size
    while batch // 2 >= SMALLEST_BATCH and images // batch < FEWEST_STEPS:
        batch //= 2
    if batch == config.batch_size:
        return Choice("batch_size", batch, "the recipe's: an epoch has steps enough")
    why = f"the largest half of the recipe's {config.batch_size} with {FEWEST_STEPS} steps an epoch"
    return Choice("batch_size", batch, why)


def _choices(config: PretrainConfig, images: int) -> list[Choice]:
    steps = images // config.batch_size
    chosen = []
    if config.dictionary in {"queue", "bank"}:
        chosen.append(_K(config, images))
    if steps >= LONG_EPOCH:
        why = f"an epoch has {steps} steps, as long as a key encoder's memory of {LONG_EPOCH}"
        chosen.append(Choice("m", 0.999, f"{why}; ImageNet's"))
    else:
        why = f"an epoch has {steps} steps: 0.999 would remember {LONG_EPOCH}, more than all of it"
        chosen.append(Choice("m", 0.99, f"{why}; CIFAR-10's"))
    if images >= MANY:
        chosen.append(Choice("crop_scale", (0.2, 1.0), "a large set; the papers' crops"))
    else:
        why = f"below {MANY} images views must differ more, or they are matched by heart"
        chosen.append(Choice("crop_scale", (0.08, 1.0), f"{why}; CIFAR-10's"))
    return [*chosen, *_length(config, images)]


def _K(config: PretrainConfig, images: int) -> Choice:
    K = min(PAPERS_K, 1 << max(0, (images // KEPT_BACK).bit_length() - 1))
    if config.batch_size > K:
        return Choice("K", config.batch_size, "the batch, the least there can be")
    if K == PAPERS_K:
        return Choice("K", K, "the papers'; the set is large enough that few keys are positives")
    why = f"the largest power of two in a {KEPT_BACK}th of the set, so that few keys are positives"
    return Choice("K", K, f"{why}; CIFAR-10's is 4096")


def _length(config: PretrainConfig, images: int) -> list[Choice]:
    cosine = Choice("schedule", "cos", "v2's: it needs no milestones (arXiv:2003.04297, Table 1)")
    if FEWEST_EPOCHS * images > 2 * PAPERS_STEPS * PAPERS_BATCH:
        steps = PAPERS_STEPS * PAPERS_BATCH // config.batch_size
        why = f"as many images as {FEWEST_EPOCHS} epochs of ImageNet: an epoch here is too long"
        unit = Choice("schedule_unit", "iterations", "the cosine moves with every step")
        return [Choice("iterations", steps, why), cosine, unit]
    hundreds = -(-VIEWS_WANTED // (100 * images)) * 100
    epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, hundreds))
    why = f"{epochs * images / 1e6:.0f} million images seen; small sets gain from more epochs: "
    why += "CIFAR-10's kNN is 82.6 after 200, 86.3 after 400, 88.7 after 800"
    return [Choice("epochs", epochs, why), cosine]
