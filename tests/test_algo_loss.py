from __future__ import annotations

import math

import pytest
import torch

from gcpo_t2i.algo.loss import (
    SURROGATES,
    kl_k3,
    kl_reweight,
    policy_loss,
    sequence_surrogate,
    token_surrogate,
    token_weights,
)

LN2 = math.log(2)
WIDE = (1.0, 100.0)  # a clip range that never clips here


def log(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


def full(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(tensor, dtype=torch.bool)


# --- surrogates ------------------------------------------------------------------------------------------------------


def test_token_surrogate_clips_by_hand():
    # ratios 1.5, 0.5, 1.1, 0.9 with clip 0.2 / 0.2
    logp = log([1.5, 0.5, 1.1, 0.9], [1.5, 0.5, 1.1, 0.9]).requires_grad_()
    terms = token_surrogate(logp, torch.zeros(2, 4), torch.tensor([2.0, -2.0]), full(logp), 0.2, 0.2)
    # A = 2: −min(2ρ, 2 clip(ρ)): above 1.2 the clip wins. A = −2: below 0.8 the clip wins.
    expected = torch.tensor([[-2.4, -1.0, -2.2, -1.8], [3.0, 1.6, 2.2, 1.8]])
    torch.testing.assert_close(terms.loss, expected)
    assert terms.clipped.tolist() == [[True, False, False, False], [False, True, False, False]]
    torch.testing.assert_close(terms.ratio, logp.exp())
    # d(−Aρ)/dlogp = −Aρ, nothing where clipped
    expected = torch.tensor([[0.0, -1.0, -2.2, -1.8], [3.0, 0.0, 2.2, 1.8]])
    torch.testing.assert_close(gradient(terms.loss.sum(), logp), expected)


def test_clip_is_asymmetric():
    # ratio 1.25 is above 1 + 0.2 and below 1 + 0.28; ratio 0.75 is below 1 − 0.2 and above 1 − 0.28
    logp, advantage = log([1.25], [0.75]), torch.tensor([1.0, -1.0])
    for low, high, clipped in ((0.2, 0.28, [[False], [True]]), (0.28, 0.2, [[True], [False]])):
        assert token_surrogate(logp, torch.zeros(2, 1), advantage, full(logp), low, high).clipped.tolist() == clipped


def test_sequence_ratio_by_hand():
    # T = 2: ratios 8 and 1/2, s = sqrt(4) = 2. T = 3 with one invalid token of garbage: ratios 9 and 1, s = 3.
    logp = torch.tensor([[math.log(8), -LN2, 5.0], [math.log(9), torch.nan, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    terms = sequence_surrogate(logp, torch.zeros(2, 3), torch.tensor([1.0, -1.0]), mask, *WIDE)
    torch.testing.assert_close(terms.ratio[mask], torch.tensor([2.0, 2.0, 3.0, 3.0]))
    torch.testing.assert_close(terms.loss[mask], torch.tensor([-2.0, -2.0, 3.0, 3.0]))
    # every valid token has the gradient −A·s of its own log-prob
    expected = torch.tensor([[-2.0, -2.0, 0.0], [3.0, 0.0, 3.0]])
    torch.testing.assert_close(gradient(terms.loss.masked_fill(~mask, 0).sum(), logp), expected)


def test_sequence_clip_by_hand():
    # mean log-ratios ±3.5e-4 against 3e-4 below and 4e-4 above, by tokens that are far outside of it one by one
    shift = torch.tensor([[3.5e-4], [-3.5e-4], [5e-4], [-5e-4]])
    logp = shift + torch.tensor([[1.0, -1.0]])
    for advantage, expected in ((1.0, [False, False, True, False]), (-1.0, [False, True, False, True])):
        terms = sequence_surrogate(logp, torch.zeros(4, 2), torch.full((4,), advantage), full(logp), 3e-4, 4e-4)
        assert terms.clipped.tolist() == [[value, value] for value in expected]


def test_sequence_surrogate_has_the_value_and_gradient_of_gspo():
    # −mean_i s_i·A_i with s_i = (π/π_old)^(1/T), differentiated directly
    draw = torch.Generator().manual_seed(0)
    logp = (0.3 * torch.randn(4, 6, generator=draw)).requires_grad_()
    old = 0.3 * torch.randn(4, 6, generator=draw)
    advantage = torch.tensor([1.0, -2.0, 0.5, 3.0])
    direct = -((logp - old).mean(dim=1).exp() * advantage).mean()
    weight = token_weights(torch.ones(4, 6), full(logp), "sequence", 4, 24)
    loss = (sequence_surrogate(logp, old, advantage, full(logp), *WIDE).loss * weight).sum()
    torch.testing.assert_close(loss, direct)
    torch.testing.assert_close(gradient(loss, logp), gradient(direct, logp))


@pytest.mark.parametrize("name", SURROGATES)
def test_on_policy_gradient_is_minus_advantage_times_weight(name):
    surrogate = SURROGATES[name]
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -4.0, -1.5]], requires_grad=True)
    advantage, weight = torch.tensor([2.0, -1.0]), torch.tensor([[0.1, 0.3, 0.1], [0.2, 0.0, 0.3]])
    loss, metrics = policy_loss(
        logp,
        logp,  # the policy that sampled is the policy; no gradient may flow through it
        advantage,
        full(logp),
        weight,
        torch.full((2, 3), 1 / 6),
        surrogate=surrogate.fn,
        clip_low=surrogate.clip_low,
        clip_high=surrogate.clip_high,
    )
    torch.testing.assert_close(gradient(loss, logp), torch.tensor([[-0.2, -0.6, -0.2], [0.2, 0.0, 0.3]]))
    assert metrics["ratio"] == 1 and metrics["clip_ratio"] == 0
    # A·Σw: −2·0.5 + 1·0.5
    torch.testing.assert_close(metrics["loss"].item(), -0.5)


@pytest.mark.parametrize("name", SURROGATES)
def test_a_ratio_that_is_out_of_hand_stays_finite(name):
    logp = torch.tensor([[300.0, 300.0]], requires_grad=True)
    terms = SURROGATES[name].fn(logp, torch.zeros(1, 2), torch.tensor([-1.0]), full(logp), 0.2, 0.2)
    torch.testing.assert_close(terms.ratio, torch.full((1, 2), math.exp(20)))
    assert terms.loss.isfinite().all() and gradient(terms.loss.sum(), logp).isfinite().all()


# --- KL and weights --------------------------------------------------------------------------------------------------


def test_kl_k3_by_hand():
    # π = 1/2, ref = 1/4: d = −ln 2, 1/2 + ln 2 − 1. The other way round: 2 − ln 2 − 1. Gradient in logp: 1 − exp(d).
    logp, ref = log([0.5, 0.25, 0.3]).requires_grad_(), log([0.25, 0.5, 0.3])
    kl = kl_k3(logp, ref)
    torch.testing.assert_close(kl, torch.tensor([[LN2 - 0.5, 1 - LN2, 0.0]]))
    torch.testing.assert_close(gradient(kl.sum(), logp), torch.tensor([[0.5, -1.0, 0.0]]))


def test_kl_k3_stays_finite_and_keeps_pulling_back():
    # d = −50: the policy made a token e^50 times likelier than the reference; the gradient must still be 1
    logp = torch.tensor([[-60.0, -1.0]], requires_grad=True)
    kl = kl_k3(logp, torch.tensor([[-1.0, -51.0]]))
    torch.testing.assert_close(kl, torch.tensor([[math.exp(20) - 21, 49.0]]))
    torch.testing.assert_close(gradient(kl.sum(), logp)[0, 1], torch.tensor(1.0))


def test_kl_reweight_by_hand():
    # w = 0, ½, ¾, 1, 3 → clip(2 − 2w) = 1, 1, ½, 0, 0
    factor = kl_reweight(torch.tensor([[0.0, 0.5, 0.75, 1.0, 3.0]]))
    torch.testing.assert_close(factor, torch.tensor([[1.0, 1.0, 0.75, 0.5, 0.5]]))


def test_token_weights_by_hand():
    # samples of 1 and 3 valid tokens: sequence ½·1 and ½·⅓ each, token ¼ each; credit multiplies
    mask = torch.tensor([[True, False, False], [True, True, True]])
    credit = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 2.5]])
    by_sequence = token_weights(mask.float(), mask, "sequence", 2, 4)
    by_token = token_weights(mask.float(), mask, "token", 2, 4)
    torch.testing.assert_close(by_sequence, torch.tensor([[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]]))
    torch.testing.assert_close(by_token, torch.tensor([[1 / 4, 0, 0], [1 / 4, 1 / 4, 1 / 4]]))
    torch.testing.assert_close(
        token_weights(credit, mask, "sequence", 2, 4), torch.tensor([[1 / 2, 0, 0], [0, 1 / 12, 5 / 12]])
    )
    for averaging in ("sequence", "token"):
        torch.testing.assert_close(token_weights(credit, mask, averaging, 2, 4).sum().item(), 1.0)


