"""Random label images of Cityscapes and detections around their objects."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from transfer.detection.cityscapes_sets import THINGS

HEIGHT, WIDTH = 96, 160


def random_ids(seed: int, objects: int = 14) -> NDArray[np.int32]:
    """Draw a road with a void border, on it objects and groups, some of them small."""
    rng = np.random.default_rng(seed)
    ids = np.full((HEIGHT, WIDTH), 7, np.int32)
    ids[:10], ids[:, :6] = 3, 0
    for number in range(objects):
        height, width = rng.integers(4, 40, 2)
        y, x = rng.integers(0, HEIGHT - height), rng.integers(0, WIDTH - width)
        label = int(rng.choice([*THINGS, 29, 30]))
        group = rng.random() < 0.15
        ids[y : y + height, x : x + width] = label if group else 1000 * label + number
    return ids


def detections_around(ids: NDArray[np.int32], seed: int) -> list[dict[str, Any]]:
    """Shift objects, give some another class, and add what lies anywhere; one mask is empty."""
    rng = np.random.default_rng([seed, 1])
    found = []
    for number in np.unique(ids[ids >= 24]).tolist():
        for _ in range(rng.integers(0, 4)):
            mask = np.roll(ids == number, tuple(rng.integers(-3, 4, 2)), (0, 1))
            label = number // 1000 if number >= 1000 else number
            known = label in THINGS and rng.random() < 0.8
            found.append((label if known else int(rng.choice(THINGS)), mask))
    for _ in range(8):
        height, width = rng.integers(3, 30, 2)
        y, x = rng.integers(0, HEIGHT - height), rng.integers(0, WIDTH - width)
        mask = np.zeros(ids.shape, bool)
        mask[y : y + height, x : x + width] = True
        found.append((int(rng.choice(THINGS)), mask))
    found.append((THINGS[0], np.zeros(ids.shape, bool)))
    return [
        {
            "category_id": THINGS.index(label),
            "segmentation": rle.encode(np.asfortranarray(mask, np.uint8)),
            "score": round(float(rng.random()), 2),  # rounded, so that some are equal
        }
        for label, mask in found
    ]
