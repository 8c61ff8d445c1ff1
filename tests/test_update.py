"""One optimizer step must not depend on how many processes share its batch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from gcpo_t2i.algo.credit import CreditSettings
from gcpo_t2i.config import LossConfig, MonitorConfig, RewardConfig, TrainConfig, resolve_algorithm
from gcpo_t2i.data import Prompt
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.rollout import Batch, Sampling, credit_tensors, sample_batch
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.update import Metrics, Updater
from tests.tiny import tiny_policy

PROMPTS = ["a red circle", "two blue square", "a circle and a square", "blue"]


def step(processes: int, reward_file: Path, out: Path) -> None:
    """One update on four groups, of which each process gets its share; the first one writes weights and metrics."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == processes
    config = TrainConfig(micro_batch_size=3, loss=LossConfig(beta=0.1, entropy_coef=0.01))
    algorithm, settings = resolve_algorithm(config)
    policy, reference = tiny_policy(), tiny_policy(seed=1).requires_grad_(False)
    rewards = RewardSet.load([RewardConfig(f"{reward_file}:bright")])
    whole = sample_batch(
        policy, [Prompt(text) for text in PROMPTS], rewards, Sampling(4, 2.0), torch.Generator().manual_seed(0)
    )
    # One group more for the second process than for the first: shares need not be equal.
    batch = whole if processes == 1 else whole.groups([[0], [1, 2, 3]][accelerator.process_index])
    advantage = algorithm.advantage(whole.rewards)
    advantage = advantage if processes == 1 else advantage[[[0], [1, 2, 3]][accelerator.process_index]]
    mask = torch.ones_like(batch.rollout.tokens, dtype=torch.bool)
    credit = algorithm.credit.fn(batch.tensors(), mask, settings, [])
    update = Updater(policy, reference, config, algorithm, accelerator)
    update.optimizer = torch.optim.SGD(update.parameters)  # whose step is the gradient: Adam's is little but its signs
    metrics, _ = update(batch, advantage.flatten(), credit, lr=1.0)
    weights = {name: p.detach().contiguous() for name, p in policy.named_parameters() if p.requires_grad}
    twins = gather_object([sum(w.double().sum().item() for w in weights.values())])
    assert len(set(twins)) == 1, f"the processes went apart: {twins}"
    if accelerator.is_main_process:
        names = ("loss", "kl", "entropy", "grad_norm")
        save_file(weights | {f"metrics/{name}": torch.tensor(metrics[name]) for name in names}, out)
    accelerator.end_training()


