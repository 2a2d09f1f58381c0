import math

import pytest
import torch
from torch.nn import functional

from pretrain.config import PretrainConfig
from pretrain.contrast import Batch, contrastive_logits, contrastive_loss
from pretrain.encoders import build_encoder
from pretrain.moco import MoCo
from tests.reference import info_nce


def unit(rows: int, length: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, length, generator=draw), dim=1)


def small(groups=2, method=MoCo, **changes):
    settings = {"arch": "resnet18", "dim": 16, "K": 32, "m": 0.99, "tau": 0.2, "mlp": True}
    config = PretrainConfig(**settings | {"batch_size": 16} | changes)
    torch.manual_seed(0)
    model = method(config, images=40, groups=groups)
    model.settle(torch.device("cpu"))
    return model


def batch_of(*views, step=0):
    return Batch(list(views), torch.arange(len(views[0])), seed=0, step=step)


def one_step(model, *views, step=0):
    """Take a step forward and back; return the loss and the shares."""
    total = torch.zeros(3)
    for scored in model.contrast(batch_of(*views, step=step)):
        scored.loss.backward()
        total += torch.cat([scored.loss.detach().view(1), scored.values])
    return total


@pytest.mark.parametrize("K", [1, 64, 65536])
def test_identical_embeddings_give_log_k_plus_1(K):
    q = unit(1, 8, 0).expand(4, 8)
    logits = contrastive_logits(q, q, q[:1].T.expand(8, K), tau=0.07)
    assert float(contrastive_loss(logits)) == pytest.approx(math.log(K + 1), rel=1e-5)


@pytest.mark.parametrize("tau", [0.07, 0.2, 1.0])
def test_the_loss_is_equation_1(tau):
    q, k, queue = unit(5, 8, 0), unit(5, 8, 1), unit(7, 8, 2).T
    loss = contrastive_loss(contrastive_logits(q, k, queue, tau))
    torch.testing.assert_close(loss, info_nce(q, k, queue, tau), rtol=1e-5, atol=1e-6)


def test_embeddings_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="embeddings differ in length"):
        contrastive_logits(unit(2, 8, 0), unit(2, 8, 1), unit(3, 9, 2).T, 0.2)


def test_the_key_encoder_follows_equation_2_in_parameters_only():
    model = small(m=0.9)
    with torch.no_grad():
        for parameter in model.encoder_q.parameters():
            parameter.add_(1.0)
    theta_k = [p.clone() for p in model.encoder_k.parameters()]
    theta_q = [p.clone() for p in model.encoder_q.parameters()]
    statistics = [b.clone() for b in model.encoder_k.buffers()]
    model.update_key_encoder()
    for now, k, q in zip(model.encoder_k.parameters(), theta_k, theta_q, strict=True):
        torch.testing.assert_close(now, 0.9 * k + 0.1 * q)
    assert all(
        torch.equal(now, then)
        for now, then in zip(model.encoder_k.buffers(), statistics, strict=True)
    )


def test_both_encoders_start_equal_and_only_f_q_learns():
    model = small()
    for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        assert torch.equal(q, k)
        assert q.requires_grad
        assert not k.requires_grad


def test_a_step_reaches_every_parameter_of_f_q_and_none_of_f_k():
    model = small()
    one_step(model, *torch.randn(2, 16, 3, 32, 32))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder_q.parameters())
    assert all(p.grad is None for p in model.encoder_k.parameters())


def test_keys_enter_the_queue_in_the_order_of_the_images():
    model = small(m=1.0)
    im_q, im_k = torch.randn(2, 16, 3, 32, 32)
    shuffle = batch_of(im_q, im_k).shuffle(1)
    with torch.no_grad():
        k = functional.normalize(model.encoder_k(im_k[shuffle]), dim=1)
    one_step(model, im_q, im_k)
    torch.testing.assert_close(model.queue[:, :16].T[shuffle], k, rtol=1e-4, atol=1e-5)


