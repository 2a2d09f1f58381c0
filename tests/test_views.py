import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from pretrain.config import PretrainConfig
from pretrain.loader import Views, collate, on_device
from pretrain.on_pillow import augment
from pretrain.sources import ImageList
from pretrain.views import (
    AUGMENTATIONS,
    Augmentation,
    augmentation_of,
    crop_box,
    epoch_order,
    generator,
)

OFF = Augmentation(crop_scale=(1.0, 1.0), jitter_p=0, gray_p=0, blur_p=0, flip_p=0)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1))


def drawn(image, **changes):
    settings = {**OFF.__dict__, **changes}
    return [
        np.asarray(augment(image, Augmentation(**settings), 48, random.Random(seed)))
        for seed in range(200)
    ]


def test_with_every_probability_0_only_the_crop_is_left(image):
    # A crop of all of a square image is the image where the drawn aspect ratio allows it.
    for view in drawn(image)[:20]:
        assert view.shape == (48, 48, 3)
    assert any(np.array_equal(view, np.asarray(image)) for view in drawn(image))


@pytest.mark.parametrize(
    ("switch", "happened"),
    [
        ({"gray_p": 1.0}, lambda view, image: np.ptp(view, axis=2).max() == 0),
        ({"flip_p": 1.0}, lambda view, image: np.array_equal(view[:, ::-1], image)),
        ({"blur_p": 1.0, "blur_sigma": (2.0, 2.0)}, lambda view, image: view.std() < image.std()),
        ({"jitter_p": 1.0}, lambda view, image: not np.array_equal(view, image)),
    ],
)
def test_p_1_always_does_it_and_p_0_never(image, switch, happened, monkeypatch):
    monkeypatch.setattr("pretrain.views.crop_box", lambda width, height, *_: (0, 0, height, width))
    whole = np.asarray(image)
    assert all(happened(view, whole) for view in drawn(image, **switch))
    assert all(np.array_equal(view, whole) for view in drawn(image))


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_a_probability_is_a_share(image, p, monkeypatch):
    monkeypatch.setattr("pretrain.views.crop_box", lambda width, height, *_: (0, 0, height, width))
    gray = [np.ptp(view, axis=2).max() == 0 for view in drawn(image, gray_p=p)]
    assert abs(np.mean(gray) - p) < 0.1


def test_v2_is_v1_with_blur_weaker_hue_and_gray_after_the_jitter():
    v1, v2 = AUGMENTATIONS["v1"], AUGMENTATIONS["v2"]
    assert (v1.jitter, v1.jitter_p, v1.gray_first, v1.blur_p) == ((0.4, 0.4, 0.4, 0.4), 1, True, 0)
    assert (v2.jitter, v2.jitter_p, v2.gray_first) == ((0.4, 0.4, 0.4, 0.1), 0.8, False)
    assert (v2.blur_p, v2.blur_sigma) == (0.5, (0.1, 2.0))
    assert v1.crop_scale == v2.crop_scale == (0.2, 1.0)
    assert v1.gray_p == v2.gray_p == 0.2


def test_crops_keep_the_asked_share_of_the_area():
    draw = random.Random(0)
    boxes = [crop_box(100, 80, (0.2, 1.0), draw) for _ in range(2000)]
    assert all(min(y, x) >= 0 and y + h <= 80 and x + w <= 100 for y, x, h, w in boxes)
    areas = np.array([h * w / 8000 for *_, h, w in boxes])
    assert areas.min() > 0.18
    assert areas.max() <= 1
    assert 0.5 < np.mean(areas) < 0.62
    assert min(w / h for *_, h, w in boxes) > 0.7
    assert max(w / h for *_, h, w in boxes) < 1.4


def folder_of(image, folder, count=3):
    (folder / "a").mkdir()
    paths = tuple(folder / "a" / f"{i}.png" for i in range(count))
    for path in paths:
        image.save(path)
    return ImageList(folder, paths, (0,) * count, ("a",))


def test_a_view_depends_on_seed_epoch_image_and_view_alone(image, tmp_path):
    images = folder_of(image, tmp_path)
    views = Views(images, AUGMENTATIONS["v2"], 32, seed=0)
    first = views[0, 0]
    random.seed(5)
    torch.manual_seed(5)
    again = views[0, 0]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    others = [views[1, 0][0], views[0, 1][0], first[1]]
    others.append(Views(images, AUGMENTATIONS["v2"], 32, seed=1)[0, 0][0])
    assert not any(torch.equal(first[0], other) for other in others)


def test_views_are_normalised(tmp_path):
    gray = Image.new("RGB", (32, 32), (124, 116, 104))  # ImageNet's mean, nearly
    batch = collate([Views(folder_of(gray, tmp_path), OFF, 32, seed=0)[0, 0]])
    assert batch[0].dtype is torch.uint8
    view = on_device(batch, torch.device("cpu"), 32)[0]
    assert view.shape == (1, 3, 32, 32)
    assert view.abs().max() < 0.02


def test_an_epochs_order_is_a_permutation_of_its_own():
    first, second = epoch_order(50, 0, 0), epoch_order(50, 0, 1)
    assert sorted(first.tolist()) == list(range(50))
    assert torch.equal(first, epoch_order(50, 0, 0))
    assert not torch.equal(first, second)
    assert not torch.equal(first, epoch_order(50, 1, 0))


def test_generators_of_other_words_are_others():
    draws = {float(torch.rand(1, generator=generator(0, "shuffle", step))) for step in range(100)}
    assert len(draws) == 100


def test_randaugment_comes_beside_the_recipe_and_from_the_views_own_numbers(image, tmp_path):
    strong = replace(OFF, randaugment=(2, 9))
    changed = [not np.array_equal(view, plain) for view, plain in zip(
        drawn(image, randaugment=(2, 9)), drawn(image), strict=True)]  # fmt: skip
    assert np.mean(changed) > 0.5
    images = folder_of(image, tmp_path)
    views = Views(images, strong, 32, seed=0)
    first, state = views[0, 0], torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone
    torch.manual_seed(5)
    again = views[0, 0]
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])


def test_every_backend_that_has_randaugment_draws_the_same(image, tmp_path):
    images = folder_of(image, tmp_path)
    strong = replace(OFF, randaugment=(2, 9))
    made = [Views(images, strong, 32, 0, backend=name)[0, 0][0] for name in ("pillow", "opencv")]
    assert (made[0].int() - made[1].int()).abs().float().mean() < 2


def test_a_config_says_what_its_views_draw():
    config = PretrainConfig(augmentation="v2", crop_scale=(0.3, 0.9), randaugment=(2, 9))
    wanted = replace(AUGMENTATIONS["v2"], crop_scale=(0.3, 0.9), randaugment=(2, 9))
    assert augmentation_of(config) == wanted
