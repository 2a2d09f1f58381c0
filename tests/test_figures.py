"""The embedded figures: their keypoints lie where the joints are drawn, and nothing is shared."""

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain import embedded, figures
from pretrain.figures import COVERED, KEYPOINTS, RECIPE, UNLABELLED, VISIBLE, Picture

FEW = replace(RECIPE, train_images=30, val_images=10)


@pytest.fixture(scope="module")
def pictures() -> dict[str, list[Picture]]:
    photos = embedded.load_sources().photos
    return {split: figures.make_pictures(photos, split, FEW) for split in embedded.SPLITS}


@pytest.fixture(scope="module")
def root() -> Path:
    return figures.figures_root()


def content(root: Path, split: str) -> dict:
    file = root / "annotations" / f"person_keypoints_{split}2017.json"
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_keypoints_are_cocos_in_cocos_order() -> None:
    names = pytest.importorskip("detectron2.data.datasets.builtin_meta")
    assert list(names.COCO_PERSON_KEYPOINT_NAMES) == list(KEYPOINTS)


def test_a_visible_keypoint_lies_on_its_figure_and_a_covered_one_on_another(pictures) -> None:
    words = Counter()
    for picture in (one for part in pictures.values() for one in part):
        for place, figure in enumerate(picture.figures):
            later = np.any([f.mask for f in picture.figures[place + 1 :]], axis=0)
            for x, y, word in np.reshape(figure.keypoints(), (-1, 3)):
                words[word] += 1
                if word == UNLABELLED:
                    assert (x, y) == (0, 0)
                else:
                    assert figure.mask[y, x] == (word == VISIBLE)
                    assert (word == VISIBLE) or later[y, x]
    assert min(words[w] for w in (VISIBLE, COVERED, UNLABELLED)) > 20


def test_a_figures_left_is_on_the_images_right_of_its_own_axis(pictures) -> None:
    """From the hips upward; so a mirrored image, its sides exchanged, is such a figure too."""
    for figure in (f for part in pictures.values() for one in part for f in one.figures):
        at = dict(zip(KEYPOINTS, figure.points, strict=True))
        for part in ("eye", "ear", "shoulder", "hip"):
            assert at[f"left_{part}"][0] > at[f"right_{part}"][0]
        assert at["nose"][1] < at["left_hip"][1]


def test_no_figure_is_hidden_too_far_and_no_two_share_a_pixel(pictures) -> None:
    counts = Counter()
    for picture in (one for part in pictures.values() for one in part):
        counts[len(picture.figures)] += 1
        assert np.sum([figure.mask for figure in picture.figures], axis=0).max() == 1
        for one, other in combinations([figure.box for figure in picture.figures], 2):
            assert embedded.box_iou(one, other) < RECIPE.box_iou
    assert set(counts) == {1, 2, 3}


def test_a_figure_is_drawn_where_its_mask_is(pictures) -> None:
    """Edges are stronger on its outline than four pixels beside it."""
    inner, outer = [], []
    for picture in pictures["train"]:
        grey = picture.image.astype(float).mean(axis=2)
        steps = np.abs(np.diff(grey, axis=1))
        whole = np.any([figure.mask for figure in picture.figures], axis=0)
        border = whole[:, 1:] != whole[:, :-1]
        inner.append(steps[border].mean())
        outer.append(steps[np.roll(border, 4, axis=1)].mean())
    assert np.mean(inner) > 2 * np.mean(outer)


def test_the_files_are_cocos_own_layout_and_hold_what_was_drawn(root, pictures) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    ids = {}
    for split, count in (("train", RECIPE.train_images), ("val", RECIPE.val_images)):
        api = coco.COCO(root / "annotations" / f"person_keypoints_{split}2017.json")
        assert len(api.getImgIds()) == count
        ids[split] = set(api.getImgIds())
        (category,) = api.loadCats(api.getCatIds())
        assert category["keypoints"] == list(KEYPOINTS)
        entries = api.loadAnns(api.getAnnIds())
        assert min(entry["id"] for entry in entries) > 0
        for entry in entries:
            assert entry["num_keypoints"] == sum(v > 0 for v in entry["keypoints"][2::3]) > 0
            assert entry["area"] == api.annToMask(entry).sum()
        files = {path.name for path in (root / f"{split}2017").iterdir()}
        assert files == {image["file_name"] for image in api.loadImgs(api.getImgIds())}
    assert not ids["train"] & ids["val"]
    first = pictures["train"][0]
    own = [e for e in content(root, "train")["annotations"] if e["image_id"] == first.image_id]
    assert [e["keypoints"] for e in own] == [figure.keypoints() for figure in first.figures]
    with Image.open(root / "train2017" / "000000000001.jpg") as image:
        assert np.abs(np.asarray(image).astype(int) - first.image).mean() < 4


def test_an_image_is_the_same_whatever_was_drawn_before_it(pictures) -> None:
    photos = embedded.load_sources().photos
    again = figures.make_pictures(photos, "val", replace(FEW, val_images=3))
    for one, other in zip(pictures["val"], again, strict=False):
        assert np.array_equal(one.image, other.image)


def test_the_cache_folder_changes_with_recipe_and_code(tmp_path) -> None:
    code = tmp_path / "code.py"
    code.write_text("one")
    hashes = {embedded.content_hash(1, code), embedded.content_hash(2, code)}
    code.write_text("two")
    hashes.add(embedded.content_hash(1, code))
    assert len(hashes) == 3
