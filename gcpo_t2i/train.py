"""The training loop: sample, decode, score, share out credit, update. It knows algorithms only as rows of functions."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gcpo_t2i import checkpoint
from gcpo_t2i.algo.credit import top_mass
from gcpo_t2i.algo.rows import needs
from gcpo_t2i.config import OptimConfig, TrainConfig, resolve_algorithm
from gcpo_t2i.data import Prompt, PromptSampler, load_prompts, prompt_mix
from gcpo_t2i.errors import UserError
from gcpo_t2i.evaluate import Evaluation, eval_prompts, evaluate
from gcpo_t2i.report import Report
from gcpo_t2i.rollout import Batch, Sampling, collect, sample_batch
from gcpo_t2i.run import load_model, make_accelerator, open_run, peak_memory_mb
from gcpo_t2i.scoring import RewardSet, scored_name
from gcpo_t2i.update import Metrics, Updater

ROLLOUT_TENSORS = frozenset({"cond_logp", "null_logp"})
ROLLOUT_STATS = frozenset({"exact_kl", "js", "entropy"})  # computed while sampling, on request
MAX_ROUNDS = 3  # of sampling for one step, where an algorithm replaces groups without signal
MAX_BAD_STEPS = 5  # in a row without a finite loss


def train(config: TrainConfig) -> Path:
    """Runs the whole training that `config` describes and returns the run folder. UserError for what the user can mend."""
    algorithm, credit_settings = resolve_algorithm(config)
    prompts, held_out = load_prompts(config.train_prompts), load_prompts(config.eval.prompts)
    accelerator = make_accelerator(config)
    device = accelerator.device
    rewards = RewardSet.load(config.rewards, str(device))
    eval_rewards = RewardSet.load(config.eval.rewards, str(device), label=scored_name)
    policy = load_model(config.model, device)
    required = needs(algorithm, credit_settings, config.loss.beta)
    if strange := required - ROLLOUT_TENSORS - ROLLOUT_STATS - {"ref_logp"}:
        raise UserError(f"credit '{algorithm.credit.name}' needs {sorted(strange)}, which no rollout provides")
    folder = open_run(config, accelerator)

    reference = copy.deepcopy(policy).requires_grad_(False) if "ref_logp" in required else None
    update = Updater(policy, reference, config, algorithm, accelerator)
    generators = {"sample": torch.Generator(device), "credit": torch.Generator()}
    for generator in generators.values():
        generator.manual_seed(config.seed * 1000 + accelerator.process_index)
    sampler = PromptSampler(prompts, config.seed, prompt_mix(config.train_prompts, config.train_mix))
    local_prompts = config.prompts_per_step // accelerator.num_processes
    state = checkpoint.TrainState(policy, update.optimizer, generators)
    if config.resume:
        checkpoint.load(checkpoint.newest(folder), state)

    def fresh_prompts() -> Iterator[list[Prompt]]:
        while True:
            start = state.prompts_drawn + accelerator.process_index * local_prompts
            state.prompts_drawn += config.prompts_per_step
            yield sampler.batch(start, local_prompts)

    def sample(drawn: Sequence[Prompt]) -> Batch:
        with accelerator.autocast():
            return sample_batch(
                policy,
                drawn,
                rewards,
                Sampling.of(config),
                generators["sample"],
                stats=(required & ROLLOUT_STATS) | {"entropy"},
                need_null=bool(required & {"null_logp", "exact_kl", "js"}),
            )

    def evaluation(report: Report) -> Evaluation:
        chosen = eval_prompts(held_out, config.eval)
        with report.task("evaluate", len(chosen)) as on_progress, accelerator.autocast():
            one = Sampling(1, config.guidance, config.temperature, config.top_k, config.top_p)
            return evaluate(
                policy, chosen, eval_rewards, one, config.eval.seed, config.eval.batch_size, device, on_progress
            )

    with Report(config, folder, accelerator, start=state.step) as report:
        if state.step == 0:
            report.evaluation(0, evaluation(report))
        for step in range(state.step, config.steps):
            started = time.perf_counter()
            batch, drawn_rewards = collect(sample, fresh_prompts(), algorithm.keep, MAX_ROUNDS)
            if step == 0:
                check_applicable(batch)
            advantage = algorithm.advantage(batch.rewards)  # (P, G)
            mask = torch.ones_like(batch.rollout.tokens, dtype=torch.bool)
            credit = algorithm.credit.fn(batch.tensors(), mask, credit_settings, generators["credit"])  # (B, T)
            updating = time.perf_counter()
            updated = update(
                batch, advantage.flatten().to(device), credit, learning_rate(config.optim, step, config.steps)
            )
            state.bad_steps = state.bad_steps + 1 if updated["skipped"] else 0
            if state.bad_steps >= MAX_BAD_STEPS:
                raise UserError(
                    f"the loss was not finite in {MAX_BAD_STEPS} steps in a row (last: step {step + 1}); lower "
                    f"--optim.learning_rate (now {config.optim.learning_rate:g}), and look at {folder / 'metrics.jsonl'}"
                )
            state.step = step + 1
            now = time.perf_counter()
            metrics = {
                **updated,
                **sample_metrics(batch, drawn_rewards),
                "credit/top40_mass": top_mass(credit, mask).mean().item(),
                "learning_rate": learning_rate(config.optim, step, config.steps),
                **timing(batch, drawn_rewards.numel(), now - started, now - updating),
            }
            report.step(state.step, metrics, batch)
            if config.save_every and state.step % config.save_every == 0 and state.step < config.steps:
                checkpoint.save(folder, state)
            if config.eval_every and state.step % config.eval_every == 0 and state.step < config.steps:
                report.evaluation(state.step, evaluation(report))
        report.evaluation(state.step, evaluation(report))
        checkpoint.save(folder, state)
        report.finish(policy)
    return folder


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then constant, or a cosine that ends at 0 after the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def diversity(tokens: Tensor, group: int) -> float:
    """Share of code positions in which two images of a group differ, mean over pairs and groups. tokens (B, T)."""
    groups = tokens.view(-1, group, tokens.shape[1])  # (P, G, T)
    same = (groups[:, :, None] == groups[:, None, :]).float().mean(dim=-1)  # (P, G, G)
    pairs = group * (group - 1)
    return (1 - (same.sum(dim=(1, 2)) - group) / pairs).mean().item()


def sample_metrics(batch: Batch, drawn_rewards: Tensor) -> Metrics:
    """What the samples of a step look like. `reward*` are over all groups drawn, the rest over those trained on."""
    rollout = batch.rollout
    values = {name: [score for score in scores if score is not None] for name, scores in batch.scores.items()}
    return {
        "reward": drawn_rewards.mean().item(),
        "reward_std": drawn_rewards.std(dim=1).mean().item(),
        "frac_reward_zero_std": (drawn_rewards.amax(1) == drawn_rewards.amin(1)).float().mean().item(),
        **{f"rewards/{name}/mean": sum(own) / len(own) for name, own in values.items() if own},
        "entropy": rollout.stats["entropy"].mean().item(),
        "diversity": diversity(rollout.tokens, batch.group),
        "logp_gap/guided": (rollout.sample_logp - rollout.cond_logp).abs().mean().item(),
    }


def check_applicable(batch: Batch) -> None:
    """UserError for a reward that says nothing about any sample: training on its silence would teach nothing."""
    for name, values in batch.scores.items():
        if all(value is None for value in values):
            has = ", ".join(sorted({column for prompt in batch.prompts for column in prompt.columns})) or "none"
            raise UserError(
                f"reward '{name}' applies to none of the prompts of the first step, such as '{batch.prompts[0].text}' "
                f"(their columns: {has}); use prompts with the columns that it reads, or another reward"
            )


def timing(batch: Batch, images: int, step_time: float, update_time: float) -> Metrics:
    return {
        "step_time": step_time,
        "rollout_time": batch.seconds["rollout"],
        "reward_time": batch.seconds["reward"],
        "update_time": update_time,
        "images_per_second": images / step_time,
        "tokens_per_second": images * batch.rollout.tokens.shape[1] / step_time,
        "peak_memory_mb": peak_memory_mb(batch.rollout.tokens.device),
    }
