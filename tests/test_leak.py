import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from convert.errors import UserError
from pretrain.checks import check
from pretrain.config import PretrainConfig
from pretrain.contrast import Contrast
from pretrain.leak import found_percent, measure
from pretrain.loader import collate, on_device
from pretrain.loop import Run, train
from pretrain.monitor import read_log
from pretrain.sources import image_folder
from tests.test_main_moco import assert_equal_files, pictures, small_config  # noqa: F401


def rows(*degrees):
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_a_query_is_held_against_the_keys_of_other_batches_only():
    q = rows(0, 10, 90, 100)
    k = rows(10, 0, 90, 95)  # the first batch's keys are mixed up, which does not count
    assert found_percent(q, k, 2, 1) == 100
    assert found_percent(q, k, 1, 3) == 50  # every image its own batch: the first two are wrong
    assert found_percent(q, k, 1, 1) == 75  # against the next one's only
    assert found_percent(q, rows(10, -75, 90, 95), 2, 9) == 75


class Signed(Contrast):
    """An encoder that looks at no image: it writes its group's mean brightness into a direction."""

    def encode(self, encoder, images):
        means = [group.mean().expand(len(group)) for group in images.chunk(self.groups)]
        angle = 40 * torch.cat(means)
        return torch.stack([angle.cos(), angle.sin()], dim=1)


class Honest(Contrast):
    """An encoder that looks at each image alone."""

    def encode(self, encoder, images):
        return nn.functional.normalize(images.flatten(1) - images.flatten(1).mean(), dim=1)


class Images(torch.utils.data.Dataset):
    """Two views of random images as bytes, the second a little changed."""

    size = 8

    def __init__(self, count=64):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        _, index = item
        draw = torch.Generator().manual_seed(index)
        image = torch.randint(0, 255, (3, 8, 8), generator=draw, dtype=torch.uint8)
        return [image, image + (image == 7)]


def test_it_tells_who_looks_at_the_batch_from_who_looks_at_the_image():
    config = PretrainConfig(arch="resnet18", device="cpu", channels_last=False)
    signed, honest = (kind(config, images=64, groups=1) for kind in (Signed, Honest))
    cheat = measure(signed, Images(), 8, 8, seed=0)
    assert cheat["leak_same"] > 90
    assert cheat["leak_shuffled"] == cheat["leak_same"]  # within a pass nothing is hidden
    assert cheat["leak_apart"] < 20
    assert set(measure(honest, Images(), 8, 8, seed=0).values()) == {100}


@pytest.mark.parametrize(("groups", "count"), [(4, 32), (1, 8)], ids=["groups", "passes"])
def test_a_batch_of_several_groups_hides_what_each_would_tell(groups, count):
    config = PretrainConfig(arch="resnet18", device="cpu", channels_last=False)
    found = measure(Signed(config, images=64, groups=groups), Images(512), count, 32, seed=0)
    assert found["leak_same"] > 90
    assert found["leak_shuffled"] < 30 > found["leak_apart"]


def test_measuring_changes_no_bit_of_the_training(pictures, tmp_path):  # noqa: F811
    images = image_folder(pictures / "train")
    config = small_config(pictures, epochs=2)
    files = [
        train(replace(config, leak_meter=on), images, tmp_path / str(on), quiet=True)
        for on in (False, True)
    ]
    lines = [line for line in read_log(tmp_path / "True") if "leak_same" in line]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert all(0 <= line["leak_apart"] <= 100 for line in lines)
    for path in files:
        content = torch.load(path, weights_only=True)
        content["moco_transfer"].pop("config")
        torch.save(content, path)
    assert_equal_files(*files)


def test_one_group_shuffled_in_itself_hides_nothing_and_the_pool_does(pictures, tmp_path):  # noqa: F811
    config = small_config(pictures, bn_groups=1, leak=True)
    run = Run(config, image_folder(pictures / "train"), tmp_path, None)
    batch = collate([run._views()[0, index] for index in range(32)])
    views = on_device(batch, run.device, config.image_size)[0]
    order = torch.randperm(16)
    with torch.no_grad():
        whole = run.model.encode(run.model.encoder_k, views[:16])
        inside = run.model.encode(run.model.encoder_k, views[:16][order])[order.argsort()]
        beside = run.model.encode(run.model.encoder_k, views[8:24])[:8]
    torch.testing.assert_close(inside, whole, rtol=0, atol=1e-4)
    assert (beside - whole[8:]).abs().max() > 0.01


@pytest.mark.parametrize(
    "changes", [{"batch_size": 32}, {"dictionary": "bank"}, {"dictionary": "simclr"}]
)
def test_where_nothing_can_be_measured_it_is_refused(changes):
    config = PretrainConfig(
        **({"batch_size": 16, "K": 32, "device": "cpu", "leak_meter": True} | changes)
    )
    with pytest.raises(UserError, match="leak_meter: a batch is"):
        check(config, 40)
