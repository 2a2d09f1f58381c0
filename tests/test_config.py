import dataclasses
import re

import pytest
import torch

from convert.errors import UserError
from pretrain.config import RECIPES, PretrainConfig, join_resume, load_config, split_words
from pretrain.encoders import build_encoder


def write(path, text):
    path.write_text(text)
    return path


def test_later_words_win_defaults_base_file_flags_pairs(tmp_path):
    write(tmp_path / "base.yaml", "lr: 1\nK: 1\nm: 0.1\ntau: 0.1\nepochs: 1\n")
    file = write(tmp_path / "recipe.yaml", "_BASE_: base.yaml\nK: 2\nm: 0.2\ntau: 0.2\nepochs: 2\n")
    flags = {"m": "0.3", "tau": "0.3", "epochs": "3", "mlp": None}
    config = load_config(PretrainConfig, file, flags, ["tau", "0.4", "epochs", "4"])
    assert (config.dim, config.lr, config.K, config.m, config.tau) == (128, 1, 2, 0.3, 0.4)
    assert config.epochs == 4
    assert config.mlp is False


def test_a_list_of_bases_is_merged_left_to_right(tmp_path):
    write(tmp_path / "a.yaml", "lr: 1\nK: 1\n")
    write(tmp_path / "b.yaml", "K: 2\n")
    config = load_config(PretrainConfig, write(tmp_path / "c.yaml", "_BASE_: [a.yaml, b.yaml]\n"))
    assert (config.lr, config.K) == (1, 2)


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("lr", "1e-3", 0.001),
        ("K", "1e3", 1000),
        ("mlp", "True", True),
        ("mlp", "false", False),
        ("milestones", "30,60", (30, 60)),
        ("milestones", "[30, 60]", (30, 60)),  # as a recipe has it
        ("crop_scale", "0.08 1", (0.08, 1.0)),
        ("checkpoint_every", "5", "5"),
    ],
)
def test_words_are_read_as_their_fields_say(key, word, value):
    assert getattr(load_config(PretrainConfig, pairs=[key, word]), key) == value


@pytest.mark.parametrize(
    ("key", "word"),
    [
        *(("K", "many"), ("K", "1.5"), ("mlp", "1"), ("lr", "true"), ("lr", "fast")),
        ("milestones", "[x]"),
    ],
)
def test_a_value_of_another_type_is_refused(key, word):
    found = re.escape(f"command line: {key} is '{word}', want")
    with pytest.raises(UserError, match=found):
        load_config(PretrainConfig, pairs=[key, word])


def test_an_unknown_key_names_file_and_nearest_keys(tmp_path):
    file = write(tmp_path / "recipe.yaml", "augmentaton: v2\n")
    with pytest.raises(UserError, match=r"recipe.yaml: unknown key 'augmentaton'.*augmentation"):
        load_config(PretrainConfig, file)
    with pytest.raises(UserError, match=r"command line: unknown key 'epoch'.*epochs"):
        load_config(PretrainConfig, pairs=["epoch", "1"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- 1\n", "found a list"),
        ("a: [\n", "is not plain YAML"),
        (None, "cannot be read"),
        ("_BASE_: 7\n", r"_BASE_ is \[7\], want a path"),
        ("_BASE_: recipe.yaml\n", r"recipe\.yaml: _BASE_ leads back to"),
    ],
)
def test_a_recipe_that_is_none_is_refused(tmp_path, text, line):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        write(file, text)
    with pytest.raises(UserError, match=line):
        load_config(PretrainConfig, file)


def test_a_pair_without_a_value_is_refused():
    with pytest.raises(UserError, match="'epochs' has no value"):
        load_config(PretrainConfig, pairs=["epochs"])


def test_an_odd_count_of_words_starts_with_the_folder():
    assert split_words(["DIR", "lr", "1"])[0].name == "DIR"
    assert split_words(["lr", "1"]) == (None, ["lr", "1"])
    assert split_words([]) == (None, [])
    with pytest.raises(UserError, match="images '': names no folder"):
        split_words(["", "lr", "1"])


def test_resume_takes_auto_or_a_checkpoint_and_nothing_else(tmp_path):
    file = write(tmp_path / "here", "x")
    assert join_resume(["--resume", "lr", "0.1"]) == ["--resume=auto", "lr", "0.1"]
    assert join_resume(["--resume", "auto", "DIR"]) == ["--resume=auto", "DIR"]
    assert join_resume(["--resume", str(file)]) == [f"--resume={file}"]
    assert join_resume(["--resume", "gone.pth.tar"]) == ["--resume=gone.pth.tar"]
    assert join_resume(["DIR", "--resume"]) == ["DIR", "--resume=auto"]
    with pytest.raises(UserError, match="--resume: names no checkpoint"):
        join_resume(["DIR", "--resume", "", "--mlp"])  # a shell's variable that is not set


