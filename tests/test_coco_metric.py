"""COCO's measure: numbers worked out by hand, and two evaluators that agree to the last bit."""

import importlib.util
import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pycocotools")

from pycocotools import mask as rle

from convert.errors import UserError
from convert.files import ROOT
from transfer.detection import coco_metric
from transfer.detection.coco_metric import FAST, RECORD

SHARED = ROOT.parent / "shared" / "data" / "coco_mini" / "annotations"
HAS_FAST = importlib.util.find_spec("faster_coco_eval") is not None
needs_fast = pytest.mark.skipif(not HAS_FAST, reason="needs faster-coco-eval")
BOTH = [RECORD, pytest.param(FAST, marks=needs_fast)]
SIGMAS = np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 1000


def content(annotations: list[dict[str, Any]], images: int = 3, classes: int = 1) -> dict[str, Any]:
    return {
        "images": [{"id": i, "width": 200, "height": 200} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, classes + 1)],
    }


def box(image: int, corner_and_size: list[float], score: float | None = None, **more: Any):
    entry = {"image_id": image, "category_id": 1, "bbox": corner_and_size, **more}
    return entry | ({} if score is None else {"score": score})


# To find: one object in image 1 and one in image 2; a crowd in image 1; image 3 is empty.
TRUTH = content(
    [
        box(1, [10, 10, 20, 20], id=0, area=400, iscrowd=0),  # an id of 0 must not mean "missed"
        box(1, [100, 100, 50, 50], id=1, area=2500, iscrowd=1),
        box(2, [10, 10, 20, 20], id=2, area=400, iscrowd=0),
    ]
)
FOUND = [
    box(1, [10, 10, 20, 20], 0.9),  # right
    box(1, [10, 10, 20, 20], 0.8),  # a duplicate: wrong
    box(1, [110, 110, 20, 20], 0.7),  # inside the crowd: not counted
    box(2, [10, 10, 0, 0], 0.6),  # no area: wrong
    box(2, [10, 10, 20, 13.5], 0.5),  # IoU 0.675: right at .5, .55, .6, .65
    box(3, [0, 0, 10, 10], 0.4),  # wrong, after the last object was found
]


@pytest.mark.parametrize("evaluator", BOTH)
def test_known_numbers(evaluator) -> None:
    """Precision 1 at the 51 recalls to .5; 2 of the 4 that count at the 50 above, or nothing."""
    numbers = coco_metric.measure(TRUTH, FOUND, "bbox", evaluator).percent("bbox")
    low, high = (51 + 50 * 0.5) / 101, 51 / 101
    assert numbers["AP50"] == pytest.approx(100 * low, abs=1e-12)
    assert numbers["AP75"] == pytest.approx(100 * high, abs=1e-12)
    assert numbers["AP"] == pytest.approx(10 * (4 * low + 6 * high), abs=1e-12)
    assert numbers["APs"] == numbers["AP"]  # 400 pixels are small
    assert "APl" not in numbers  # there is no large object: undefined, and no zero
    assert numbers["AR1"] == pytest.approx(50)  # in image 2 the first one is the zero-area box


@pytest.mark.parametrize("evaluator", BOTH)
def test_a_class_has_its_own_number_and_one_without_objects_has_none(evaluator) -> None:
    truth = TRUTH | {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}
    measured = coco_metric.measure(truth, FOUND, "bbox", evaluator)
    assert list(measured.per_class()) == ["cat"]
    assert measured.per_class()["cat"] == pytest.approx(measured.percent("bbox")["AP"])
    assert measured.per_class(0.75)["cat"] == pytest.approx(100 * 51 / 101)
    curve = measured.curve(0.5)
    assert curve.tolist() == [1.0] * 51 + [0.5] * 50