def test_token_weights_of_a_sample_without_valid_tokens_are_zero():
    mask = torch.tensor([[True, True], [False, False]])
    weight = token_weights(mask.float(), mask, "sequence", 1, 2)
    assert torch.equal(weight, torch.tensor([[0.5, 0.5], [0.0, 0.0]]))


def test_credit_at_an_invalid_token_has_no_weight():
    mask = torch.tensor([[True, False]])
    assert torch.equal(token_weights(torch.ones(1, 2), mask, "token", 1, 1), torch.tensor([[1.0, 0.0]]))


def test_unknown_averaging():
    with pytest.raises(ValueError, match=r"unknown averaging 'tokens'; did you mean 'token'\?"):
        token_weights(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), "tokens", 1, 1)


# --- policy_loss -----------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    # Two tokens, ratio 2 (clipped to 1.2) and 1, A = 1, credit ½ and 1½, base weight ½ each.
    logp = log([0.5, 0.5])
    loss, metrics = policy_loss(
        logp,
        log([0.25, 0.5]),
        torch.tensor([1.0]),
        full(logp),
        torch.tensor([[0.25, 0.75]]),
        torch.tensor([[0.5, 0.5]]),
        surrogate=token_surrogate,
        clip_low=0.2,
        clip_high=0.2,
        ref_logp=log([0.25, 0.25]),
        beta=0.1,
        kl_factor=kl_reweight(torch.tensor([[0.5, 1.5]])),
        entropy=torch.tensor([[1.0, 3.0]]),
        entropy_coef=0.01,
    )
    # policy −(1.2 · 0.25 + 1 · 0.75) = −1.05; KL of both tokens k = ln 2 − ½, factors 1 and ½, base weight ½: 0.75 k;
    # entropy ½ · 1 + ½ · 3 = 2
    k = LN2 - 0.5
    torch.testing.assert_close(loss.item(), -1.05 + 0.1 * 0.75 * k - 0.01 * 2)
    expected = {"ratio": 1.5, "clip_ratio": 0.5, "kl": k, "entropy": 2.0, "loss": loss.item()}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, abs=1e-6)


