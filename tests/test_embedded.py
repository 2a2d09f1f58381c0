import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert import files
from convert.errors import UserError
from pretrain import embedded
from pretrain.embedded import RECIPE, SPLITS, Recipe, Scenes, Sources

# pycocotools 2.0.11 hands NumPy 2 an array in a way that it calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from pretrain.embedded import embedded_root; print(embedded_root())"
FEW = replace(RECIPE, train_scenes=40, val_scenes=20)


@pytest.fixture(scope="module")
def sources() -> Sources:
    return embedded.load_sources()


@pytest.fixture(scope="module")
def scenes(sources: Sources) -> Scenes:
    return {split: embedded.make_scenes(sources, split, FEW) for split in SPLITS}


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """Two processes that start at once on an empty cache: the cache, their stdouts and stderrs."""
    cache = tmp_path_factory.mktemp("cache")
    env = os.environ | {"MOCO_TRANSFER_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    runners = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    outputs = [runner.communicate(timeout=300) for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], outputs
    return cache, [out for out, _ in outputs], [err for _, err in outputs]


@pytest.fixture(scope="module")
def root(race: tuple[Path, list[str], list[str]]) -> Path:
    return Path(race[1][0].strip())


def coco_api(root: Path, split: str):
    coco = pytest.importorskip("pycocotools.coco")
    return coco.COCO(root / "coco" / "annotations" / f"instances_{split}2017.json")


# --- the cache ------------------------------------------------------------------------------------


def test_two_processes_at_once_leave_one_whole_set_and_nothing_else(race):
    cache, outs, errs = race
    assert outs[0] == outs[1]
    assert [str(path) for path in cache.iterdir()] == [outs[0].strip()]
    for err in errs:  # both start on an empty cache, so both build and each says so once
        assert err.splitlines() == [f"embedded set: building in {outs[0].strip()}"]


def test_a_built_set_is_returned_silently_and_untouched(race, root, monkeypatch, capsys):
    monkeypatch.setenv("MOCO_TRANSFER_CACHE", str(race[0]))
    before = root.stat().st_mtime_ns
    assert embedded.embedded_root() == root
    assert root.stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""


@pytest.mark.long
def test_another_process_builds_the_same_bytes(root, sources, tmp_path):
    embedded.build(tmp_path, sources, RECIPE)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    there = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert names == there
    assert [n for n in names if (tmp_path / n).read_bytes() != (root / n).read_bytes()] == []


def test_a_lost_race_keeps_the_winners_set(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCO_TRANSFER_CACHE", str(tmp_path))
    winner = tmp_path / f"embedded-{embedded.recipe_hash(RECIPE)}"

    def lose(folder: Path, *_: object) -> None:
        for made in (folder, winner):
            made.mkdir()
            (made / "whose").write_text(made.name)

    monkeypatch.setattr(embedded, "build", lose)
    assert embedded.embedded_root() == winner
    assert (winner / "whose").read_text() == winner.name
    assert list(tmp_path.iterdir()) == [winner]


@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_build_that_is_cut_leaves_nothing(tmp_path, monkeypatch, reason):
    monkeypatch.setenv("MOCO_TRANSFER_CACHE", str(tmp_path))

    def cut(folder: Path, *_: object) -> None:
        folder.mkdir()
        (folder / "half").write_text("half")
        raise reason

    monkeypatch.setattr(embedded, "build", cut)
    with pytest.raises((KeyboardInterrupt, UserError)):
        embedded.embedded_root()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line_that_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MOCO_TRANSFER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError) as caught:
        embedded.embedded_root()
    assert str(caught.value) == (
        f"cache folder {tmp_path}/file/cache: cannot be written (Not a directory); "
        "name another one in the environment variable MOCO_TRANSFER_CACHE"
    )


def test_the_cache_is_the_variable_then_xdg_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("MOCO_TRANSFER_CACHE", "~/own")
    assert files.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("MOCO_TRANSFER_CACHE")
    assert files.cache_folder() == Path("/xdg/moco-transfer")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert files.cache_folder() == tmp_path / ".cache/moco-transfer"


def test_a_changed_recipe_never_meets_an_old_cache():
    hashes = {embedded.recipe_hash(r) for r in (RECIPE, Recipe(seed=1), Recipe(scene_side=96))}
    assert len(hashes) == 3
    assert embedded.recipe_hash(Recipe()) == embedded.recipe_hash(RECIPE)


# --- what is disjoint -----------------------------------------------------------------------------


def test_train_and_validation_share_no_digit_and_no_scan(sources):
    places = embedded.split_digits(sources.values, RECIPE)
    assert sorted(places["train"] + places["val"]) == list(range(1797))
    train, val = ({sources.scans[i].tobytes() for i in places[split]} for split in SPLITS)
    assert not train & val


def test_each_value_is_split_in_the_same_proportion(sources):
    places = embedded.split_digits(sources.values, RECIPE)
    for value, count in Counter(sources.values.tolist()).items():
        val = sum(sources.values[i] == value for i in places["val"])
        assert abs(val - 0.25 * count) <= 0.5


def test_train_and_validation_share_no_pixel_of_a_photograph(sources):
    numbered = [np.arange(p[..., 0].size).reshape(p.shape[:2]) for p in sources.photos]
    for photo in numbered:
        parts = {split: embedded.split_photos([photo], split, RECIPE) for split in SPLITS}
        train, val = ({int(n) for part in parts[s] for n in part.ravel()} for s in SPLITS)
        assert not train & val
        assert len(train) + len(val) == photo.size
        assert 0.2 < len(val) / photo.size < 0.4


def test_a_scene_holds_digits_of_its_own_split_once_each(sources, scenes):
    places = embedded.split_digits(sources.values, RECIPE)
    for split, part in scenes.items():
        for scene in part:
            indices = [digit.index for digit in scene.digits]
            assert set(indices) <= set(places[split])
            assert len(set(indices)) == len(indices)
            assert [d.value for d in scene.digits] == sources.values[indices].tolist()


# --- what a scene holds ---------------------------------------------------------------------------


def test_scenes_are_as_full_and_as_crowded_as_the_recipe_says(scenes):
    counts, extents = Counter(), []
    for scene in [*scenes["train"], *scenes["val"]]:
        counts[len(scene.digits)] += 1
        for one, other in combinations([digit.box for digit in scene.digits], 2):
            assert embedded.box_iou(one, other) < RECIPE.box_iou
        extents += [max(digit.box[2:]) for digit in scene.digits]
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    assert min(extents) < 20
    assert 45 < max(extents) <= 56


@pytest.mark.parametrize(
    ("size_before", "hidden_too_far"), [(100, False), (133, False), (134, True)]
)
def test_a_quarter_of_a_digit_may_be_covered_and_no_more(size_before, hidden_too_far):
    digit = embedded.Digit(7, 0, np.ones((10, 10), bool))
    assert embedded.crowded([digit], [size_before], RECIPE) is hidden_too_far


def test_later_digits_cover_earlier_ones(scenes):
    for scene in [*scenes["train"], *scenes["val"]]:
        masks = np.stack([digit.mask for digit in scene.digits])
        assert masks.sum(axis=0).max() == 1


def test_every_digit_stands_out_from_its_surroundings(sources, scenes):
    """Ink and the ring around it differ in luma for nearly all digits."""
    from scipy import ndimage

    contrasts = []
    for scene in scenes["train"]:
        luma = scene.image / np.float32(255) @ embedded.LUMA
        taken = np.any([digit.mask for digit in scene.digits], axis=0)
        for digit in scene.digits:
            ring = ndimage.binary_dilation(digit.mask, iterations=4) & ~taken
            contrasts.append(abs(luma[digit.mask].mean() - luma[ring].mean()))
    assert np.quantile(contrasts, 0.05) > 0.2


def test_an_image_does_not_depend_on_how_many_there_are(sources, scenes):
    alone = embedded.make_scenes(sources, "train", replace(RECIPE, train_scenes=1))[0]
    assert np.array_equal(alone.image, scenes["train"][0].image)


@pytest.mark.parametrize(
    ("drawing", "pieces"),
    [
        ("#", 1),
        ("##.\n.##", 1),
        ("#.\n.#", 2),  # touching by a corner only
        ("###\n#.#\n###", 2),  # a ring, cut where its hole begins
        ("###\n#.#\n##.", 1),  # a hole that leaks by a corner is none
        ("#####\n#.#.#\n#####", 3),
    ],
)
def test_outlines_go_around_each_piece_exactly(drawing, pieces):
    mask = np.array([[letter == "#" for letter in row] for row in drawing.splitlines()])
    polygons = embedded.outline(mask)
    assert len(polygons) == pieces
    assert sum(shoelace(polygon) for polygon in polygons) == mask.sum()


def shoelace(polygon: list[int]) -> float:
    x, y = np.array(polygon).reshape(-1, 2).T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def test_any_mask_comes_back_from_its_outlines():
    api = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(300):
        mask = rng.random(rng.integers(1, 10, size=2)) < rng.uniform(0.2, 0.9)
        mask[0, 0] = True
        rle = api.merge(api.frPyObjects(embedded.outline(mask), *mask.shape))
        assert np.array_equal(api.decode(rle), mask)


# --- the layouts ----------------------------------------------------------------------------------


def test_image_folder_holds_every_digit_once(root, sources):
    from torchvision.datasets import ImageFolder

    for split, count in (("train", 1347), ("val", 450)):
        folder = ImageFolder(root / "digits" / split)
        assert folder.classes == [str(value) for value in range(10)]
        assert len(folder) == count
        for path, label in folder.samples:
            assert sources.values[int(Path(path).stem)] == label
    with Image.open(path) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_coco_loads_and_is_whole(root):
    first_ids = {}
    for split, count in (("train", 240), ("val", 60)):
        api = coco_api(root, split)
        images = api.loadImgs(api.getImgIds())
        annotations = api.loadAnns(api.getAnnIds())
        assert len(images) == count
        assert [c["name"] for c in api.loadCats(api.getCatIds())] == ["digit"]
        assert {a["value"] for a in annotations} == set(range(10))
        assert {a["iscrowd"] for a in annotations} == {0}
        assert len({a["id"] for a in annotations}) == len(annotations)
        assert min(a["id"] for a in annotations) > 0
        files = {path.name for path in (root / "coco" / f"{split}2017").iterdir()}
        assert files == {image["file_name"] for image in images}
        first_ids[split] = {image["id"] for image in images}
    assert not first_ids["train"] & first_ids["val"]


def test_coco_polygons_rasterise_to_the_very_masks(root, sources):
    api = coco_api(root, "val")
    for scene in embedded.make_scenes(sources, "val", RECIPE):
        annotations = api.loadAnns(api.getAnnIds(imgIds=[scene.image_id]))
        assert len(annotations) == len(scene.digits)
        for digit, annotation in zip(scene.digits, annotations, strict=True):
            mask = api.annToMask(annotation).astype(bool)
            assert np.array_equal(mask, digit.mask)
            assert annotation["area"] == mask.sum()
            assert tuple(annotation["bbox"]) == embedded.tight_box(mask)


def test_a_mask_fits_its_ink_better_than_when_shifted_by_a_pixel(root):
    api = coco_api(root, "val")
    fits = []
    for annotation in api.loadAnns(api.getAnnIds()):
        name = api.loadImgs([annotation["image_id"]])[0]["file_name"]
        with Image.open(root / "coco/val2017" / name) as image:
            pixels = np.asarray(image).astype(float)
        mask = api.annToMask(annotation).astype(bool)
        shifted = [np.roll(mask, by, axis) for by in (-1, 1) for axis in (0, 1)]
        fits.append(all(spread(pixels[mask]) < spread(pixels[other]) for other in shifted))
    assert np.mean(fits) > 0.97


def spread(colours: np.ndarray) -> float:
    """Mean distance of (N, 3) colours from their median: small where all of it is one ink."""
    return float(np.abs(colours - np.median(colours, axis=0)).mean())


def test_voc_boxes_are_cocos_counted_from_one(root):
    folder = root / "VOC2007"
    for split, listing in (("train", "trainval"), ("val", "test")):
        api = coco_api(root, split)
        names = (folder / "ImageSets/Main" / f"{listing}.txt").read_text().split()
        assert [int(name) for name in names] == api.getImgIds()
        for name in names:
            tree = ET.parse(folder / "Annotations" / f"{name}.xml").getroot()
            assert tree.findtext("filename") == f"{name}.jpg"
            assert [int(side.text) for side in tree.find("size")] == [128, 128, 3]
            annotations = api.loadAnns(api.getAnnIds(imgIds=[int(name)]))
            objects = tree.findall("object")
            assert len(objects) == len(annotations)
            for entry, annotation in zip(objects, annotations, strict=True):
                assert entry.findtext("name") == "digit"
                assert entry.findtext("difficult") == entry.findtext("truncated") == "0"
                assert int(entry.findtext("value")) == annotation["value"]
                left, top, right, bottom = (int(side.text) for side in entry.find("bndbox"))
                assert 1 <= left <= right <= 128
                assert 1 <= top <= bottom <= 128
                box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
                assert box == annotation["bbox"]


def test_voc_and_coco_show_the_same_pictures(root):
    pictures = {int(path.stem): path for path in (root / "VOC2007/JPEGImages").iterdir()}
    assert len(pictures) == 300
    for split in SPLITS:
        for path in (root / "coco" / f"{split}2017").iterdir():
            assert path.read_bytes() == pictures.pop(int(path.stem)).read_bytes()
    assert not pictures
