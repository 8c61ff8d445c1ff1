"""STAGE's credit, KL factor and entropy reward, and the choice of samples that references replace: by hand, and by a loop."""

from __future__ import annotations

import math

import pytest
import torch

from gcpo_t2i.algo.advantage import group_advantage
from gcpo_t2i.algo.credit import CREDITS, CreditSettings
from gcpo_t2i.algo.edits import all_failed, entropy_reward, worst
from gcpo_t2i.algo.groups import opposite_similarity

STAGE = CREDITS["stage"]


def credit(vectors: torch.Tensor, advantage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = {"code_vectors": vectors, "advantage": advantage}
    mask = torch.ones(advantage.numel(), vectors.shape[2] * vectors.shape[3], dtype=torch.bool)
    found = STAGE.fn(tensors, mask, CreditSettings(), [])
    return found, STAGE.kl_factor(tensors, found)


def test_credit_and_kl_factor_by_hand():
    # two images, one right and one wrong, of three codes: the same, at right angles, opposite
    right, wrong = [[1.0, 0.0]] * 3, [[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    vectors = torch.tensor([right, wrong]).view(1, 2, 1, 3, 2)
    found, factor = credit(vectors, torch.tensor([[1.0, -1.0]]))
    # (1 − cos)/2 = 0, 1/2, 1, of mean 1/2; KL in full where cos ≥ 0, half where −1
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0, 2.0]] * 2))
    torch.testing.assert_close(factor, torch.tensor([[1.0, 1.0, 0.5]] * 2))


def test_only_images_of_opposite_advantage_count():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).view(1, 3, 1, 1, 2)

    def cosines(*advantage: float) -> list[float]:
        return opposite_similarity(vectors, torch.tensor([advantage])).flatten().tolist()

    assert cosines(1.0, 1.0, -2.0) == pytest.approx([-1, 0, -0.5])
    assert cosines(1.0, -0.5, -0.5) == pytest.approx([-0.5, 0, -1])
    assert cosines(1.0, 0.0, -1.0) == pytest.approx([-0.5, 0, -0.5])  # 0 is on nobody's side
    assert cosines(1.0, 1.0, 1.0) == [0, 0, 0]


def slow_credit(vectors: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    groups, group, height, width, _ = vectors.shape
    rows = []
    for p in range(groups):
        for i in range(group):
            weights = []
            for place in range(height * width):
                y, x = divmod(place, width)
                others = [j for j in range(group) if j != i and advantage[p, i] * advantage[p, j] <= 0]
                own = vectors[p, i, y, x]
                found = [torch.cosine_similarity(own, vectors[p, j, y, x], dim=0).item() for j in others]
                weights.append((1 - sum(found) / len(found)) / 2)
            rows.append([weight / (sum(weights) / len(weights)) for weight in weights])
    return torch.tensor(rows)


def test_against_a_slow_loop():
    draw = torch.Generator().manual_seed(3)
    vectors = torch.randn(2, 4, 3, 5, 6, generator=draw)
    advantage = group_advantage(torch.rand(2, 4, generator=draw))
    found, factor = credit(vectors, advantage)
    torch.testing.assert_close(found, slow_credit(vectors, advantage))
    assert ((factor >= 0.5) & (factor <= 1)).all()
    swapped, _ = credit(vectors, advantage.roll(1, dims=1))
    assert not torch.allclose(found, swapped)  # another image is the opposite


def test_entropy_credit_is_ranks_of_entropy():
    tensors = {"entropy": torch.tensor([[0.1, 3.0, 3.0, 2.0]])}
    mask = torch.tensor([[True, True, True, True]])
    found = CREDITS["entropy"].fn(tensors, mask, CreditSettings(), [])[0]
    assert found[1] == found[2] > found[3] > found[0] > 0 and found.mean().item() == pytest.approx(1)
    plain = CREDITS["entropy"].fn(tensors, mask, CreditSettings(normalizer="mean"), [])[0]
    torch.testing.assert_close(plain, torch.tensor([0.1, 3.0, 3.0, 2.0]) / 2.025)


def test_entropy_reward_by_hand():
    rewards = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.2, 0.1]])
    entropy, reference = torch.tensor([[2.0, 3.0, 9.0], [5.0, 1.0, 1.0]]), torch.tensor([[2.0, 2.0, 2.0]] * 2)
    # of the best two: e = 1/(1 + 0) and 1/(1 + 1), mean 3/4; a best that is alone is its own mean
    expected = torch.tensor([[1 + 0.4 * 0.25, 1 - 0.4 * 0.25, 0.0], [0.5, 0.2, 0.1]])
    torch.testing.assert_close(entropy_reward(rewards, entropy, reference, 0.4), expected)


def test_the_entropy_reward_tells_equal_rewards_apart():
    rewards, entropy = torch.full((1, 2), 0.3), torch.tensor([[2.0, 2.5]])
    found = group_advantage(entropy_reward(rewards, entropy, torch.full((1, 2), 2.0), 0.4))
    assert found[0, 0] > 0 > found[0, 1]


def test_groups_without_success_and_their_worst():
    success = torch.tensor([[False, False], [True, False], [True, True]])
    assert all_failed(success).tolist() == [True, False, False]
    assert worst(torch.tensor([[0.3, 0.1, 0.2], [0.2, 0.2, 0.2], [0.0, -1.0, math.inf]])).tolist() == [1, 0, 1]
