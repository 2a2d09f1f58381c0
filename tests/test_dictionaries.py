"""The rules of the paper's Figure 2, SimCLR's, and that each method learns and travels on."""

import math
import random
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from convert.backbone import build_resnet, load_backbone
from convert.errors import UserError
from pretrain.checks import check
from pretrain.config import PretrainConfig
from pretrain.contrast import Batch, contrastive_logits, contrastive_loss
from pretrain.dictionaries import EndToEnd, MemoryBank, find_method
from pretrain.loop import train
from pretrain.moco import MoCo
from pretrain.monitor import KnnMonitor, read_log
from pretrain.optimizer import Lars
from pretrain.simclr import SimCLR, nt_xent_logits
from pretrain.sources import open_set
from tests import reference
from tests.test_moco import batch_of, one_step, small, unit


def images(count=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 3, 32, 32, generator=draw)


def gradient(encoder):
    return sum(float(p.grad.abs().sum()) for p in encoder.parameters() if p.grad is not None)


def encoded(model, encoder, x):
    return functional.normalize(encoder(x), dim=1).detach()


# Who is trained, who is shuffled, what the negatives are.


@pytest.mark.parametrize(
    ("method", "networks", "trained"),
    [
        (MoCo, {"encoder_q", "encoder_k"}, {"encoder_q"}),
        (MemoryBank, {"encoder_q"}, {"encoder_q"}),
        (EndToEnd, {"encoder_q", "encoder_k"}, {"encoder_q", "encoder_k"}),
        (SimCLR, {"encoder_q"}, {"encoder_q"}),
    ],
)
def test_the_gradient_reaches_the_encoders_that_figure_2_trains(method, networks, trained):
    model = small(method=method)
    one_step(model, *images()[: model.views])
    there = dict(model.named_children())
    assert there.keys() == networks
    assert {name for name, network in there.items() if gradient(network) > 0} == trained


@pytest.mark.parametrize(
    ("method", "shuffled"), [(MoCo, True), (EndToEnd, True), (MemoryBank, False)]
)
def test_the_bank_alone_is_not_shuffled(method, shuffled, monkeypatch):
    model, asked = small(method=method), []
    shuffle = Batch.shuffle
    monkeypatch.setattr(Batch, "shuffle", lambda *a: asked.append(a) or shuffle(*a))
    one_step(model, *images()[: model.views])
    assert bool(asked) == shuffled


@pytest.mark.parametrize("method", [MoCo, EndToEnd])
def test_one_group_leaks_where_keys_are_made_with_the_queries(method):
    config = PretrainConfig(
        arch="resnet18", K=32, batch_size=16, bn_groups=1, device="cpu", data="x",
        dictionary="queue" if method is MoCo else "end-to-end",
    )  # fmt: skip
    with pytest.raises(UserError, match="--leak"):
        check(config, 40)
    assert method.leaks
    assert not MemoryBank.leaks


def test_at_momentum_0_the_keys_encoder_is_the_queries(monkeypatch):
    model = small(m=0.0)
    with torch.no_grad():
        for parameter in model.encoder_q.parameters():
            parameter.add_(0.1)
    one_step(model, *images())
    for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        assert torch.equal(q, k)


@pytest.mark.parametrize(
    ("method", "negatives"), [(MoCo, 32), (MemoryBank, 32), (EndToEnd, 15), (SimCLR, 30)]
)
def test_equal_embeddings_give_log_of_negatives_plus_1(method, negatives):
    model = small(method=method)
    same = unit(1, 16, 0)
    model.encode = lambda encoder, x: same.expand(len(x), -1).clone().requires_grad_()
    for name in ("queue", "bank"):
        if hasattr(model, name):
            stored = getattr(model, name)
            stored.copy_(same.T.expand_as(stored) if name == "queue" else same.expand_as(stored))
    assert model.negatives == negatives
    loss = one_step(model, *images()[: model.views])[0]
    assert float(loss) == pytest.approx(math.log(negatives + 1), rel=1e-5)


