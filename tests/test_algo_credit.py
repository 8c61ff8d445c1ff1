from __future__ import annotations

import itertools
import math

import pytest
import torch

from gcpo_t2i.algo.credit import (
    CONTRASTS,
    CREDITS,
    NORMALIZERS,
    CreditSettings,
    entropy,
    evidence,
    exact_kl,
    js,
    top_mass,
)

ALPHA = math.log(0.2) / math.log(0.6) - 1  # top 0.4, mass 0.8
LEGAL = [
    (contrast, normalizer)
    for contrast, normalizer in itertools.product(CONTRASTS, NORMALIZERS)
    if NORMALIZERS[normalizer].signed or not CONTRASTS[contrast].signed
]
MEAN_ONE = [pair for pair in LEGAL if pair[1] != "none"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [generator(1000 * seed + row) for row in range(count)]


def rollout(batch: int = 3, tokens: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = generator(1)
    names = ("cond_logp", "null_logp", "exact_kl", "js")
    signs = (-1, -1, 1, 1)
    return {
        n: s * torch.rand(batch, tokens, generator=draw).mul(4).to(dtype) for n, s in zip(names, signs, strict=True)
    }


def from_evidence(values: list[list[float]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A rollout whose `exact_kl` is the given evidence, all tokens valid."""
    tensor = torch.tensor(values)
    return {"exact_kl": tensor}, torch.ones_like(tensor, dtype=torch.bool)


def guidance(tensors, mask, **settings) -> torch.Tensor:
    return CREDITS["guidance"].fn(tensors, mask, CreditSettings(**settings), [])


def all_valid(tensors) -> torch.Tensor:
    return torch.ones_like(next(iter(tensors.values())), dtype=torch.bool)


# --- full-vocabulary statistics --------------------------------------------------------------------------------------


def test_exact_kl_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): ½ ln 2 + ½ ln(2/3); the other way round ¼ ln(1/2) + ¾ ln(3/2)
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    torch.testing.assert_close(exact_kl(p, q).item(), 0.5 * math.log(2) + 0.5 * math.log(2 / 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(exact_kl(q, p).item(), 0.25 * math.log(0.5) + 0.75 * math.log(1.5), atol=1e-6, rtol=0)


def test_js_by_hand():
    # p = (1/2, 1/2), q = (1, 0), m = (3/4, 1/4): KL(p‖m) = ½ ln(2/3) + ½ ln 2, KL(q‖m) = ln(4/3)
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    expected = 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2)) + 0.5 * math.log(4 / 3)
    torch.testing.assert_close(js(p, q).item(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(js(q, p).item(), expected, atol=1e-6, rtol=0)


def test_js_of_disjoint_predictions_is_ln_2():
    torch.testing.assert_close(js(torch.tensor([0.0, -80.0]), torch.tensor([-80.0, 0.0])).item(), math.log(2))


def test_entropy_by_hand():
    # ½ ln 2 + 2 · ¼ ln 4 = 1.5 ln 2
    logits = torch.tensor([0.5, 0.25, 0.25]).log() + 3  # a constant changes nothing
    torch.testing.assert_close(entropy(logits).item(), 1.5 * math.log(2))


def test_statistics_keep_leading_shape_are_float32_and_zero_for_equal_rows():
    logits = torch.randn(2, 3, 11, generator=generator(), dtype=torch.float32).bfloat16()
    for value in (exact_kl(logits, logits), js(logits, logits), entropy(logits)):
        assert value.shape == (2, 3) and value.dtype == torch.float32
    torch.testing.assert_close(exact_kl(logits, logits), torch.zeros(2, 3))
    torch.testing.assert_close(js(logits, logits), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy(logits), entropy(logits.float()))


def test_statistics_are_float32_under_autocast_as_well():
    """Rollouts run under it, and it lowers the products that it knows."""
    p, q = torch.randn(2, 3, 11, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        lower = exact_kl(p, q), js(p, q), entropy(p)
    for found, expected in zip(lower, (exact_kl(p, q), js(p, q), entropy(p)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_ruled_out_codes_count_for_nothing():
    row = torch.tensor([1.0, 2.0, -torch.inf], requires_grad=True)
    other = torch.tensor([2.0, 0.5, -torch.inf])
    torch.testing.assert_close(entropy(row), entropy(row[:2]))
    torch.testing.assert_close(exact_kl(row, other), exact_kl(row[:2], other[:2]))
    torch.testing.assert_close(js(row, other), js(row[:2], other[:2]))
    (gradient,) = torch.autograd.grad(entropy(row), row)
    short = row[:2].detach().requires_grad_()
    torch.testing.assert_close(gradient[:2], torch.autograd.grad(entropy(short), short)[0])
    assert gradient[2] == 0


# --- contrasts -------------------------------------------------------------------------------------------------------


def test_contrasts_by_hand():
    # token 1: π(y|x) = 1/2, π(y|x⁻) = 1/4, so δ = −ln 2; token 2 the other way round, δ = +ln 2
    tensors = {
        "cond_logp": torch.tensor([[0.5, 0.25]]).log(),
        "null_logp": torch.tensor([[0.25, 0.5]]).log(),
        "exact_kl": torch.tensor([[0.3, 0.2]]),
        "js": torch.tensor([[0.1, 0.4]]),
    }
    ln2 = math.log(2)
    expected = {
        "k3": [0.5 + ln2 - 1, 2 - ln2 - 1],
        "abs": [ln2, ln2],
        "log_ratio": [ln2, -ln2],
        "exact_kl": [0.3, 0.2],
        "js": [0.1, 0.4],
    }
    assert expected.keys() == CONTRASTS.keys()
    for name, values in expected.items():
        settings = CreditSettings(contrast=name)
        torch.testing.assert_close(evidence(tensors, all_valid(tensors), settings), torch.tensor([values]))


def test_k3_is_cut_at_a_log_ratio_of_20():
    tensors = {"cond_logp": torch.tensor([[-30.0, 0.0]]), "null_logp": torch.tensor([[0.0, -30.0]])}
    expected = torch.tensor([[math.exp(20) - 21, math.exp(-20) + 19]])
    torch.testing.assert_close(evidence(tensors, all_valid(tensors), CreditSettings()), expected)


def test_k3_of_a_small_gap_is_not_lost_to_rounding():
    # δ²/2 + δ³/6; exp(δ) − δ − 1 in float32 is off by more than a tenth here
    delta = 1e-3
    tensors = {"cond_logp": torch.tensor([[0.0]]), "null_logp": torch.tensor([[delta]])}
    found = evidence(tensors, all_valid(tensors), CreditSettings()).item()
    torch.testing.assert_close(found, delta**2 / 2 + delta**3 / 6, rtol=1e-3, atol=0)


def test_contrasts_read_what_they_declare_and_say_what_is_missing():
    tensors = rollout()
    mask = all_valid(tensors)
    for name, contrast in CONTRASTS.items():
        settings = CreditSettings(contrast=name)
        declared = {key: tensors[key] for key in contrast.needs}
        assert torch.equal(evidence(declared, mask, settings), evidence(tensors, mask, settings))
        for key in contrast.needs:
            with pytest.raises(ValueError, match=f"contrast '{name}' needs {key}, the rollout has "):
                evidence({k: v for k, v in declared.items() if k != key}, mask, settings)


def test_evidence_at_invalid_tokens_is_zero():
    tensors = {"exact_kl": torch.tensor([[2.0, torch.nan, 3.0]])}
    mask = torch.tensor([[True, False, False]])
    assert evidence(tensors, mask, CreditSettings(contrast="exact_kl")).tolist() == [[2.0, 0.0, 0.0]]


def test_evidence_has_no_gradient():
    tensors = {name: value.requires_grad_() for name, value in rollout().items()}
    assert not evidence(tensors, all_valid(tensors), CreditSettings()).requires_grad


# --- normalizers -----------------------------------------------------------------------------------------------------


def test_power_rank_by_hand():
    # p^α for p = 0.2 … 1 with α = 2.15066: 0.03139, 0.13937, 1/3 (0.6^α = 0.2/0.6), 0.61884, 1; mean 0.42459
    credit = guidance(*from_evidence([[0.1, 7.0, 0.2, 900.0, 0.3]]), contrast="exact_kl")
    expected = torch.tensor([[0.07392, 1.45752, 0.32825, 2.35523, 0.78508]])
    torch.testing.assert_close(credit, expected, atol=2e-5, rtol=0)


def test_power_rank_gives_tied_tokens_the_average_rank():
    # ranks 1½, 1½, 4, 4, 4, 6 of 6
    credit = guidance(*from_evidence([[2.0, 5.0, 2.0, 5.0, 9.0, 5.0]]), contrast="exact_kl")
    raw = [(rank / 6) ** ALPHA for rank in (1.5, 4, 1.5, 4, 6, 4)]
    torch.testing.assert_close(credit, torch.tensor([raw]) * 6 / sum(raw))
    assert credit[0, 0] == credit[0, 2] and credit[0, 1] == credit[0, 3] == credit[0, 5]


def test_ten_tied_tokens_get_equal_credit():
    tensors = {"cond_logp": torch.full((1, 10), -9.0), "null_logp": torch.full((1, 10), -4.0)}
    credit = guidance(tensors, all_valid(tensors))
    torch.testing.assert_close(credit, torch.ones(1, 10))
    assert (credit == credit[0, 0]).all()


def test_evidence_is_ranked_before_any_clamp():
    # δ = 3 … 12: all of η is above 10 and all of it is different
    tensors = {"cond_logp": torch.zeros(1, 10), "null_logp": torch.arange(3.0, 13.0)[None]}
    assert (guidance(tensors, all_valid(tensors)).diff() > 0).all()


@pytest.mark.parametrize(("top", "mass"), [(0.4, 0.8), (0.2, 0.9), (0.1, 0.5)])
def test_power_rank_gives_top_the_mass(top, mass):
    values = torch.randperm(2000, generator=generator()).float()[None]
    credit = guidance({"exact_kl": values}, all_valid({"": values}), contrast="exact_kl", top=top, mass=mass)
    torch.testing.assert_close(credit.mean().item(), 1.0, atol=1e-6, rtol=0)
    torch.testing.assert_close(top_mass(credit, credit > 0, top).item(), mass, atol=1e-3, rtol=0)


def test_mean_by_hand():
    # mean 2
    credit = guidance(*from_evidence([[0.0, 1.0, 5.0]]), contrast="exact_kl", normalizer="mean")
    torch.testing.assert_close(credit, torch.tensor([[0.0, 0.5, 2.5]]))


def test_softmax_by_hand():
    # exp of the evidence is 1, 2, 3, sum 6, times 3 tokens; at temperature 2 the square roots of those
    tensors, mask = from_evidence([[0.0, math.log(2), math.log(3)]])
    credit = guidance(tensors, mask, contrast="exact_kl", normalizer="softmax")
    torch.testing.assert_close(credit, torch.tensor([[0.5, 1.0, 1.5]]))
    credit = guidance(tensors, mask, contrast="exact_kl", normalizer="softmax", temperature=2.0)
    roots = torch.tensor([[1.0, 2.0, 3.0]]).sqrt()
    torch.testing.assert_close(credit, roots * 3 / roots.sum())


def test_none_is_the_raw_evidence():
    tensors, mask = from_evidence([[0.0, 1.0, 5.0]])
    assert torch.equal(guidance(tensors, mask, contrast="exact_kl", normalizer="none"), tensors["exact_kl"])


@pytest.mark.parametrize(("contrast", "normalizer"), MEAN_ONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_one_over_valid_tokens_and_nothing_elsewhere(contrast, normalizer, dtype):
    tensors = rollout(dtype=dtype)
    mask = torch.tensor([[True] * 7, [False, True, True, False, True, True, False], [True] + [False] * 6])
    credit = guidance(tensors, mask, contrast=contrast, normalizer=normalizer)
    assert credit.dtype == torch.float32 and (credit >= 0).all() and (credit[~mask] == 0).all()
    torch.testing.assert_close(credit.sum(dim=1) / mask.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize(("contrast", "normalizer"), LEGAL)
def test_invalid_tokens_do_not_change_the_credit_of_valid_ones(contrast, normalizer):
    tensors = rollout(batch=1, tokens=5)
    longer = {name: torch.cat([v, torch.tensor([[torch.nan, 99.0]])], dim=1) for name, v in tensors.items()}
    mask = torch.tensor([[True] * 5 + [False] * 2])
    short = guidance(tensors, mask[:, :5], contrast=contrast, normalizer=normalizer)
    padded = guidance(longer, mask, contrast=contrast, normalizer=normalizer)
    torch.testing.assert_close(padded[:, :5], short)
    assert (padded[:, 5:] == 0).all()


@pytest.mark.parametrize(("contrast", "normalizer"), LEGAL)
def test_credit_moves_with_its_token(contrast, normalizer):
    tensors = rollout(tokens=9)
    mask = all_valid(tensors)
    mask[1, 4:] = False
    order = torch.randperm(9, generator=generator(3))
    credit = guidance(tensors, mask, contrast=contrast, normalizer=normalizer)
    moved = {name: value[:, order] for name, value in tensors.items()}
    torch.testing.assert_close(
        guidance(moved, mask[:, order], contrast=contrast, normalizer=normalizer), credit[:, order]
    )


@pytest.mark.parametrize(("contrast", "normalizer"), MEAN_ONE)
def test_equal_evidence_is_uniform_credit(contrast, normalizer):
    # The negative prompt is the prompt: every contrast is 0 everywhere.
    logp = -torch.rand(2, 6, generator=generator())
    zero = torch.zeros(2, 6)
    tensors = {"cond_logp": logp, "null_logp": logp, "exact_kl": zero, "js": zero}
    credit = guidance(tensors, all_valid(tensors), contrast=contrast, normalizer=normalizer)
    torch.testing.assert_close(credit, torch.ones(2, 6))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_sample_without_valid_tokens_gets_nothing(normalizer):
    tensors = rollout(batch=1)
    mask = torch.zeros(1, 7, dtype=torch.bool)
    assert torch.equal(guidance(tensors, mask, normalizer=normalizer), torch.zeros(1, 7))


def test_infinite_evidence_ranks_highest_and_nan_is_not_hidden():
    # Two invalid tokens must not be counted as ties of the infinite one: ranks 1, 2 of 2.
    values = torch.tensor([[1.0, torch.inf, 5.0, 5.0], [1.0, torch.nan, 5.0, 5.0]])
    mask = torch.tensor([[True, True, False, False], [True, True, False, False]])
    credit = guidance({"exact_kl": values}, mask, contrast="exact_kl")
    low = 0.5**ALPHA
    torch.testing.assert_close(credit[0], torch.tensor([low, 1, 0, 0]) * 2 / (1 + low))
    assert credit[1, :2].isnan().all()


@pytest.mark.parametrize("contrast", ["k3", "abs", "log_ratio"])
def test_log_probs_are_subtracted_in_float32(contrast):
    # In bfloat16 −8 − 0.0078125 is −8 again, so both tokens would tie.
    tensors = {
        "cond_logp": torch.tensor([[-8.0, -8.0]], dtype=torch.bfloat16),
        "null_logp": torch.tensor([[0.0078125, 0.0]], dtype=torch.bfloat16),
    }
    as_float = {name: value.float() for name, value in tensors.items()}
    credit = guidance(tensors, all_valid(tensors), contrast=contrast)
    assert credit.dtype == torch.float32 and credit[0, 0] != credit[0, 1]
    assert torch.equal(credit, guidance(as_float, all_valid(tensors), contrast=contrast))


# --- rules -----------------------------------------------------------------------------------------------------------


def test_uniform_is_one_at_valid_tokens():
    mask = torch.tensor([[True, False, True]])
    credit = CREDITS["uniform"].fn({}, mask, CreditSettings(), [])
    assert torch.equal(credit, torch.tensor([[1.0, 0.0, 1.0]]))


def test_random_is_a_shuffle_of_guidance_over_valid_positions():
    tensors = rollout(batch=4, tokens=50)
    mask = torch.rand(4, 50, generator=generator(5)) < 0.7
    credit = guidance(tensors, mask)
    shuffled = CREDITS["random"].fn(tensors, mask, CreditSettings(), generators(4))
    assert (shuffled[~mask] == 0).all() and (shuffled[mask] > 0).all()
    assert torch.equal(shuffled.sort(dim=1).values, credit.sort(dim=1).values)
    assert (shuffled != credit).any(dim=1).all()


def test_random_follows_each_samples_generator():
    tensors = rollout(tokens=30)
    mask = all_valid(tensors)
    rows, fn = len(mask), CREDITS["random"].fn
    first, same, other = (fn(tensors, mask, CreditSettings(), generators(rows, s)) for s in (7, 7, 8))
    assert torch.equal(first, same) and not torch.equal(first, other)
    last = {name: tensor[-1:] for name, tensor in tensors.items()}
    alone = fn(last, mask[-1:], CreditSettings(), generators(rows, 7)[-1:])
    torch.testing.assert_close(alone, first[-1:])  # whatever else is in the batch


def test_random_reaches_every_order_in_every_sample_separately():
    values = torch.tensor([[1.0, 2.0, 4.0]]).expand(200, 3)
    fn = CREDITS["random"].fn
    settings = CreditSettings(contrast="exact_kl", normalizer="none")
    shuffled = fn({"exact_kl": values}, torch.ones(200, 3, dtype=torch.bool), settings, generators(200))
    assert {tuple(row) for row in shuffled.tolist()} == set(itertools.permutations((1.0, 2.0, 4.0)))


def test_needs_of_the_rules():
    settings = CreditSettings(contrast="js")
    assert CREDITS["uniform"].needs(settings) == frozenset()
    assert CREDITS["guidance"].needs(settings) == CREDITS["random"].needs(settings) == {"js"}
    assert CREDITS["guidance"].needs(CreditSettings()) == {"cond_logp", "null_logp"}


# --- settings and metric ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"contrast": "exactkl"}, "unknown contrast 'exactkl'; did you mean 'exact_kl'?"),
        ({"contrast": "zzz"}, "unknown contrast 'zzz'; known: abs, exact_kl, js, k3, log_ratio"),
        ({"normalizer": "rank"}, "unknown normalizer 'rank'; did you mean 'power_rank'?"),
        ({"top": 0.0}, "0 < top <= mass < 1, got top 0.0"),
        ({"mass": 1.0}, "0 < top <= mass < 1"),
        ({"top": 0.9}, "got top 0.9 and mass 0.8"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"contrast": "log_ratio", "normalizer": "mean"}, "normalizer 'mean' would make negative weights"),
        ({"contrast": "log_ratio", "normalizer": "none"}, "signed contrast 'log_ratio'; use the normalizer power_rank"),
    ],
)
def test_settings_say_what_is_wrong(wrong, message):
    with pytest.raises(ValueError) as error:
        CreditSettings(**wrong)
    assert message in str(error.value)


def test_log_ratio_ranks_by_sign():
    tensors = {"cond_logp": torch.tensor([[-1.0, -1.0, -5.0]]), "null_logp": torch.tensor([[-3.0, -1.0, -1.0]])}
    credit = guidance(tensors, all_valid(tensors), contrast="log_ratio")
    assert credit[0, 0] > credit[0, 1] > credit[0, 2]


def test_top_mass_by_hand():
    # 5 tokens, top 40 % = 2 of them: (4 + 3) / 10. Of 4 valid tokens 1.6: (4 + 0.6 · 3) / 9. Uniform: 0.4. None: 0.
    credit = torch.tensor([[0.0, 4.0, 1.0, 3.0, 2.0], [7.0, 4.0, 0.0, 3.0, 2.0], [1.0] * 5, [1.0] * 5])
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 0] = False
    mask[3] = False
    torch.testing.assert_close(top_mass(credit, mask), torch.tensor([0.7, 5.8 / 9, 0.4, 0.0]))
    torch.testing.assert_close(top_mass(credit, mask, top=1.0), torch.tensor([1.0, 1.0, 1.0, 0.0]))