@pytest.mark.parametrize("evaluator", BOTH)
def test_known_keypoint_numbers(evaluator) -> None:
    """Someone found exactly, someone found a little to the right, someone without keypoints."""
    shift, area = 4.0, 2000.0
    points = np.column_stack([np.arange(17) + 20.0, np.arange(17) + 30.0, np.full(17, 2.0)])
    moved = points + np.array([shift, 0, 0])
    persons = [
        {"keypoints": points.ravel().tolist(), "num_keypoints": 17},
        {"keypoints": points.ravel().tolist(), "num_keypoints": 17},
        {"keypoints": [0.0] * 51, "num_keypoints": 0},
    ]
    truth = content(
        [
            box(i, [20, 30, 40, 50], id=i, area=area, iscrowd=0, **person)
            for i, person in enumerate(persons, start=1)
        ]
    )
    found = [
        {"image_id": 1, "category_id": 1, "score": 0.9, "keypoints": points.ravel().tolist()},
        {"image_id": 2, "category_id": 1, "score": 0.8, "keypoints": moved.ravel().tolist()},
    ]
    # cocodataset.org, keypoints-eval: OKS is the mean of exp(-d^2 / (2 s^2 k^2)), k = 2 sigma.
    likeness = np.exp(-(shift**2) / (2 * area * (2 * SIGMAS) ** 2)).mean()
    passed = int((likeness >= np.arange(50, 100, 5) / 100).sum())
    assert 0 < passed < 10
    numbers = coco_metric.measure(truth, found, "keypoints", evaluator).percent("keypoints")
    whole, half = 1.0, 51 / 101
    assert numbers["AP"] == pytest.approx(10 * (passed * whole + (10 - passed) * half), abs=1e-12)
    assert numbers["AP50"] == pytest.approx(100)


