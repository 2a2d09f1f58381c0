"""The learning rate from the place in the run."""

import math

from pretrain.config import PretrainConfig


def run_length(config: PretrainConfig, steps_per_epoch: int) -> int:
    """Return how many steps a whole run has: `iterations`, or else `epochs`."""
    return config.iterations or config.epochs * steps_per_epoch


def learning_rate(config: PretrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step.

    The papers' schedules hold a rate for a whole epoch; counted in iterations, a cosine moves with
    every step.

    Args:
        config: lr, schedule and what belongs to it, warm-up, length.
        step: steps done before this one.
        steps_per_epoch: of this set and batch.
    """
    warmup = config.warmup_iterations or config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr * step / warmup
    by_epoch = config.schedule_unit == "epochs"
    place = step // steps_per_epoch if by_epoch else step
    if config.schedule == "cos":  # arXiv:2003.04297, Table 1, column "cos"
        length: float = run_length(config, steps_per_epoch)
        if by_epoch:
            length = math.ceil(length / steps_per_epoch)
        return config.lr * 0.5 * (1 + math.cos(math.pi * (place + config.cosine_start) / length))
    if config.schedule == "decay":  # arXiv:1911.05722, Sec. 4, IG-1B: x0.9 every 62.5k iterations
        return float(config.lr * config.gamma ** (place // config.decay_every))
    return float(config.lr * config.gamma ** sum(place >= m for m in config.milestones))
