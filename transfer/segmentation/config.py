"""The keys of a semantic segmentation recipe; nothing heavy is imported: --help is quick."""

from dataclasses import dataclass
from typing import Any

from convert.errors import UserError
from transfer.classification.request import require_at_least, require_one_of

LAYOUTS = ("voc12", "cityscapes")


@dataclass(frozen=True)
class SegmentationConfig:
    """A fine-tuning of the FCN; the defaults are VOC's (MoCo v1, appendix)."""

    layout: str = "voc12"  # or cityscapes
    train_split: str = "train_aug"
    val_split: str = "val"
    crop_size: int = 513  # side of a training crop, px
    scale: tuple[float, ...] = (0.5, 2.0)  # an image is resized by before it is cut
    iterations: int = 30_000
    batch_size: int = 16  # over all processes
    lr: float = 0.003
    milestones: tuple[float, ...] = (0.7, 0.9)  # shares of the iterations
    gamma: float = 0.1  # at each milestone
    momentum: float = 0.9
    weight_decay: float = 1e-4
    precision: str = "fp32"  # or bf16: autocast in training and evaluation
    seed: int = 0
    seeds: int = 1
    max_steps: int = 0  # stop after so many iterations; 0: at the end
    checkpoint_every: int = 500  # iterations

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        require_one_of("layout", self.layout, LAYOUTS)
        require_one_of("precision", self.precision, ("fp32", "bf16"))
        for key in ("crop_size", "iterations", "batch_size", "seeds", "checkpoint_every"):
            require_at_least(key, getattr(self, key), 1)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"scale is {self.scale}, want two factors, the smaller one first")
        if not self.lr > 0:
            raise UserError(f"lr is {self.lr}, want more than 0")

    def lr_at(self, iteration: int) -> float:
        """Return the learning rate of an iteration, counted from 0."""
        passed = sum(iteration >= share * self.iterations for share in self.milestones)
        return self.lr * self.gamma**passed

    def protocol(self) -> dict[str, Any]:
        """Return everything that decides the number, apart from checkpoint, data and seed."""
        return {
            "task": f"semantic segmentation, {self.layout}",
            "network": "FCN, stride 16, two 3x3x256 convolutions of dilation 6, BN tuned over the "
            "batch",
            "splits": [self.train_split, self.val_split],
            "crop_size": self.crop_size,
            "scale": list(self.scale),
            "flip_p": 0.5,
            "iterations": self.iterations,
            "max_steps": self.max_steps,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "milestones": list(self.milestones),
            "gamma": self.gamma,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "precision": self.precision,
            "evaluation": "whole images at their own size, one scale",
        }
