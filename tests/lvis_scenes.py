"""Random LVIS annotations and detections around them, for comparing evaluators."""

from typing import Any

import numpy as np
from pycocotools import mask as rle

SIDE = 200


def random_truth(seed: int, images: int = 12, categories: int = 9) -> dict[str, Any]:
    """Draw images with objects, and categories that are checked, or not wholly annotated."""
    rng = np.random.default_rng(seed)
    annotations, listed = [], []
    for image in range(1, images + 1):
        present = rng.choice(categories, 4, replace=False) + 1
        for category in rng.choice(present, rng.integers(0, 9)).tolist():
            width, height = rng.uniform(5, 120, 2)
            x, y = rng.uniform(0, SIDE - width), rng.uniform(0, SIDE - height)
            box = [float(x), float(y), float(width), float(height)]
            annotations.append(_object(len(annotations) + 1, image, category, box))
        inside = {entry["category_id"] for entry in annotations if entry["image_id"] == image}
        outside = [k for k in range(1, categories + 1) if k not in inside]
        listed.append(
            {
                "id": image,
                "width": SIDE,
                "height": SIDE,
                "neg_category_ids": rng.choice(outside, 3, replace=False).tolist(),
                "not_exhaustive_category_ids": [k for k in sorted(inside) if rng.random() < 0.3],
            }
        )
    words = [
        {"id": k, "name": f"class {k}", "frequency": "rcf"[k % 3]} for k in range(1, categories + 1)
    ]
    return {"images": listed, "annotations": annotations, "categories": words}


def _object(number: int, image: int, category: int, box: list[float]) -> dict[str, Any]:
    x, y, width, height = box
    outline = [x, y, x + width, y, x + width, y + height, x + 0.2 * width, y + height]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": 0.9 * width * height,
        "segmentation": [outline],
    }


def detections_around(truth: dict[str, Any], seed: int, each: int = 5) -> list[dict[str, Any]]:
    """Move objects about, give some another category, and add what is nowhere."""
    rng = np.random.default_rng([seed, 1])
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    ids = [category["id"] for category in truth["categories"]]
    found = []
    for entry in truth["annotations"]:
        for _ in range(rng.integers(0, each)):
            box = np.array(entry["bbox"]) + rng.normal(0, 0.1 * entry["bbox"][2], 4)
            category = entry["category_id"] if rng.random() < 0.7 else int(rng.choice(ids))
            found.append(_detection(entry["image_id"], category, box, rng, sizes))
    for image in sizes:
        for _ in range(4):
            box = rng.uniform(5, 100, 4)
            found.append(_detection(image, int(rng.choice(ids)), box, rng, sizes))
    return found


def _detection(image: int, category: int, box: Any, rng: Any, sizes: Any) -> dict[str, Any]:
    height, width = sizes[image]
    x, y = np.clip(box[:2], 0, [width - 2, height - 2])
    w, h = np.clip(box[2:], 1, [width - x, height - y])
    outline = [[float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]]
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [float(v) for v in (x, y, w, h)],
        "score": round(float(rng.random()), 2),  # rounded, so that some are equal
        "segmentation": rle.merge(rle.frPyObjects(outline, height, width)),
    }