def test_no_digit_of_a_whole_number_is_lost():
    assert load_config(PretrainConfig, pairs=["seed", "9007199254740993"]).seed == 2**53 + 1


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_loads(file):
    load_config(PretrainConfig, file)


def test_the_recipes_are_the_papers():
    v1 = load_config(PretrainConfig, RECIPES / "moco_v1_r50_200ep.yaml")
    assert v1 == PretrainConfig()
    assert (v1.K, v1.m, v1.tau, v1.batch_size, v1.lr) == (65536, 0.999, 0.07, 256, 0.03)
    assert (v1.epochs, v1.milestones, v1.weight_decay) == (200, (120, 160), 1e-4)
    assert (v1.method, v1.augmentation, v1.mlp, v1.schedule) == ("MoCo v1", "v1", False, "step")
    v2 = load_config(PretrainConfig, RECIPES / "moco_v2_r50_200ep.yaml")
    assert (v2.method, v2.augmentation, v2.mlp, v2.schedule) == ("MoCo v2", "v2", True, "cos")
    assert (v2.tau, v2.K, v2.m) == (0.2, 65536, 0.999)


@pytest.mark.parametrize(
    ("name", "method", "changes"),
    [
        ("moco_v1_r50_200ep_mlp", "MoCo v1 + MLP", {"mlp": True, "tau": 0.2}),
        ("moco_v1_r50_200ep_aug", "MoCo v1 + aug+", {"augmentation": "v2"}),
        (
            "moco_v1_r50_200ep_mlp_aug",
            "MoCo v1 + MLP + aug+",
            {"mlp": True, "tau": 0.2, "augmentation": "v2"},
        ),
        (
            "moco_v2_r50_800ep",
            "MoCo v2",
            {"mlp": True, "tau": 0.2, "augmentation": "v2", "schedule": "cos", "epochs": 800},
        ),
        ("moco_v1_x50_200ep", "MoCo v1", {"arch": "resnext50_32x8d"}),
        ("moco_v1_r50w2x_200ep", "MoCo v1", {"arch": "resnet50w2x"}),
        ("moco_v1_r50w4x_200ep", "MoCo v1", {"arch": "resnet50w4x"}),
        ("bank_r50_200ep", "memory bank", {"dictionary": "bank"}),
        ("end_to_end_r50_200ep", "end-to-end", {"dictionary": "end-to-end"}),
    ],
)
def test_each_recipe_of_the_papers_is_the_defaults_and_what_its_row_says(name, method, changes):
    config = load_config(PretrainConfig, RECIPES / f"{name}.yaml")
    assert config == PretrainConfig(**changes)
    assert config.method == method


@pytest.mark.parametrize(
    ("arch", "millions"), [("resnext50_32x8d", 46), ("resnet50w2x", 94), ("resnet50w4x", 375)]
)
def test_the_wide_encoders_have_the_papers_parameters(arch, millions):
    with torch.device("meta"):
        encoder = build_encoder(arch, 128, mlp=False, bn_groups=1)
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == pytest.approx(
        millions, abs=1
    )


def test_the_simclr_recipes_scale_as_its_paper_says():
    rates = {}
    for name, batch in (("200ep_b256", 256), ("200ep_b8192", 8192), ("1000ep_b4096", 4096)):
        config = load_config(PretrainConfig, RECIPES / f"simclr_r50_{name}.yaml")
        assert (config.method, config.batch_size, config.optimizer) == ("SimCLR", batch, "lars")
        assert (config.mlp, config.tau, config.weight_decay) == (True, 0.1, 1e-6)
        rates[batch] = config.lr
    assert rates == pytest.approx({batch: 0.075 * batch**0.5 for batch in rates}, rel=1e-3)


def test_the_cifar_recipe_is_the_references_notebook():
    config = load_config(PretrainConfig, RECIPES / "moco_cifar10_r18_200ep.yaml")
    assert (config.arch, config.stem, config.dim) == ("resnet18", "cifar", 128)
    assert (config.K, config.m, config.tau, config.bn_groups) == (4096, 0.99, 0.1, 8)
    assert (config.lr, config.batch_size, config.weight_decay) == (0.06, 512, 5e-4)
    assert (config.mlp, config.symmetric, config.schedule) == (False, False, "cos")
    symmetric = load_config(PretrainConfig, RECIPES / "moco_cifar10_r18_200ep_symmetric.yaml")
    assert symmetric == dataclasses.replace(config, symmetric=True)