@pytest.mark.parametrize("evaluator", BOTH)
def test_nothing_found_is_worth_nothing(evaluator) -> None:
    numbers = coco_metric.measure(TRUTH, [], "bbox", evaluator).percent("bbox")
    assert numbers["AP"] == numbers["AP50"] == numbers["AR100"] == 0


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_pycocotools_itself_says_the_same(kind) -> None:
    """What is done to its precision moves no number by more than a rounding."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = random_sets(kind, seed=3)
    if kind == "segm":  # as Detectron2 has it: a mask's area is not its box's
        found = [{k: v for k, v in one.items() if k != "bbox"} for one in found]
    known = COCO()
    known.dataset = truth
    known.createIndex()
    judged = COCOeval(known, known.loadRes([dict(one) for one in found]), kind)
    for step in (judged.evaluate, judged.accumulate, judged.summarize):
        step()
    ours = coco_metric.measure(truth, found, kind, RECORD)
    assert ours.stats == pytest.approx(judged.stats, abs=1e-15)


@needs_fast
@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_number_of_the_fast_evaluator_is_that_of_the_record(kind, seed) -> None:
    truth, found = random_sets(kind, seed)
    assert any(entry["iscrowd"] for entry in truth["annotations"])
    same(truth, found, kind)


@needs_fast
@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder of small photo sets")
@pytest.mark.parametrize(
    ("kind", "file"),
    [("bbox", "instances"), ("segm", "instances"), ("keypoints", "person_keypoints")],
)
def test_every_number_is_equal_on_photographs_of_coco(kind, file) -> None:
    truth = json.loads((SHARED / f"{file}_val2017.json").read_text(encoding="utf-8"))
    same(truth, perturbed(truth, kind, np.random.default_rng(0)), kind)


def same(truth: dict[str, Any], found: list[dict[str, Any]], kind: str) -> None:
    one, other = (coco_metric.measure(truth, found, kind, e) for e in (RECORD, FAST))
    assert 0.05 < one.stats[0] < 0.95
    for name in ("stats", "precision", "recall"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert np.array_equal(ours, theirs), f"{name}: {np.abs(ours - theirs).max()}"
    assert one.classes == other.classes
    assert one.percent(kind) == other.percent(kind)


def random_sets(kind: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Twelve images of three classes: crowds, empty images, crowded ones, equal scores."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(1, 13):
        for _ in range(rng.integers(0, 7) if image % 4 else 0):
            x, y = rng.integers(0, 120, 2).tolist()
            w, h = rng.integers(4, 79, 2).tolist()
            crowd = int(rng.random() < 0.25)
            points = np.column_stack([rng.uniform(x, x + w, 17), rng.uniform(y, y + h, 17)])
            seen = rng.integers(0, 3, 17) * (rng.random() < 0.8)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "iscrowd": crowd,
                    "category_id": 1 if kind == "keypoints" else int(rng.integers(1, 4)),
                    "bbox": [x, y, w, h],
                    "area": float(w * h),
                    "segmentation": region(x, y, w, h),
                    "keypoints": np.column_stack([points.round(), seen]).ravel().tolist(),
                    "num_keypoints": int((seen > 0).sum()),
                }
            )
    truth = content(annotations, images=12, classes=1 if kind == "keypoints" else 3)
    found = perturbed(truth, kind, rng)
    if kind != "keypoints":  # more than the hundred that count
        crowded = [box(1, [*rng.uniform(0, 99, 4)], float(rng.random())) for _ in range(130)]
        found += [one | {"segmentation": region(*map(int, one["bbox"]))} for one in crowded]
    return truth, found


def region(x: int, y: int, w: int, h: int) -> dict[str, Any]:
    mask = np.zeros((200, 200), np.uint8, order="F")
    mask[max(0, y) : y + h, max(0, x) : x + w] = 1
    encoded = rle.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def perturbed(truth: dict[str, Any], kind: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Detections: each object up to three times, nearly right or badly, in float32 as models do."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    classes = [category["id"] for category in truth["categories"]]
    found = []
    for entry in truth["annotations"]:
        for _ in range(rng.integers(0, 4)):
            spread = rng.choice([0.02, 0.1, 0.3])
            x, y, w, h = entry["bbox"]
            noise = rng.normal(size=4) * spread
            moved = [x + noise[0] * w, y + noise[1] * h, w * np.exp(noise[2]), h * np.exp(noise[3])]
            one = {
                "image_id": entry["image_id"],
                "category_id": int(rng.choice(classes))
                if rng.random() < 0.1
                else entry["category_id"],
                "score": float(np.float32(rng.random().__round__(2))),  # many are equal
                "bbox": np.float32(moved).astype(float).tolist(),
            }
            if kind == "segm":
                one["segmentation"] = _moved_mask(entry, sizes[entry["image_id"]], rng)
            if kind == "keypoints":
                points = np.reshape(entry["keypoints"], (-1, 3)).astype(float)
                points[:, :2] += rng.normal(size=(len(points), 2)) * spread * w * 0.3
                one["keypoints"] = np.float32(points).astype(float).ravel().tolist()
            found.append(one)
    return found


def _moved_mask(entry: dict[str, Any], size: tuple[int, int], rng: np.random.Generator) -> Any:
    outline = entry["segmentation"]
    if isinstance(outline, list):
        outline = rle.merge(rle.frPyObjects(outline, *size))
    elif isinstance(outline["counts"], list):
        outline = rle.frPyObjects(outline, *size)
    mask = np.roll(rle.decode(outline), rng.integers(-8, 9, 2).tolist(), (0, 1))
    encoded = rle.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def test_the_fast_evaluator_runs_where_it_is_installed_and_can_be_refused(monkeypatch) -> None:
    monkeypatch.setattr(coco_metric.importlib.util, "find_spec", lambda name: None)
    assert coco_metric.choose("auto") == RECORD
    with pytest.raises(UserError, match="is not installed: pip install faster-coco-eval"):
        coco_metric.choose(FAST)
    monkeypatch.setattr(coco_metric.importlib.util, "find_spec", lambda name: object())
    assert coco_metric.choose("auto") == coco_metric.choose(FAST) == FAST
    assert coco_metric.choose(RECORD) == RECORD
    with pytest.raises(UserError, match="want auto or pycocotools or faster-coco-eval"):
        coco_metric.choose("faster")


def test_annotations_that_lack_what_is_compared_are_refused() -> None:
    with pytest.raises(UserError, match="annotation 0: has no 'keypoints'; keypoints wants one"):
        coco_metric.measure(TRUTH, FOUND, "keypoints", RECORD)


def test_own_annotations_need_neither_iscrowd_nor_area() -> None:
    bare = [
        {k: v for k, v in a.items() if k not in ("iscrowd", "area")} for a in TRUTH["annotations"]
    ]
    measured = coco_metric.measure(content([bare[0], bare[2]]), FOUND, "bbox", RECORD)
    assert measured.percent("bbox")["APs"] > 0
