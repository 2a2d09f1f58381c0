"""What a recipe, a task or a metric is called on a page."""

import re

TASKS = {
    "coco": "Mask R-CNN",
    "voc07": "Faster R-CNN",
    "linear": "Linear classifier",
    "knn": "kNN",
    "voc07_svm": "Linear SVMs",
}
RECIPES = {
    "embedded_coco_R50_C4": "Mask R-CNN R50-C4, embedded scenes, COCO layout",
    "embedded_voc_R50_C4": "Faster R-CNN R50-C4, embedded scenes, VOC layout",
    "linear_embedded": "Linear classifier, embedded digits",
    "knn_embedded": "kNN, embedded digits",
    "linear_imagenet": "Linear classifier, ImageNet-1k",
    "finetune_imagenet_1percent": "Fine-tuning, 1% of ImageNet's labels",
    "finetune_imagenet_10percent": "Fine-tuning, 10% of ImageNet's labels",
    "svm_voc07": "Linear SVMs, VOC07",
} | TASKS
KINDS = {
    "voc": "Faster R-CNN",
    "coco": "Mask R-CNN",
    "lvis": "Mask R-CNN",
    "cityscapes": "Mask R-CNN",
    "coco_keypoints": "Keypoint R-CNN",
    "densepose": "DensePose R-CNN",
}
DATA = {
    "voc": "VOC",
    "coco": "COCO",
    "lvis": "LVIS",
    "cityscapes": "Cityscapes",
    "coco_keypoints": "COCO keypoints",
    "densepose": "DensePose-COCO",
    "voc12": "VOC 2012",
}
_NETWORK = re.compile(r"([a-z0-9_]+)_R50_(C4|C5|FPN|FCN)_(?:(4conv1fc)_)?(\w+)")


def recipe_title(recipe: str) -> str:
    """Name a recipe; `voc_R50_C4_24k [A]` is `Faster R-CNN R50-C4, VOC, 24k [A]`."""
    stem, _, mark = recipe.partition(" [")
    title = RECIPES.get(stem, stem)
    found = _NETWORK.fullmatch(stem)
    if found and found[1] in DATA:
        data, body, heads, length = found.groups()
        kind = "FCN R50" if body == "FCN" else f"{KINDS.get(data, data)} R50-{body}"
        title = f"{kind}{f' {heads}' if heads else ''}, {DATA[data]}, {length.replace('_', ' ')}"
    return f"{title} [{mark}" if mark else title


def task_title(metric: str, recipe: str) -> str:
    """Name in short what a metric is of: `knn20/top1` is kNN's; else its recipe."""
    task = metric.split("/")[0]
    return TASKS.get(task) or TASKS.get(task.rstrip("0123456789")) or recipe_title(recipe)


def metric_name(metric: str) -> str:
    """Write a metric for a reader: `knn20/top1` -> `k=20 top-1`."""
    task, _, name = metric.partition("/")
    found = re.fullmatch(r"knn(\d+)|.*_k(\d+)", task)
    k = f"k={found[1] or found[2]} " if found else ""
    return k + name.replace("_", " ").replace("top", "top-")