def test_critical_tokens_train_alone_and_by_their_weight(reward_file: Path) -> None:
    """The loss of the step against a sum over the selected codes, written out."""
    config = TrainConfig(
        algorithm="critical_gcpo", scoring="conditional", micro_batch_size=3, loss=LossConfig(beta=0.1)
    )
    algorithm, _ = resolve_algorithm(config)
    assert algorithm.select is not None
    policy, reference = tiny_policy(), tiny_policy(seed=1).requires_grad_(False)
    rewards = RewardSet.load([RewardConfig(f"{reward_file}:bright")])
    prompts = [Prompt(text) for text in PROMPTS[:2]]
    batch = sample_batch(
        policy, prompts, rewards, Sampling(4, 2.0), torch.Generator().manual_seed(0), stats=["entropy"]
    )
    advantage = algorithm.advantage(batch.rewards)
    tensors = credit_tensors(policy, batch, advantage, {"code_vectors"})
    batch = replace(batch, selected=algorithm.select.fn(tensors, batch.mask))
    credit = algorithm.credit.fn(tensors, batch.mask, CreditSettings(), [])
    expected, kl, images = 0.0, 0.0, len(batch.images)
    for i in range(images):
        cond = batch.cond[[i // 4]]
        own, other = (model.logp(cond, batch.rollout.tokens[[i]]).logp[0].tolist() for model in (policy, reference))
        chosen, running = batch.mask[i].tolist(), 0.0
        for t, (logp, ref) in enumerate(zip(own, other, strict=True)):
            running += math.exp(min(max(logp - ref, -0.5), 0.5))
            if chosen[t]:
                share = 1 / (images * sum(chosen))
                expected -= advantage.flatten()[i].item() * running / (t + 1) * share
                kl += (math.exp(ref - logp) - (ref - logp) - 1) * share
    update = Updater(policy, reference, config, algorithm, Accelerator(cpu=True))
    metrics, _ = update(batch, advantage.flatten(), credit, lr=0.0)
    assert batch.mask.sum(dim=1).tolist() == [3] * 8
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4)
    assert metrics["loss"] == pytest.approx(expected + 0.1 * kl, rel=1e-4)


def test_entropies_are_those_of_both_models(reward_file: Path) -> None:
    config = TrainConfig(scoring="conditional", micro_batch_size=3, loss=LossConfig(entropy_reward=0.4))
    policy, reference = tiny_policy(), tiny_policy(seed=1).requires_grad_(False)
    rewards = RewardSet.load([RewardConfig(f"{reward_file}:bright")])
    batch = sample_batch(policy, [Prompt("blue"), Prompt("a circle")], rewards, Sampling(2), torch.Generator())
    found = Updater(policy, reference, config, resolve_algorithm(config)[0], Accelerator(cpu=True)).entropies(batch)
    for own, model in zip(found, (policy, reference), strict=True):
        scores = model.logp(batch.cond.repeat_interleave(2), batch.rollout.tokens, entropy=True)
        assert scores.entropy is not None and own.shape == (2, 2)
        torch.testing.assert_close(own.flatten(), scores.entropy.mean(dim=1).detach())


def stepped(policy: LlamaGenPolicy, batch: Batch, advantage: Tensor, config: TrainConfig) -> Metrics:
    """One step of plain gradient descent, and its metrics."""
    update = Updater(policy, None, config, resolve_algorithm(config)[0], Accelerator(cpu=True))
    update.optimizer = torch.optim.SGD(update.parameters)
    return update(batch, advantage, torch.ones_like(batch.rollout.cond_logp), lr=1.0)[0]


def test_images_without_an_advantage_are_left_out_and_the_step_is_the_same(reward_file: Path) -> None:
    """Of 4 images two have an advantage. Their micro-batch is all that is scored; a vanishing entropy bonus has all scored."""
    policies = tiny_policy(), tiny_policy()
    rewards = RewardSet.load([RewardConfig(f"{reward_file}:bright")])
    batch = sample_batch(
        policies[0], [Prompt("blue"), Prompt("a circle")], rewards, Sampling(2, 2.0), torch.Generator()
    )
    advantage = torch.tensor([0.0, 0.7, -0.5, 0.0])
    found, seen = [], []
    for policy, coefficient in zip(policies, (0.0, 1e-30), strict=True):
        policy.trunk.register_forward_pre_hook(
            lambda _, __, inputs: seen.append(len(inputs["inputs_embeds"])), with_kwargs=True
        )
        config = TrainConfig(algorithm="grpo", micro_batch_size=2, loss=LossConfig(entropy_coef=coefficient))
        found.append(stepped(policy, batch, advantage, config))
    assert seen == [2, 2, *(2, 2, 2, 2)]  # the prompt's branch and the null branch of each micro-batch
    for own, other in zip(*(policy.parameters() for policy in policies), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)
    moved, before = (policy.trunk.layers[0].self_attn.v_proj.weight for policy in (policies[0], tiny_policy()))
    assert (moved - before).abs().max() > 1e-4
    for name in ("ratio", "loss", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-6)
    none = stepped(policies[0], batch, torch.zeros(4), TrainConfig(algorithm="grpo"))
    assert (none["grad_norm"], none["skipped"], none["logp_gap/replay"]) == (0.0, 0.0, 0.0)


def test_the_null_branch_of_the_rollout_gives_the_same_step(reward_file: Path) -> None:
    policies = tiny_policy(), tiny_policy()
    rewards = RewardSet.load([RewardConfig(f"{reward_file}:bright")])
    prompts = [Prompt("blue"), Prompt("a circle", negative="red")]
    batch = sample_batch(
        policies[0], prompts, rewards, Sampling(2, 2.5), torch.Generator(), stats=["entropy", "null_hidden"]
    )
    lacking = replace(batch, rollout=replace(batch.rollout, stats={}))
    advantage, config = torch.tensor([1.0, -1.0, 0.5, -0.5]), TrainConfig(guidance=2.5, micro_batch_size=3)
    assert "null_hidden" not in batch.tensors()
    for policy, own in zip(policies, (batch, lacking), strict=True):
        assert stepped(policy, own, advantage, config)["logp_gap/replay"] < 1e-5
    for own, other in zip(*(policy.parameters() for policy in policies), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)


def test_kl_is_watched_on_some_images_where_the_loss_has_none(reward_file: Path) -> None:
    """Images 0 and 2 of 4: the mean over their codes of k3 = exp(d) − d − 1, d = log π_ref − log π, of the mixture."""
    config = TrainConfig(guidance=2.0, monitor=MonitorConfig(images=2))
    policy, reference = tiny_policy(), tiny_policy(seed=1).requires_grad_(False)
    rewards = RewardSet.load([RewardConfig(f"{reward_file}:bright")])
    batch = sample_batch(policy, [Prompt("blue"), Prompt("a circle")], rewards, Sampling(2, 2.0), torch.Generator())
    assert batch.null is not None
    logps = [
        model.logp(batch.cond, batch.rollout.tokens[::2], null=batch.null, guidance=2.0).logp.detach()
        for model in (policy, reference)
    ]
    gaps = (logps[1] - logps[0]).flatten().tolist()
    expected = sum(math.exp(d) - d - 1 for d in gaps) / len(gaps)
    update = Updater(policy, reference, config, resolve_algorithm(config)[0], Accelerator(cpu=True))
    metrics, _ = update(batch, torch.ones(4), torch.ones_like(batch.rollout.cond_logp), lr=0.0)
    assert metrics["kl"] == pytest.approx(expected, rel=1e-4) and expected > 0.01


WORKER = """
import sys
from pathlib import Path
from tests.test_update import step
step(2, Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_two_processes_make_the_step_of_one(reward_file: Path, tmp_path: Path) -> None:
    one, two, worker = tmp_path / "one.safetensors", tmp_path / "two.safetensors", tmp_path / "worker.py"
    step(1, reward_file, one)
    worker.write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, worker, reward_file, two], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, shared = load_file(one), load_file(two)
    before = dict(tiny_policy().named_parameters())
    assert max((alone[name] - before[name]).abs().max() for name in before if name in alone) > 1e-2
    assert alone.keys() == shared.keys()
    for name in alone:
        torch.testing.assert_close(shared[name], alone[name], rtol=1e-4, atol=1e-6, msg=f"{name} differs")
