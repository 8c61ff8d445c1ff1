"""LoRA adapters and gradient checkpointing: what is trained, what the reference is, and what is written."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from transformers import JanusForConditionalGeneration

from gcpo_t2i.cli import main
from gcpo_t2i.config import LoraConfig, LossConfig, RewardConfig, TrainConfig, resolve_algorithm
from gcpo_t2i.data import Prompt
from gcpo_t2i.errors import UserError
from gcpo_t2i.models import load_policy, lora
from gcpo_t2i.models.lora import Adapters, WithoutAdapters
from gcpo_t2i.rollout import Sampling, sample_batch
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.update import Updater
from tests.tiny import tiny_policy, train_command
from tests.tiny_janus import write_tiny_janus

peft = pytest.importorskip("peft", reason="LoRA needs the package peft")
TEXTS = ["a photo of a red circle", "two"]


@pytest.fixture(scope="module")
def janus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture(params=["llamagen", "janus"])
def policy(request: pytest.FixtureRequest, janus: Path) -> Any:
    return tiny_policy() if request.param == "llamagen" else load_policy(janus)


def codes() -> Tensor:
    return torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))


def logp(policy: Any) -> Tensor:
    with torch.no_grad():
        return policy.logp(policy.condition(TEXTS), codes()).logp


def moved(policy: Any, **changes: Any) -> Adapters:
    """Adapters that change something, as after training."""
    adapters = Adapters.add(policy, LoraConfig(**{"rank": 4, **changes}), "base", seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.trainable(policy):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapters


# ---- what an adapter is


def test_adapters_start_at_zero_and_are_all_that_is_trained(policy: Any) -> None:
    before = logp(policy)
    linear = {name: m for name, m in policy.trunk.named_modules() if isinstance(m, torch.nn.Linear)}
    Adapters.add(policy, LoraConfig(rank=4), "base", seed=0)
    assert torch.equal(logp(policy), before)
    chosen = lora.trainable(policy)
    assert len(linear) == 14 and len(chosen) == 28  # 2 layers of 7 projections; A and B of each
    assert sum(p.numel() for p in chosen) == sum(4 * (m.in_features + m.out_features) for m in linear.values())
    assert {id(p) for p in chosen} == {id(p) for p in policy.parameters() if p.requires_grad}
    policy.logp(policy.condition(TEXTS), codes()).logp.sum().backward()
    assert all(p.grad is not None for p in chosen)


def test_adapters_are_scaled_by_alpha_over_rank(policy: Any) -> None:
    projection = policy.trunk.layers[0].mlp.up_proj
    weight = projection.weight.detach().clone()
    moved(policy, alpha=6.0, targets=["up_proj"])
    layer = policy.trunk.layers[0].mlp.up_proj
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), x @ (weight + 6.0 / 4 * delta).T, atol=1e-5, rtol=1e-5)
    assert isinstance(policy.trunk.layers[0].mlp.down_proj, torch.nn.Linear)


def test_sampling_uses_the_adapters(policy: Any) -> None:
    def sampled() -> Any:
        cond = policy.condition(TEXTS)
        null = policy.condition([None] * 2, like=cond)
        return cond, policy.sample(cond, null, group=1, guidance=2.0, generator=torch.Generator().manual_seed(0))

    _, plain = sampled()
    moved(policy)
    cond, rollout = sampled()
    assert not torch.equal(rollout.tokens, plain.tokens)
    torch.testing.assert_close(policy.logp(cond, rollout.tokens).logp, rollout.cond_logp, atol=1e-4, rtol=0)


def test_the_vision_encoder_gets_no_adapters(janus: Path) -> None:
    policy: Any = load_policy(janus)  # its vision encoder has q_proj, k_proj and v_proj of its own
    moved(policy)
    names = [name for name, _ in policy.named_parameters() if ".lora_" in name]
    assert names and all(name.startswith("model.model.language_model.layers.") for name in names)


def test_the_same_seed_gives_the_same_adapters() -> None:
    def start(seed: int) -> list[Tensor]:
        policy = tiny_policy()
        Adapters.add(policy, LoraConfig(rank=4), "base", seed)
        return [p.detach() for p in lora.trainable(policy)]

    torch.manual_seed(5)
    one = start(3)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(one, start(3), strict=True))
    assert not torch.equal(one[0], start(4)[0])


def test_adapters_beside_bfloat16_weights_are_float32(janus: Path) -> None:
    policy: Any = load_policy(janus, dtype=torch.bfloat16)
    Adapters.add(policy, LoraConfig(rank=2), "base", seed=0)
    assert {p.dtype for p in lora.trainable(policy)} == {torch.float32}
    assert policy.trunk.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        scores = policy.logp(policy.condition(TEXTS), codes())
    assert scores.logp.dtype == torch.float32 and scores.logp.requires_grad


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj", "qproj"],
            "'qproj' matches no linear layer of the trunk; did you mean 'q_proj'.; known: down_proj, gate",
        ),
        (["attn"], "'attn' matches no linear layer of the trunk; known: down_proj, gate_proj, k_proj, o_proj, q_proj"),
    ],
)
def test_a_target_that_matches_nothing(targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Adapters.add(tiny_policy(), LoraConfig(rank=2, targets=targets), "base", seed=0)


# ---- reference, merge, files


def test_the_reference_is_the_policy_without_its_adapters(policy: Any) -> None:
    before = logp(policy)
    adapters = moved(policy)
    changed = logp(policy)
    assert (changed - before).abs().max() > 1e-2
    reference: Any = WithoutAdapters(policy, adapters)
    torch.testing.assert_close(reference.logp(policy.condition(TEXTS), codes()).logp, before)
    assert torch.equal(logp(policy), changed) and all(p.requires_grad for p in lora.trainable(policy))


def test_merging_keeps_what_was_learned(policy: Any, tmp_path: Path) -> None:
    adapters = moved(policy)
    learned, names = logp(policy), {name.replace(".base_layer", "") for name, _ in policy.named_parameters()}
    adapters.merge()
    torch.testing.assert_close(logp(policy), learned, atol=1e-4, rtol=0)
    assert {name for name, _ in policy.named_parameters()} == {name for name in names if ".lora_" not in name}
    policy.save_pretrained(tmp_path)
    torch.testing.assert_close(logp(load_policy(tmp_path)), learned, atol=1e-4, rtol=0)


def test_saved_adapters_are_read_by_peft(janus: Path, tmp_path: Path) -> None:
    policy: Any = load_policy(janus)
    folder = tmp_path / "adapter"
    moved(policy).save(folder)
    learned = logp(policy)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert len(load_file(folder / "adapter_model.safetensors")) == 28
    again: Any = load_policy(janus)
    peft.PeftModel.from_pretrained(again.model, folder)
    torch.testing.assert_close(logp(again), learned, atol=1e-5, rtol=0)
    assert "JanusForConditionalGeneration of transformers" in (folder / "README.md").read_text()


# ---- steps


def one_update(policy: Any, reference: Any, reward_file: Path, **settings: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """Metrics and gradients of an update on 2 × 4 images; those are sampled by a policy of fixed weights."""
    config = TrainConfig(micro_batch_size=3, loss=LossConfig(beta=0.1 if reference else 0.0), **settings)
    algorithm, credit_settings = resolve_algorithm(config)
    rewards = RewardSet.load([RewardConfig(f"{reward_file}:bright")])
    batch = sample_batch(
        policy, [Prompt(text) for text in TEXTS], rewards, Sampling(4, 2.0), torch.Generator().manual_seed(0)
    )
    mask = torch.ones_like(batch.rollout.tokens, dtype=torch.bool)
    credit = algorithm.credit.fn(batch.tensors(), mask, credit_settings, [])
    update = Updater(policy, reference, config, algorithm, Accelerator(cpu=True))
    before = [p.detach().clone() for p in update.parameters]
    update.optimizer = torch.optim.SGD(update.parameters)  # whose step is the gradient
    metrics, _ = update(batch, algorithm.advantage(batch.rewards).flatten(), credit, lr=1.0)
    return metrics, [p.detach() - old for p, old in zip(update.parameters, before, strict=True)]


def test_a_reference_without_adapters_gives_the_step_of_a_frozen_copy(policy: Any, reward_file: Path) -> None:
    twin, start = copy.deepcopy(policy), copy.deepcopy(policy).requires_grad_(False)
    adapters, _ = moved(policy), moved(twin)
    one, ours = one_update(policy, WithoutAdapters(policy, adapters), reward_file)
    two, theirs = one_update(twin, start, reward_file)
    assert one["kl"] > 1e-3 and one["kl"] == pytest.approx(two["kl"], rel=1e-5)
    assert max(gradient.abs().max() for gradient in theirs) > 1e-4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("rank", [None, 4])
def test_gradient_checkpointing_changes_no_bit(
    policy: Any, rank: int | None, reward_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = copy.deepcopy(policy)
    if rank:
        moved(policy), moved(twin)
    passes: list[int] = []
    for layer in twin.trunk.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: passes.append(1) if torch.is_grad_enabled() else None)
    _, plain = one_update(policy, None, reward_file)
    _, again = one_update(twin, None, reward_file, gradient_checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(passes) == 3 * 2 * 2  # micro-batches, layers; forward, and again in the backward pass
    assert not any(layer.training or layer.gradient_checkpointing for layer in twin.trunk.layers)


# ---- runs


def test_a_run_with_adapters(janus: Path, reward_file: Path, tmp_path: Path) -> None:
    options = [
        "--lora.rank",
        "2",
        "--gradient_checkpointing",
        "--optim.learning_rate",
        "1e-2",
        "--eval.num_prompts",
        "1",
    ]
    assert main([*train_command(janus, reward_file, tmp_path), *options]) == 0
    run = tmp_path / "run"
    trained = load_file(run / "checkpoint-3" / "model.safetensors")
    assert len(trained) == 28 and all(".lora_" in name for name in trained)
    kl = [json.loads(line).get("kl") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(value for value in kl if value is not None) > 1e-4
    _, info = JanusForConditionalGeneration.from_pretrained(run / "policy", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    adapted: Any = load_policy(janus)
    peft.PeftModel.from_pretrained(adapted.model, run / "adapter")
    torch.testing.assert_close(logp(load_policy(run / "policy")), logp(adapted), atol=1e-4, rtol=0)
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(janus)


def test_a_killed_run_with_adapters_ends_as_one_that_was_left_alone(
    tiny_folder: Path, reward_file: Path, tmp_path: Path
) -> None:
    options = ["--lora.rank", "2", "--save_every", "2", "--eval.num_prompts", "1"]
    assert main([*train_command(tiny_folder, reward_file, tmp_path), *options]) == 0
    weights = tmp_path / "run" / "policy" / "trunk" / "model.safetensors"
    whole = load_file(weights)
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    assert main(["train", "--output_dir", str(tmp_path / "run"), "--resume"]) == 0
    again = load_file(weights)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_without_peft(monkeypatch: pytest.MonkeyPatch, reward_file: Path, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert main([*train_command(tmp_path, reward_file, tmp_path), "--lora.rank", "2"]) == 2
    assert 'lora.rank needs the package peft; pip install "gcpo-t2i[lora]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