def step(batch: int = 8, tokens: int = 5) -> dict[str, torch.Tensor]:
    """A step of stale samples with unequal lengths; log-probs depend on one parameter vector."""
    draw = torch.Generator().manual_seed(2)
    mask = torch.arange(tokens)[None] < torch.tensor([5, 1, 3, 5, 2, 4, 5, 3])[:batch, None]
    credit = torch.rand(batch, tokens, generator=draw) * mask
    return {
        "features": torch.randn(batch, tokens, 6, generator=draw),
        "parameters": torch.randn(6, generator=draw),
        "old_logp": -torch.rand(batch, tokens, generator=draw),
        "ref_logp": -torch.rand(batch, tokens, generator=draw),
        "advantage": torch.randn(batch, generator=draw),
        "mask": mask,
        "credit": credit * mask.sum(dim=1, keepdim=True) / credit.sum(dim=1, keepdim=True),
    }


def update(data: dict[str, torch.Tensor], micro: int, surrogate: str, averaging: str, **changes):
    """Gradient of one optimizer step in micro-batches of `micro` samples, and its metrics, added up."""
    data = data | changes
    parameters = data["parameters"].clone().requires_grad_()
    mask, credit = data["mask"], data["credit"]
    totals: dict[str, torch.Tensor] = {}
    for start in range(0, len(mask), micro):
        part = slice(start, start + micro)
        hidden = data["features"][part] @ parameters
        loss, metrics = policy_loss(
            -torch.nn.functional.softplus(hidden),
            data["old_logp"][part],
            data["advantage"][part],
            mask[part],
            token_weights(credit[part], mask[part], averaging, len(mask), int(mask.sum())),
            token_weights(torch.ones_like(credit[part]), mask[part], averaging, len(mask), int(mask.sum())),
            surrogate=SURROGATES[surrogate].fn,
            clip_low=0.2,
            clip_high=0.28,
            ref_logp=data["ref_logp"][part],
            beta=0.05,
            kl_factor=kl_reweight(credit[part]),
            entropy=hidden.sigmoid(),
            entropy_coef=0.02,
        )
        loss.backward()
        totals = {name: totals.get(name, torch.zeros(())) + value for name, value in metrics.items()}
    assert parameters.grad is not None
    return parameters.grad, totals