def test_a_positive_is_the_images_own_key_whatever_the_shuffle():
    im_q, im_k = torch.randn(2, 16, 3, 32, 32)
    # One group: shuffling changes nothing but the order.
    losses = [one_step(small(groups=1, m=1.0), im_q, im_k, step=step) for step in (0, 1)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    assert not torch.equal(batch_of(im_q, step=0).shuffle(1), batch_of(im_q, step=1).shuffle(1))


def test_shuffling_parts_a_query_from_the_group_of_its_key():
    shuffle = batch_of(torch.zeros(64, 1)).shuffle(1)
    assert sorted(shuffle.tolist()) == list(range(64))
    together = (shuffle // 8 == torch.arange(64) // 8).float().mean()
    assert together < 0.3  # by chance 1 of 8


def test_the_queue_wraps_around_for_any_batch_and_k():
    model = small(K=10)
    before = model.queue.clone()
    for start in (0, 7, 14):
        model.enqueue(torch.full((7, 16), float(start + 1)))
    # 21 keys into 10 places: the third batch lies at 4, 5, ... 9, 0.
    assert int(model.queue_ptr) == 1
    assert model.queue[0].tolist() == [15.0] + [8.0] * 3 + [15.0] * 6
    assert not torch.equal(model.queue, before)


def test_the_current_keys_are_no_negatives_of_their_step():
    model = small()
    im_q, im_k = torch.randn(2, 16, 3, 32, 32)
    queue = model.queue.clone()
    batch = batch_of(im_q, im_k)
    with torch.no_grad():
        k = small().keys(batch, 1)  # a twin's: encoding moves statistics
        q = functional.normalize(small().encoder_q(im_q), dim=1)
    want = contrastive_loss(contrastive_logits(q, k, queue, 0.2))
    torch.testing.assert_close(one_step(model, im_q, im_k)[0], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.queue[:, :16], k.T)


def test_symmetric_adds_the_swapped_loss_and_enqueues_both_views_keys():
    views = torch.randn(2, 16, 3, 32, 32)
    model = small(symmetric=True, K=64, m=1.0)
    scored = list(model.contrast(batch_of(*views)))
    there = list(small(K=64, m=1.0).contrast(batch_of(*views)))
    assert len(scored) == 2
    torch.testing.assert_close(scored[0].loss, there[0].loss)
    assert scored[1].loss != scored[0].loss
    assert int(model.queue_ptr) == 32
    with torch.no_grad():
        first = small(K=64, m=1.0).keys(batch_of(*views), 0)
    torch.testing.assert_close(model.queue[:, :16].T, first, rtol=1e-4, atol=1e-5)


def test_the_state_dict_has_the_references_names_and_order():
    names = list(small(K=64).state_dict())
    assert names[:3] == ["queue", "queue_ptr", "encoder_q.conv1.weight"]
    assert {"encoder_q.fc.0.weight", "encoder_q.fc.2.bias"} <= set(names)
    assert not any(".fc.1." in name for name in names)
    plain = list(small(mlp=False).state_dict())
    assert "encoder_k.fc.weight" in plain
    half = (len(plain) - 2) // 2
    assert [n.replace("_q", "_k") for n in plain[2 : 2 + half]] == plain[2 + half :]


@pytest.mark.parametrize(
    ("mlp", "parameters", "keys"), [(False, 23770304, 642), (True, 27966656, 646)]
)
def test_resnet50_has_the_published_size(mlp, parameters, keys):
    with torch.device("meta"):
        model = MoCo(PretrainConfig(mlp=mlp), images=1, groups=1)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (trained, len(model.state_dict())) == (parameters, keys)


def test_own_keys_are_told_from_the_batchs_others():
    images = torch.randn(16, 3, 32, 32)
    for other, share in ((images, 1.0), (images.roll(1, dims=0), 0.0)):
        model = small(m=1.0).eval()  # eval: an image's embedding does not depend on the batch
        assert float(one_step(model, images, other)[2]) == share


@pytest.mark.parametrize(("arch", "norm"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_residual_gamma_weighs_every_blocks_branch_and_nothing_else(arch, norm):
    plain = build_encoder(arch, 16, mlp=True, bn_groups=1).state_dict()
    scaled = build_encoder(arch, 16, mlp=True, bn_groups=1, residual_gamma=0.2).state_dict()
    gammas = [n for n in scaled if n.startswith("layer") and n.endswith(f".{norm}.weight")]
    assert len(gammas) == {"resnet18": 8, "resnet50": 16}[arch]
    assert all((scaled[name] == 0.2).all() and (plain[name] == 1).all() for name in gammas)
    norms = [n for n in scaled if "bn" in n and n.endswith("weight") and n not in gammas]
    assert all((scaled[name] == 1).all() for name in norms)
