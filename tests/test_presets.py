from dataclasses import replace
from itertools import pairwise

import pytest

from pretrain.checks import check
from pretrain.config import RECIPES, PretrainConfig, load_config
from pretrain.flags import read_command
from pretrain.presets import fit

AUTO = PretrainConfig(preset="auto", device="cpu")


def test_the_rules_give_imagenets_and_cifars_own_settings_back():
    imagenet, _ = fit(AUTO, 1_281_167)
    v2 = load_config(PretrainConfig, RECIPES / "moco_v2_r50_200ep.yaml")
    for key in ("K", "m", "crop_scale", "batch_size", "lr", "epochs", "schedule"):
        assert getattr(imagenet, key) == getattr(v2, key), key
    notebook = load_config(PretrainConfig, RECIPES / "moco_cifar10_r18_200ep.yaml")
    cifar, _ = fit(replace(notebook, preset="auto"), 50_000)
    assert replace(cifar, preset="", epochs=200) == notebook
    assert cifar.epochs == 800


@pytest.mark.parametrize("images", [33, 100, 500, 1803, 9_000, 50_000, 126_689, 2_000_000])
def test_what_is_derived_can_be_trained(images):
    config, lines = fit(AUTO, images)
    config = check(config, images)
    assert config.batch_size <= config.K < images
    assert config.K <= max(images / 12, config.batch_size)
    assert 200 <= config.epochs <= 800
    assert config.lr == pytest.approx(0.03 * config.batch_size / 256)
    assert all(line.startswith("preset auto: ") for line in lines)


def test_more_images_never_mean_fewer_negatives_or_more_epochs():
    fitted = [fit(AUTO, 2**power)[0] for power in range(7, 22)]
    for smaller, larger in pairwise(fitted):
        assert smaller.K <= larger.K
        assert smaller.m <= larger.m
        assert smaller.epochs >= larger.epochs


def test_a_set_too_large_for_epochs_is_counted_in_iterations():
    config, lines = fit(replace(AUTO, batch_size=1024), 940_000_000)
    assert (config.iterations, config.schedule_unit, config.schedule) == (
        250_000,
        "iterations",
        "cos",
    )
    assert config.K == 65536
    assert any("an epoch here is too long" in line for line in lines)


def test_what_the_command_line_says_stays_and_a_recipe_gives_way():
    words = [
        "DIR",
        "--config",
        str(RECIPES / "moco_v2_r50_own.yaml"),
        "--moco-k",
        "512",
        "m",
        "0.9",
    ]
    command = read_command(words)
    assert command.given >= {"K", "m", "data"}
    config, lines = fit(command.config, 50_000, command.given)
    assert (config.K, config.m, config.epochs) == (512, 0.9, 800)
    assert not [line for line in lines if line.startswith(("preset auto: K", "preset auto: m"))]
    assert (config.mlp, config.tau, config.augmentation) == (True, 0.2, "v2")
    assert fit(PretrainConfig(), 100) == (PretrainConfig(), [])


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("moco_v2_r50_imagenet100", 126_689),
        ("moco_v2_r18_stl10", 105_000),
        ("moco_v2_r18_tiny_imagenet", 100_000),
    ],
)
def test_the_recipes_of_middling_sets_are_what_the_rules_derive(name, images):
    recipe = load_config(PretrainConfig, RECIPES / f"{name}.yaml")
    derived, _ = fit(replace(recipe, preset="auto"), images)
    assert replace(derived, preset="") == recipe


def test_the_pair_for_cifar_differs_in_the_method_alone():
    moco = load_config(PretrainConfig, RECIPES / "cifar10_moco_v2.yaml")
    simclr = load_config(PretrainConfig, RECIPES / "cifar10_simclr.yaml")
    assert simclr == replace(moco, dictionary="simclr", tau=0.5, bn_groups=1)
    notebook = load_config(PretrainConfig, RECIPES / "moco_cifar10_r18_200ep.yaml")
    assert moco == replace(notebook, mlp=True, epochs=100)


def test_the_uncurated_recipe_has_the_schedule_of_ig_1b():
    config = load_config(PretrainConfig, RECIPES / "moco_v2_r50_uncurated.yaml")
    assert (config.batch_size, config.lr, config.gamma, config.decay_every) == (
        1024,
        0.12,
        0.9,
        62500,
    )
    assert (config.iterations, config.schedule) == (1_250_000, "decay")
    assert (config.mlp, config.augmentation) == (True, "v2")
