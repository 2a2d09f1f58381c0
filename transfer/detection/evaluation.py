"""What a trained detector is worth on its set's measure, and how well each image came out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.data.samplers import InferenceSampler
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode
from detectron2.utils import comm
from numpy.typing import NDArray
from torch import nn

from convert.errors import UserError
from convert.progress import progress
from transfer.detection import (
    cityscapes_metric,
    cityscapes_sets,
    coco_metric,
    datasets,
    lvis_metric,
    voc_metric,
)

PARTS = ("AP", "AP50", "AP75")
SCORE = 0.5  # over it a detection counts, and is drawn, when single images are looked at
RECALLS = np.linspace(0, 1, 101)
# What a COCO kind is called in the metrics, and what of an annotation it compares.
PREFIXES = {"bbox": "box_", "segm": "mask_", "keypoints": "keypoint_"}
COMPARED = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}

Floats = NDArray[np.float64]


class Outcome(NamedTuple):
    """A detector's worth on a test set.

    Attributes:
        metrics: flat, in percent: `voc07/AP50`, `coco/mask_AP`.
        details: which evaluator ran, AP of each class and of each size.
        curves: precision, 0..1, at `RECALLS`, for each measure and IoU: `voc07/AP50`.
        worth: image_id -> F1, 0..1, of its detections over `SCORE` at an IoU of 0.5.
    """

    metrics: dict[str, float]
    details: dict[str, Any]
    curves: dict[str, Floats]
    worth: dict[Any, float]


class Found(NamedTuple):
    """What a detector found in an image: boxes (D, 4), scores and classes (D,); COCO's results."""

    image_id: Any
    boxes: Floats
    scores: Floats
    classes: NDArray[np.int64]
    json: list[dict[str, Any]]


def hidden(quiet: bool) -> bool:
    """Progress is shown by one process, unless asked to be quiet."""
    return quiet or not comm.is_main_process()