@pytest.mark.parametrize("averaging", ["sequence", "token"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_micro_batches_do_not_change_gradient_or_metrics(surrogate, averaging):
    whole, metrics = update(step(), 8, surrogate, averaging)
    assert whole.abs().min() > 0
    assert metrics["clip_ratio"] > 0
    for micro in (1, 3):
        parts, added = update(step(), micro, surrogate, averaging)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
        assert added.keys() == metrics.keys() == {"loss", "ratio", "clip_ratio", "kl", "entropy"}
        for name, value in metrics.items():
            torch.testing.assert_close(added[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_what_stands_at_invalid_tokens_does_not_matter(surrogate):
    data = step()
    invalid = ~data["mask"]
    broken = {name: data[name].masked_fill(invalid, torch.nan) for name in ("old_logp", "ref_logp")}
    torch.testing.assert_close(
        update(data, 8, surrogate, "token", **broken), update(data, 8, surrogate, "token"), rtol=0, atol=0
    )


def plain(logp: torch.Tensor, weight: torch.Tensor, **options):
    base = torch.full_like(logp, 1 / logp.numel())
    options |= {"surrogate": token_surrogate, "clip_low": 0.2, "clip_high": 0.2}
    return policy_loss(logp, logp, torch.tensor([1.0]), full(logp), weight, base, **options)


def test_credit_moves_the_policy_term_only():
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    weight = torch.tensor([[0.1, 0.9]])
    entropy = -logp * logp.exp()
    bare, _ = plain(logp, weight)
    assert torch.equal(gradient(bare, logp), torch.tensor([[-0.1, -0.9]]))
    # the KL to a reference of logp + ln 2 has the gradient 1 − 2 per token, weighted ½ each
    kl, _ = plain(logp, weight, ref_logp=logp.detach() + LN2, beta=1.0)
    torch.testing.assert_close(gradient(kl, logp) - gradient(bare, logp), torch.tensor([[-0.5, -0.5]]))
    # minimising the loss raises the entropy
    bonus, _ = plain(logp, weight, entropy=entropy, entropy_coef=1.0)
    raised = gradient(bonus, logp) - gradient(bare, logp)
    torch.testing.assert_close(raised, -0.5 * gradient(entropy.sum(), logp))


def test_reference_and_entropy_are_only_measured_without_a_coefficient():
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    weight = torch.full((1, 2), 0.5)
    bare, few = plain(logp, weight)
    loss, metrics = plain(logp, weight, ref_logp=logp.detach() + LN2, entropy=torch.tensor([[1.0, 2.0]]))
    assert few.keys() == {"loss", "ratio", "clip_ratio"}
    torch.testing.assert_close(metrics["kl"].item(), 1 - LN2)
    torch.testing.assert_close(metrics["entropy"].item(), 1.5)
    assert torch.equal(loss, bare) and torch.equal(gradient(loss, logp), gradient(bare, logp))


def test_missing_tensors_are_named():
    logp = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"beta 0.1 needs ref_logp"):
        plain(logp, logp, beta=0.1)
    with pytest.raises(ValueError, match=r"entropy_coef 0.5 needs entropy"):
        plain(logp, logp, entropy_coef=0.5)


def test_no_gradient_flows_into_weights_and_metrics():
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    weight = torch.tensor([[0.1, 0.9]], requires_grad=True)
    factor = torch.tensor([[0.5, 1.0]], requires_grad=True)
    loss, metrics = plain(logp, weight, ref_logp=torch.zeros(1, 2), beta=0.1, kl_factor=factor)
    loss.backward()
    assert logp.grad is not None and weight.grad is None and factor.grad is None
    assert not any(value.requires_grad for value in metrics.values())


def test_is_float32_for_bfloat16_inputs():
    # −1.1 + 0.013 takes more bits than bfloat16 has, so the difference must be taken in float32
    low = torch.tensor([[-1.1, -2.3]], dtype=torch.bfloat16)
    old, ref = torch.full_like(low, -0.013), torch.full_like(low, -0.017)
    advantage = torch.tensor([0.3], dtype=torch.bfloat16)
    base = torch.full((1, 2), 0.5)

    def losses(cast):
        options = {"surrogate": token_surrogate, "clip_low": 0.2, "clip_high": 0.2, "ref_logp": cast(ref), "beta": 0.1}
        return policy_loss(cast(low), cast(old), cast(advantage), full(low), base, base, **options)[0]

    assert losses(lambda tensor: tensor).dtype == torch.float32
    assert torch.equal(losses(lambda tensor: tensor), losses(lambda tensor: tensor.float()))
    assert token_weights(torch.ones(1, 2, dtype=torch.bfloat16), full(low), "token", 1, 2).dtype == torch.float32
