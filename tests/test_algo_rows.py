from __future__ import annotations

import ast
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import gcpo_t2i.algo
from gcpo_t2i.algo.advantage import group_advantage
from gcpo_t2i.algo.credit import CREDITS, CreditRule, CreditSettings
from gcpo_t2i.algo.critical import CRITICAL, confidence_weight
from gcpo_t2i.algo.edits import all_failed
from gcpo_t2i.algo.loss import SURROGATES, policy_loss, token_weights
from gcpo_t2i.algo.rows import ROWS, Algorithm, needs, resolve

SETTINGS = CreditSettings()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def loss_and_gradient(
    algorithm: Algorithm, settings: CreditSettings = SETTINGS, vectors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One update of 2 groups of 3 samples with 4 tokens, slightly off-policy: loss, gradient in logp (6,4), credit."""
    draw = generator()
    cond = -torch.rand(6, 4, generator=draw) - 1
    tensors = {"cond_logp": cond, "null_logp": cond - torch.rand(6, 4, generator=draw) * 2 - 0.1, "entropy": -cond}
    mask = torch.ones(6, 4, dtype=torch.bool)
    advantage = algorithm.advantage(torch.rand(2, 3, generator=draw)).flatten()
    vectors = torch.randn(2, 3, 2, 2, 5, generator=generator()) if vectors is None else vectors
    tensors |= {"advantage": advantage.view(2, 3), "code_vectors": vectors}
    logp = (cond + 0.01 * torch.randn(6, 4, generator=draw)).requires_grad_()
    credit = algorithm.credit.fn(tensors, mask, settings, [torch.Generator().manual_seed(i) for i in range(6)])
    loss, _ = policy_loss(
        logp,
        cond,
        advantage,
        mask,
        token_weights(credit, mask, algorithm.averaging, 6, 24),
        token_weights(torch.ones_like(credit), mask, algorithm.averaging, 6, 24),
        surrogate=algorithm.surrogate.fn,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
    )
    loss.backward()
    assert logp.grad is not None
    return loss.detach(), logp.grad, credit


def edits(row: Algorithm) -> set[str]:
    return {name for name in ("keep", "rescue", "select", "reweight") if getattr(row, name) is not None}


def test_the_table_of_algorithms():
    parts = {
        name: (row.credit.name, row.surrogate.name, row.averaging, row.clip_low, row.clip_high, edits(row))
        for name, row in ROWS.items()
    }
    assert parts == {
        "grpo": ("uniform", "token", "sequence", 0.2, 0.2, set()),
        "dapo": ("uniform", "token", "token", 0.2, 0.28, {"keep"}),
        "gspo": ("uniform", "sequence", "sequence", 3e-4, 4e-4, set()),
        "guidance_gcpo": ("guidance", "token", "sequence", 0.2, 0.2, set()),
        "random_credit": ("random", "token", "sequence", 0.2, 0.2, set()),
        "stage": ("stage", "token", "sequence", 0.2, 0.2, set()),
        "entropy_credit": ("entropy", "token", "sequence", 0.2, 0.2, set()),
        "gold_gcpo": ("uniform", "sequence", "sequence", 3e-4, 4e-4, {"rescue"}),
        "critical_gcpo": ("uniform", "token", "sequence", 0.2, 0.2, {"select", "reweight"}),
    }
    assert ROWS["gold_gcpo"].rescue is all_failed
    assert (ROWS["critical_gcpo"].select, ROWS["critical_gcpo"].reweight) == (CRITICAL, confidence_weight)
    assert all(row.advantage is group_advantage for row in ROWS.values())


@pytest.mark.parametrize("name", ["guidance_gcpo", "random_credit", "stage", "entropy_credit"])
def test_differs_from_grpo_in_the_credit_and_in_nothing_else(name):
    labels = {"name": ROWS["grpo"].name, "paper": ROWS["grpo"].paper}
    assert dataclasses.replace(ROWS[name], credit=CREDITS["uniform"], **labels) == ROWS["grpo"]


def test_dapo_keeps_groups_whose_rewards_differ():
    keep = ROWS["dapo"].keep
    assert keep is not None
    rewards = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.7, 0.7, 0.6]])
    assert keep(rewards).tolist() == [False, True, False, True]


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("name", ROWS)
def test_uniform_credit_is_no_credit(name, surrogate):
    # A credit that is 1 everywhere, by whatever rule, leaves the loss and gradient of plain ones.
    row = resolve(name, surrogate=surrogate)
    unweighted = dataclasses.replace(
        row, credit=CreditRule("ones", lambda tensors, mask, settings, generator: mask.float(), lambda s: frozenset())
    )
    flat = CreditSettings(top=0.4, mass=0.4)  # α = 0: every rank weighs the same
    alike = torch.ones(2, 3, 2, 2, 5)
    for algorithm in (resolve(name, surrogate=surrogate, credit=credit) for credit in CREDITS):
        loss, gradient, credit = loss_and_gradient(algorithm, flat, alike)
        expected_loss, expected_gradient, _ = loss_and_gradient(unweighted)
        torch.testing.assert_close(credit, torch.ones(6, 4))
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("credit", CREDITS)
def test_any_credit_goes_with_any_surrogate(credit, surrogate):
    # Credit scales the gradient of each token, whatever the surrogate.
    wide = resolve("dapo", surrogate=surrogate, clip_low=1.0, clip_high=100.0)
    _, gradient, weight = loss_and_gradient(dataclasses.replace(wide, credit=CREDITS[credit]))
    _, plain, _ = loss_and_gradient(wide)
    assert plain.abs().max() > 0
    torch.testing.assert_close(gradient, plain * weight)


def test_a_new_rule_is_a_function_and_a_record():
    def first_half(tensors, mask, settings, generator):
        early = torch.arange(mask.shape[1]) < mask.shape[1] // 2
        return 2.0 * (mask & early)

    rule = CreditRule("first_half", first_half, lambda settings: frozenset({"entropy"}))
    for base in ("grpo", "gspo"):
        algorithm = dataclasses.replace(ROWS[base], credit=rule, clip_low=1.0, clip_high=9.0)
        _, gradient, _ = loss_and_gradient(algorithm)
        _, plain, _ = loss_and_gradient(dataclasses.replace(ROWS[base], clip_low=1.0, clip_high=9.0))
        torch.testing.assert_close(gradient[:, :2], 2 * plain[:, :2])
        assert (gradient[:, 2:] == 0).all()
        assert needs(algorithm, SETTINGS, beta=0.1) == {"entropy", "ref_logp"}
    assert "first_half" not in CREDITS


def test_resolve_replaces_single_parts():
    assert resolve("guidance_gcpo") == ROWS["guidance_gcpo"]
    changed = resolve("dapo", credit="guidance", averaging="sequence", clip_low=0.1, clip_high=0.5)
    expected = dataclasses.replace(
        ROWS["dapo"], credit=CREDITS["guidance"], averaging="sequence", clip_low=0.1, clip_high=0.5
    )
    assert changed == expected


def test_another_surrogate_brings_its_clip_range():
    gspo_like = resolve("dapo", surrogate="sequence")
    assert (gspo_like.clip_low, gspo_like.clip_high) == (3e-4, 4e-4)
    back = resolve("gspo", surrogate="token", clip_high=0.3)
    assert (back.surrogate.name, back.clip_low, back.clip_high) == ("token", 0.2, 0.3)
    assert resolve("dapo", surrogate="token") == ROWS["dapo"]  # its own 0.28 stays


def test_advantage_scale_is_replaced():
    # group mean 1, so ±1 without division; with it the std is sqrt(2)
    rewards = torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(resolve("grpo", advantage_scale="none").advantage(rewards), torch.tensor([[-1.0, 1.0]]))
    divided = 1 / (2**0.5 + 1e-4)
    for algorithm in (resolve("grpo"), resolve("grpo", advantage_scale="group")):
        torch.testing.assert_close(algorithm.advantage(rewards), torch.tensor([[-divided, divided]]))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("guidance_gpco", {}, "unknown algorithm 'guidance_gpco'; did you mean 'guidance_gcpo'?"),
        ("xyz", {}, "unknown algorithm 'xyz'; known: critical_gcpo, dapo, entropy_credit, gold_gcpo, grpo, gspo, "),
        ("grpo", {"credit": "guidence"}, "unknown credit rule 'guidence'; did you mean 'guidance'?"),
        ("grpo", {"surrogate": "tokens"}, "unknown surrogate 'tokens'; did you mean 'token'?"),
        ("grpo", {"averaging": "sequences"}, "unknown averaging 'sequences'; did you mean 'sequence'?"),
        ("grpo", {"advantage_scale": "Batch"}, "unknown advantage scale 'Batch'; did you mean 'batch'?"),
        ("grpo", {"clip_low": 1.5}, "0 < clip_low <= 1 and clip_high > 0, got 1.5 and 0.2"),
        ("grpo", {"clip_low": 0.0}, "got 0.0 and 0.2"),
        ("grpo", {"clip_high": -0.1}, "got 0.2 and -0.1"),
    ],
)
def test_wrong_parts_are_named(name, override, message):
    with pytest.raises(ValueError) as error:
        resolve(name, **override)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "contrast", "beta", "expected"),
    [
        ("grpo", "k3", 0.0, set()),
        ("grpo", "k3", 0.1, {"ref_logp"}),
        ("guidance_gcpo", "k3", 0.0, {"cond_logp", "null_logp"}),
        ("guidance_gcpo", "exact_kl", 0.1, {"exact_kl", "ref_logp"}),
        ("random_credit", "js", 0.0, {"js"}),
        ("stage", "k3", 0.0, {"advantage", "code_vectors"}),
        ("entropy_credit", "k3", 0.0, {"entropy"}),
        ("gold_gcpo", "k3", 0.0, set()),
        ("critical_gcpo", "k3", 0.0, {"entropy", "code_vectors", "ref_logp"}),
    ],
)
def test_needs(name, contrast, beta, expected):
    assert needs(ROWS[name], CreditSettings(contrast=contrast), beta) == expected
    assert needs(ROWS[name], CreditSettings(contrast=contrast), beta, entropy_reward=0.4) == expected | {"ref_logp"}


def test_imports_only_torch_and_the_standard_library():
    files = list(Path(gcpo_t2i.algo.__file__ or "").parent.glob("*.py"))
    assert len(files) >= 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top == "torch" or top in sys.stdlib_module_names or name.startswith("gcpo_t2i.algo")
