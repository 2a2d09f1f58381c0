import math

import pytest
import torch
from torch.nn.functional import normalize

from pretrain.spread import alignment, effective_rank, spread, uniformity


def test_one_embedding_for_all_images_has_no_spread():
    q = normalize(torch.ones(6, 8), dim=1)
    assert spread(q, q) == pytest.approx(
        {"alignment": 0, "uniformity": 0, "effective_rank": 1}, abs=1e-5
    )


def test_orthogonal_embeddings_use_every_direction():
    q = torch.eye(8)
    assert effective_rank(q) == pytest.approx(8)
    assert uniformity(q) == pytest.approx(-4)  # all pairs are a squared distance of 2 apart
    assert alignment(q, -q) == pytest.approx(4)
    assert alignment(q, q.roll(1, dims=0)) == pytest.approx(2)


def test_the_rank_weighs_directions_by_their_singular_values():
    x = torch.diag(torch.tensor([3.0, 1.0]))
    assert effective_rank(x) == pytest.approx(math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3)))


def test_uniformity_is_the_papers_by_the_slow_way():
    x = normalize(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    pairs = [(x[i] - x[j]).norm() ** 2 for i in range(20) for j in range(i)]
    want = math.log(sum(math.exp(-2 * d) for d in pairs) / len(pairs))
    assert uniformity(x) == pytest.approx(want, abs=1e-6)
