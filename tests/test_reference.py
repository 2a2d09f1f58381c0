"""MoCo held against the slow version of its Algorithm 1, and against the plain recipe."""

import pytest
import torch
import torchvision
from PIL import Image

from benchmarks.speed.reference_recipe import PlainMoCo, TwoCrops, build, images_per_s, take_step
from pretrain.checks import check
from pretrain.config import PretrainConfig
from pretrain.loop import Run
from pretrain.sources import image_folder
from tests.processes import take_steps
from tests.reference import AlgorithmOne
from tests.test_distributed import SMALL, photos  # noqa: F401


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def a_run(photos, tmp_path, **changes):  # noqa: F811
    images = image_folder(photos)
    config = PretrainConfig(**SMALL | {"batch_size": 16, "bn_groups": 2, "K": 48} | changes)
    return Run(check(config, len(images)), images, tmp_path, None)


def plain(encoder):
    """Torchvision's own network with our encoder's weights."""
    network = torchvision.models.resnet18(num_classes=16)
    network.fc = torch.nn.Sequential(
        torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 16)
    )
    network.load_state_dict(encoder.state_dict())
    return network


def seen(run, step):
    """The views and the permutation of a step, as the run takes them."""
    taken = {}
    contrast = run.model.contrast

    def spy(batch):
        taken["views"], taken["shuffle"] = batch.views, batch.shuffle(1)
        return contrast(batch)

    run.model.contrast = spy
    loss = take_steps(run, 1)[0][0]
    run.model.contrast = contrast
    assert run.step == step + 1
    return loss, taken["views"], taken["shuffle"]


def test_ten_steps_are_algorithm_1s(photos, tmp_path, float64):  # noqa: F811
    run = a_run(photos, tmp_path)
    model, config = run.model, run.config
    slow = AlgorithmOne(
        plain(model.encoder_q), plain(model.encoder_k), model.queue, groups=2, m=config.m,
        tau=config.tau, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
    )  # fmt: skip
    for step in range(10):
        loss, views, shuffle = seen(run, step)
        assert loss == pytest.approx(slow.step(*views, shuffle), rel=1e-9, abs=1e-9)
    model.update_key_encoder()  # the paper moves f_k after a step, we before the next one
    for ours, theirs in ((model.encoder_q, slow.f_q), (model.encoder_k, slow.f_k)):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-9)
    oldest_first = torch.roll(model.queue, -int(model.queue_ptr), dims=1)
    torch.testing.assert_close(oldest_first.T, torch.stack(slow.queue), rtol=1e-9, atol=1e-9)


def plain_moco(model):
    """The plain recipe's model with our weights."""
    theirs = PlainMoCo("resnet18", dim=16, K=48, m=0.9, tau=0.2)
    theirs.load_state_dict(model.state_dict())
    return theirs


def test_with_one_group_the_plain_recipe_is_the_same(photos, tmp_path, float64):  # noqa: F811
    run = a_run(photos, tmp_path, bn_groups=1, leak=True)
    theirs, optimizer = build(plain_moco(run.model), run.config.lr)
    for step in range(3):
        loss, views, shuffle = seen(run, step)
        assert loss == pytest.approx(take_step(theirs, optimizer, views, shuffle), abs=1e-9)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_in_float32_the_first_loss_of_the_plain_recipe_is_the_same(photos, tmp_path):  # noqa: F811
    run = a_run(photos, tmp_path, bn_groups=1, leak=True)
    theirs, optimizer = build(plain_moco(run.model), run.config.lr)
    loss, views, shuffle = seen(run, 0)
    assert loss == pytest.approx(take_step(theirs, optimizer, views, shuffle), abs=1e-5)


def test_switches_of_speed_keep_the_first_loss(photos, tmp_path):  # noqa: F811
    def first(**changes):
        return take_steps(a_run(photos, tmp_path, **changes), 1)[0][0]

    plain_loss = first(channels_last=False)
    assert first() == pytest.approx(plain_loss, abs=1e-5)
    assert first(precision="bf16") == pytest.approx(plain_loss, abs=0.1)
    assert first(precision="bf16") != plain_loss


def test_weights_loss_and_queue_stay_fp32_under_bf16(photos, tmp_path):  # noqa: F811
    run = a_run(photos, tmp_path, precision="bf16")
    take_steps(run, 1)
    floats = [v for v in run.model.state_dict().values() if v.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}
    buffers = [s["momentum_buffer"] for s in run.optimizer.state_dict()["state"].values()]
    assert {buffer.dtype for buffer in buffers} == {torch.float32}


def test_the_plain_recipe_trains_on_a_folder(photos):  # noqa: F811
    rate = images_per_s(
        photos, PlainMoCo("resnet18", dim=16, K=64), batch_size=16, size=32, steps=1, workers=0
    )
    assert rate > 0
    for aug_plus in (False, True):
        views = TwoCrops(32, aug_plus=aug_plus)(Image.new("RGB", (40, 40)))
        assert [view.shape for view in views] == [(3, 32, 32)] * 2