def test_a_banks_positive_is_the_images_own_stored_entry():
    model = small(method=MemoryBank)
    (view, _), places = images(), torch.arange(39, 23, -1)
    batch = Batch([view], places, seed=0, step=3)
    before = model.bank.clone()
    drawn = torch.randint(40, (32,), generator=batch.draw("bank"))
    q = encoded(model, small(method=MemoryBank).encoder_q, view)
    want = contrastive_loss(contrastive_logits(q, before[places], before[drawn].T, 0.2))
    (scored,) = list(model.contrast(batch))
    torch.testing.assert_close(scored.loss, want)
    torch.testing.assert_close(model.bank[places], q)  # each at its own image's place
    untouched = [i for i in range(40) if i not in places.tolist()]
    assert torch.equal(model.bank[untouched], before[untouched])


def test_a_banks_momentum_is_on_its_entries():
    model = small(method=MemoryBank, bank_momentum=0.5)
    before = model.bank[:4].clone()
    q = unit(4, 16, 7)
    model.store(torch.arange(4), q)
    torch.testing.assert_close(model.bank[:4], functional.normalize(0.5 * before + 0.5 * q, dim=1))
    assert not torch.equal(model.bank[:4], q)


def test_a_banks_negatives_are_drawn_uniformly_and_anew_each_step():
    batches = [Batch([], torch.arange(4), seed=0, step=step) for step in range(200)]
    drawn = [torch.randint(40, (32,), generator=batch.draw("bank")) for batch in batches]
    counts = torch.bincount(torch.cat(drawn), minlength=40)
    assert counts.min() > 100  # 160 each by chance
    assert counts.max() < 230
    assert not torch.equal(drawn[0], drawn[1])


def test_end_to_end_scores_queries_against_the_batchs_keys():
    model, twin = small(method=EndToEnd), small(method=EndToEnd)
    im_q, im_k = images()
    batch = batch_of(im_q, im_k)
    order = batch.shuffle(1)
    q = encoded(twin, twin.encoder_q, im_q)
    k = encoded(twin, twin.encoder_k, im_k[order])[torch.argsort(order)]
    want = functional.cross_entropy(q @ k.T / 0.2, torch.arange(16))
    torch.testing.assert_close(one_step(model, im_q, im_k)[0], want, rtol=1e-4, atol=1e-5)


def test_nt_xent_is_the_slow_one():
    first, second = unit(6, 8, 0), unit(6, 8, 1)
    both = torch.cat([first, second])
    logits = nt_xent_logits(both, both, torch.arange(12), 0.3)
    loss = functional.cross_entropy(logits, (torch.arange(12) + 6) % 12)
    assert float(loss) == pytest.approx(reference.nt_xent(first, second, 0.3), rel=1e-5)


def test_simclrs_loss_is_nt_xent_of_its_two_views():
    model, twin = small(method=SimCLR), small(method=SimCLR)
    views = images()
    z = encoded(twin, twin.encoder_q, torch.cat(list(views)))
    want = reference.nt_xent(*z.chunk(2), 0.2)
    assert float(one_step(model, *views)[0]) == pytest.approx(want, rel=1e-4)


def test_lars_moves_weights_by_their_own_length_and_biases_plainly():
    torch.manual_seed(0)
    weight, bias = (torch.nn.Parameter(torch.randn(*s)) for s in ((4, 3), (4,)))
    weight.grad, bias.grad = torch.randn(4, 3), torch.randn(4)
    before = weight.detach().clone(), bias.detach().clone()
    optimizer = Lars([weight, bias], lr=0.1, momentum=0.9, weight_decay=0.01, eta=0.001)
    moved = torch.zeros(4, 3)
    for _ in range(2):
        step = weight.grad + 0.01 * weight.detach()
        step = 0.001 * weight.detach().norm() / step.norm() * step
        moved = 0.9 * moved + step
        want = weight.detach() - 0.1 * moved
        optimizer.step()
        torch.testing.assert_close(weight.detach(), want)
    torch.testing.assert_close(bias.detach(), before[1] - 0.1 * bias.grad * (1 + 1.9))


