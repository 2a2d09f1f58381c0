"""Small inputs of the classification tests: images of a few colours, a ResNet-18 that saw some."""

from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}


def write_images(root: Path, train: int = 8, val: int = 4, seed: int = 0) -> Path:
    """Write `train/` and `val/` with a folder a colour and so many images in each.

    Every image has a tint and noise of its own, so that some are mistaken for another colour.
    """
    draw = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = draw.normal(0, 70, 3) + draw.normal(0, 50, (40, 48, 3))
                pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def write_resnet18(path: Path, seed: int = 0) -> Path:
    """Write a torchvision ResNet-18 whose batch norms have seen images of unit variance."""
    torch.manual_seed(seed)
    network = torchvision.models.resnet18()
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.randn(16, 3, 32, 32))
    torch.save(network.state_dict(), path)
    return path
