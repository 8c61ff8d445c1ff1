from __future__ import annotations

import pytest
import torch

from gcpo_t2i.algo.advantage import group_advantage, has_spread


def test_group_scale_by_hand():
    # mean 2, unbiased std sqrt((1 + 0 + 1) / 2) = 1, divisor 1 + 1e-4
    advantage = group_advantage(torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(advantage, torch.tensor([[-1 / 1.0001, 0.0, 1 / 1.0001]]))


def test_batch_scale_by_hand():
    # group means 1 and 5; over 0, 2, 4, 6 (mean 3): squares 9 + 1 + 1 + 9 = 20, unbiased variance 20 / 3
    advantage = group_advantage(torch.tensor([[0.0, 2.0], [4.0, 6.0]]), scale="batch", eps=0.0)
    unit = (3 / 20) ** 0.5
    torch.testing.assert_close(advantage, torch.tensor([[-unit, unit], [-unit, unit]]))


def test_no_scale_only_subtracts_the_group_mean():
    advantage = group_advantage(torch.tensor([[0.0, 2.0], [4.0, 10.0]]), scale="none")
    torch.testing.assert_close(advantage, torch.tensor([[-1.0, 1.0], [-3.0, 3.0]]))


def test_eps_is_added_to_the_std():
    # std of 0, 2 is sqrt(2); with eps = 2 − sqrt(2) the divisor is 2
    advantage = group_advantage(torch.tensor([[0.0, 2.0]]), eps=2 - 2**0.5)
    torch.testing.assert_close(advantage, torch.tensor([[-0.5, 0.5]]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_without_spread_gets_exactly_zero(scale):
    # In float32 the mean of 13 times 0.7 is not 0.7, so plain subtraction would leave a remainder.
    level = torch.full((1, 13), 0.7)
    assert (level - level.mean()).abs().max() > 0
    advantage = group_advantage(torch.cat([level, torch.arange(13.0)[None]]), scale=scale)
    assert torch.equal(advantage[0], torch.zeros(13))
    assert (advantage[1].diff() > 0).all()


def test_does_not_depend_on_the_level_of_rewards_and_follows_their_order():
    rewards = torch.tensor([[0.0, 1.0, 4.0, 2.0], [3.0, 1.0, 0.0, 0.5]])
    order = torch.tensor([2, 0, 3, 1])
    advantage = group_advantage(rewards)
    torch.testing.assert_close(group_advantage(rewards + 8), advantage)
    torch.testing.assert_close(group_advantage(rewards[:, order]), advantage[:, order])
    torch.testing.assert_close(advantage.sum(dim=1), torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_is_float32_whatever_comes_in(dtype):
    advantage = group_advantage(torch.tensor([[0, 1, 3]], dtype=dtype))
    assert advantage.dtype == torch.float32
    torch.testing.assert_close(advantage, group_advantage(torch.tensor([[0.0, 1.0, 3.0]])))


def test_nan_reward_is_not_taken_for_a_group_without_spread():
    rewards = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    assert has_spread(rewards).tolist() == [True, False]
    assert group_advantage(rewards)[0].isnan().all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_needs_a_group(scale, shape):
    with pytest.raises(ValueError, match=r"at least 2 samples of each prompt.*group size of 2"):
        group_advantage(torch.zeros(shape), scale=scale)


def test_unknown_scale():
    with pytest.raises(ValueError, match=r"unknown advantage scale 'groups'; did you mean 'group'\?"):
        group_advantage(torch.zeros(1, 2), scale="groups")