def test_lars_leaves_a_weight_of_zeros_finite():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    Lars([weight], lr=0.1).step()
    assert weight.isfinite().all()
    assert (weight < 0).all()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dictionary": "stack"}, "want one of queue, bank, end-to-end, simclr, or FILE.py:CLASS"),
        ({"dictionary": "gone.py:Mine"}, "gone.py:Mine': no such file"),
        ({"dictionary": "end-to-end", "accumulate": 2}, "end-to-end holds a batch against itself"),
        ({"dictionary": "simclr", "accumulate": 2}, "SimCLR holds a batch against itself"),
        ({"dictionary": "simclr", "bn_groups": 4}, "SimCLR has one over all processes"),
        ({"accumulate": 3}, "a process has 2 batch norm groups; want parts that hold whole groups"),
        ({"dictionary": "bank", "bank_momentum": 2.0}, "out of range: bank_momentum 2.0"),
        ({"dictionary": "bank", "K": 40}, "the set has 40 images"),
    ],
)
def test_methods_that_cannot_be_are_refused(changes, line):
    config = PretrainConfig(**{"batch_size": 16, "K": 32, "device": "cpu"} | changes)
    with pytest.raises(UserError, match=re.escape(line)):
        check(config, 40)


def test_a_file_without_the_class_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Other: pass\n")
    with pytest.raises(UserError, match="has no class Other that is a Contrast"):
        find_method(f"{file}:Other")


def test_a_file_of_ones_own_may_use_dataclasses_and_any_name(tmp_path):
    file = tmp_path / "random.py"
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text += "from pretrain.moco import MoCo\n@dataclass\nclass Part:\n    size: int = 1\n"
    file.write_text(text + "class Mine(MoCo): part = Part()\n")
    assert find_method(f"{file}:Mine").part.size == 1
    assert sys.modules["random"] is random


def _tenth(images):
    """Every tenth image of a set."""
    return replace(images, paths=images.paths[::10], labels=images.labels[::10])


LEARNING = {
    "queue": {"K": 256, "m": 0.99, "warmup_epochs": 0.5},
    # Every entry is random until its image has been seen: more epochs, in larger batches.
    "bank": {"K": 256, "bank_momentum": 0.5, "batch_size": 128, "lr": 0.03, "epochs": 6},
    "end-to-end": {},
    "simclr": {"optimizer": "lars", "lr": 1.0, "weight_decay": 1e-6, "augmentation": "simclr"},
}


@pytest.mark.parametrize("dictionary", LEARNING)
def test_each_method_learns_on_the_embedded_set_and_its_checkpoint_travels_on(dictionary, tmp_path):
    images, _ = open_set("embedded")
    config = PretrainConfig(
        **{
            "data": "embedded", "dictionary": dictionary, "arch": "resnet18", "mlp": True,
            "tau": 0.2, "augmentation": "v2", "crop_scale": (0.4, 1.0), "image_size": 32,
            "batch_size": 32, "lr": 0.06, "epochs": 3, "max_steps": 60, "workers": 1, "keep": 1,
            "device": "cpu", "print_freq": 5, "schedule": "cos", "residual_gamma": 0.2,
        } | LEARNING[dictionary]
    )  # fmt: skip
    path = train(check(config, len(images)), images, tmp_path, quiet=True)
    lines = read_log(tmp_path)
    losses = [line["loss"] for line in lines]
    assert sum(losses[-2:]) / 2 < 0.95 * max(losses), losses
    chance = 100 / config.batch_size
    assert lines[-1]["batch_top1"] > 2 * chance, lines
    found = load_backbone(path)
    vote = KnnMonitor(_tenth(images), _tenth(images), 32)
    network = build_resnet(found.facts.arch, found.weights)
    # 60 steps teach no classes; among the bank's own images each must find itself.
    assert vote(network, torch.device("cpu")) > 50
    assert found.facts.method == {"queue": "MoCo v2"}.get(dictionary, config.method)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(
        torch.equal(value, state[f"module.encoder_q.{name}"])
        for name, value in found.weights.items()
    )