def evaluate(cfg: CfgNode, model: nn.Module, test: datasets.Loaded, quiet: bool) -> Outcome:
    """Measure a detector on the recipe's test set.

    Returns:
        What it is worth; empty in all processes but the main one.
    """
    kind = datasets.evaluator_type(cfg.DATASETS.TEST[0])[0]
    loader = build_detection_test_loader(
        test.dicts,
        mapper=build_mapper(cfg),
        sampler=InferenceSampler(len(test.dicts)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    collector = _Collector(as_json=kind in MEASURES)
    found = inference_on_dataset(model, _Counted(loader, quiet), collector)
    if not comm.is_main_process():
        return Outcome({}, {}, {}, {})
    measured = MEASURES.get(kind, _measure_voc)(cfg, test, found)
    return measured._replace(worth=image_worth(test.dicts, found))


def build_mapper(cfg: CfgNode) -> DatasetMapper:
    """Return Detectron2's mapper of test images.

    It drops annotations, but would ask first how the training set's keypoints are mirrored, and
    those need not be here.
    """
    without = cfg.clone()
    without.defrost()
    without.MODEL.KEYPOINT_ON = False
    return DatasetMapper(without, False)


def find_task(cfg: CfgNode) -> tuple[str, tuple[str, ...]]:
    """Return the task's name, and what is measured of it in COCO's words (none for VOC).

    Raises:
        UserError: the set has no measure here.
    """
    name = cfg.DATASETS.TEST[0]
    kind, year = datasets.evaluator_type(name)
    if kind == datasets.COCO:
        more = (("segm", cfg.MODEL.MASK_ON), ("keypoints", cfg.MODEL.KEYPOINT_ON))
        return "coco", ("bbox", *(word for word, wanted in more if wanted))
    if kind == datasets.LVIS:
        return "lvis", ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    if kind == datasets.CITYSCAPES and cfg.MODEL.MASK_ON:
        return "cityscapes", ("segm",)
    if kind == datasets.CITYSCAPES:
        raise UserError(f"DATASETS.TEST {name}: is measured by masks; set MODEL.MASK_ON True")
    if kind == datasets.VOC:
        return f"voc{year % 100:02d}" if year else "voc", ()
    raise UserError(
        f"DATASETS.TEST {name}: is measured as '{kind}', want a set of COCO, VOC or LVIS"
    )


def check_measurable(cfg: CfgNode, test: datasets.Loaded) -> None:
    """Refuse a test set that has nothing to compare with what the recipe's detector finds.

    Raises:
        UserError: no object has a box, a mask or keypoints.
    """
    entries = [entry for image in test.dicts for entry in image.get("annotations", [])]
    for kind in find_task(cfg)[1] or ("bbox",):
        key = COMPARED[kind]
        if not any(
            _has(e, kind) and not e.get("iscrowd") and not e.get("difficult") for e in entries
        ):
            remedy = "set MODEL.MASK_ON False" if kind == "segm" else "name another set"
            raise UserError(
                f"DATASETS.TEST {cfg.DATASETS.TEST[0]}: no object has a '{key}', so that there is "
                f"nothing to measure; {remedy}"
            )


def _has(entry: Mapping[str, Any], kind: str) -> bool:
    """Tell whether an object has what a kind compares; a keypoint counts if it is labelled."""
    found = entry.get(COMPARED[kind]) or ()
    return any(found[2::3]) if kind == "keypoints" else len(found) > 0


def voc_rule(cfg: CfgNode) -> str:
    """Return how VOC's AP is taken: 11-point, as of a set of 2007 or one's own, or area."""
    if cfg.MOCO.VOC_METRIC != "year":
        return str(cfg.MOCO.VOC_METRIC)
    year = datasets.evaluator_type(cfg.DATASETS.TEST[0])[1]
    return voc_metric.ELEVEN_POINTS if year in (0, 2007) else voc_metric.AREA


def _measure_coco(cfg: CfgNode, test: datasets.Loaded, found: Sequence[Found]) -> Outcome:
    meta = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    truth = json.loads(Path(meta.json_file).read_text(encoding="utf-8"))
    original = {v: k for k, v in meta.thing_dataset_id_to_contiguous_id.items()}
    results = [r | {"category_id": original[r["category_id"]]} for one in found for r in one.json]
    evaluator = coco_metric.choose(cfg.MOCO.COCO_EVALUATOR)
    outcome = Outcome({}, {"evaluator": coco_metric.version(evaluator)}, {}, {})
    per_class: dict[str, dict[str, float]] = {}
    per_size: dict[str, float] = {}
    for kind in find_task(cfg)[1]:
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        measured = coco_metric.measure(truth, results, kind, evaluator, sigmas)
        word = f"coco/{PREFIXES[kind]}"
        numbers = measured.percent(kind)
        outcome.metrics.update({word + part: numbers.pop(part) for part in PARTS})
        per_class |= {f"{word}AP": measured.per_class(), f"{word}AP50": measured.per_class(0.5)}
        per_size |= {word + part: value for part, value in numbers.items()}
        outcome.curves.update({f"{word}AP{at}": measured.curve(at / 100) for at in (50, 75)})
    outcome.details.update(per_class=per_class, per_size_and_recall=per_size)
    return outcome


def _measure_lvis(cfg: CfgNode, test: datasets.Loaded, found: Sequence[Found]) -> Outcome:
    file = Path(MetadataCatalog.get(cfg.DATASETS.TEST[0]).json_file)
    truth = json.loads(file.read_text(encoding="utf-8"))
    original = sorted(category["id"] for category in truth["categories"])
    results = [r | {"category_id": original[r["category_id"]]} for one in found for r in one.json]
    evaluator = coco_metric.choose(cfg.MOCO.COCO_EVALUATOR)
    outcome = Outcome({}, {"evaluator": f"LVIS, {coco_metric.version(evaluator)}"}, {}, {})
    per_class: dict[str, dict[str, float]] = {}
    per_size: dict[str, float] = {}
    for kind in find_task(cfg)[1]:
        measured = lvis_metric.measure(truth, results, kind, evaluator)
        word = f"lvis/{PREFIXES[kind]}"
        for part, value in measured.percent(kind).items():
            (outcome.metrics if part in lvis_metric.HEADLINE else per_size)[word + part] = value
        per_class |= {f"{word}AP": measured.per_class()}
        outcome.curves.update({f"{word}AP{at}": measured.curve(at / 100) for at in (50, 75)})
    outcome.details.update(per_class=per_class, per_size_and_recall=per_size)
    return outcome


def _measure_cityscapes(cfg: CfgNode, test: datasets.Loaded, found: Sequence[Found]) -> Outcome:
    files = {image["image_id"]: Path(image["instance_ids_file"]) for image in test.dicts}
    seen: dict[str, list[cityscapes_metric.Seen]] = {name: [] for name in test.classes}
    for one in found:
        ids = cityscapes_sets.read_ids(files[one.image_id])
        for place, name in enumerate(test.classes):
            own = [entry for entry in one.json if entry["category_id"] == place]
            masks, scores = [e["segmentation"] for e in own], [e["score"] for e in own]
            label = cityscapes_sets.THINGS[place]
            seen[name].append(cityscapes_metric.look(ids, label, masks, scores))
    by_class = {name: cityscapes_metric.curves(images) for name, images in seen.items()}
    lines = {name: own for name, own in by_class.items() if own is not None}
    table = {name: 100 * np.array([one.area() for one in own]) for name, own in lines.items()}
    means = np.mean(list(table.values()), axis=0)
    word = "cityscapes/mask_AP"
    details = {
        "evaluator": "Cityscapes, by its definition",
        "per_class": {
            word: {name: float(values.mean()) for name, values in table.items()},
            f"{word}50": {name: float(values[0]) for name, values in table.items()},
        },
    }
    drawn = {
        f"{word}{at}": np.mean([own[(at - 50) // 5].at(RECALLS) for own in lines.values()], axis=0)
        for at in (50, 75)
    }
    return Outcome({word: float(means.mean()), f"{word}50": float(means[0])}, details, drawn, {})


def _measure_voc(cfg: CfgNode, test: datasets.Loaded, found: Sequence[Found]) -> Outcome:
    task, rule = find_task(cfg)[0], voc_rule(cfg)
    curves = {}
    for place, name in enumerate(test.classes):
        own = voc_metric.curves(*voc_arrays(test.dicts, found, place))
        if own is not None:
            curves[name] = own
    table = {  # (10,) APs of each class
        name: 100 * np.array([voc_metric.average_precision(curve, rule) for curve in own])
        for name, own in curves.items()
    }
    means = np.mean(list(table.values()), axis=0)
    by_iou = dict(zip(voc_metric.IOUS, means.tolist(), strict=True))
    details = {
        "evaluator": f"VOC, {rule}",
        "per_class": {
            f"{task}/AP": {name: float(values.mean()) for name, values in table.items()},
            f"{task}/AP50": {name: float(values[0]) for name, values in table.items()},
        },
    }
    drawn = {
        f"{task}/AP{at}": np.mean(
            [voc_metric.precision_at(own[(at - 50) // 5], RECALLS) for own in curves.values()],
            axis=0,
        )
        for at in (50, 75)
    }
    metrics = {"AP": float(means.mean()), "AP50": by_iou[50], "AP75": by_iou[75]}
    return Outcome({f"{task}/{key}": value for key, value in metrics.items()}, details, drawn, {})


def voc_arrays(
    dicts: Sequence[Mapping[str, Any]], found: Sequence[Found], category: int
) -> tuple[voc_metric.Objects, voc_metric.Detections]:
    """Bring a class's objects and detections into VOC's own pixels, counted from 1."""
    place = {image["image_id"]: i for i, image in enumerate(dicts)}
    true = [
        (i, entry)
        for i, image in enumerate(dicts)
        for entry in image.get("annotations", [])
        if entry["category_id"] == category
    ]
    first = np.array([1, 1, 0, 0])
    objects = voc_metric.Objects(
        image=np.array([i for i, _ in true], np.int64),
        boxes=_corners([entry for _, entry in true]) + first,
        difficult=np.array([bool(entry.get("difficult")) for _, entry in true], bool),
    )
    own = [(place[one.image_id], one, one.classes == category) for one in found]
    own.sort(key=lambda part: part[0])  # as the set lists them, however many processes found them
    detections = voc_metric.Detections(
        image=np.concatenate([np.full(int(k.sum()), i, np.int64) for i, _, k in own]),
        boxes=np.concatenate([one.boxes[k] for _, one, k in own]) + first,
        scores=np.concatenate([one.scores[k] for _, one, k in own]),
    )
    return objects, detections


def image_worth(dicts: Sequence[Mapping[str, Any]], found: Sequence[Found]) -> dict[Any, float]:
    """Return each image's F1 at an IoU of 0.5; images without objects and detections are left out.

    Crowds and difficult objects count neither way.
    """
    by_id = {one.image_id: one for one in found}
    worth = {}
    for image in dicts:
        one = by_id.get(image["image_id"])
        entries = image.get("annotations", [])
        if one is None:
            continue
        kept = one.scores >= SCORE
        hard = np.array([bool(e.get("difficult") or e.get("iscrowd")) for e in entries], bool)
        objects = voc_metric.Objects(
            np.array([e["category_id"] for e in entries], np.int64), _corners(entries), hard
        )
        order = np.argsort(-one.scores[kept], kind="stable")
        classes, boxes = one.classes[kept][order], one.boxes[kept][order]
        # Classes take the part of images: only what is of one class can overlap.
        iou, nearest = voc_metric.best_overlaps(objects, classes, boxes)
        hit = iou > 0.5
        counted = ~(hit & hard[nearest]) if len(entries) else np.ones(len(hit), bool)
        right = len(np.unique(nearest[hit & counted]))
        total = int(counted.sum()) + int((~hard).sum())
        if total:
            worth[image["image_id"]] = 2 * right / total
    return worth


def _corners(entries: Sequence[Mapping[str, Any]]) -> Floats:
    """Return boxes as (N, 4) x0, y0, x1, y1."""
    boxes = [BoxMode.convert(list(e["bbox"]), e["bbox_mode"], BoxMode.XYXY_ABS) for e in entries]
    return np.array(boxes, float).reshape(-1, 4)


class _Collector(DatasetEvaluator):
    """Keeps what was found, unrounded; the main process gets all of it."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def reset(self) -> None:
        self._found: list[Found] = []

    def process(self, inputs: Any, outputs: Any) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            found = output["instances"].to("cpu")
            self._found.append(
                Found(
                    image["image_id"],
                    found.pred_boxes.tensor.double().numpy(),
                    found.scores.double().numpy(),
                    found.pred_classes.numpy(),
                    instances_to_coco_json(found, image["image_id"]) if self._as_json else [],
                )
            )

    def evaluate(self) -> list[Found]:
        parts = comm.gather(self._found, dst=0)
        return [one for part in parts for one in part]


class _Counted:
    """A loader that shows how far it is."""

    def __init__(self, loader: Any, quiet: bool) -> None:
        self._loader, self._quiet = loader, quiet

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return progress(self._loader, len(self), "evaluation", "image", quiet=hidden(self._quiet))


MEASURES = {  # of detections as COCO's results
    datasets.COCO: _measure_coco,
    datasets.LVIS: _measure_lvis,
    datasets.CITYSCAPES: _measure_cityscapes,
}
