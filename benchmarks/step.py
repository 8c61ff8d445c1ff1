"""One training step, ours against the plain way, in one process with the same weights: images/s by phase.

    python benchmarks/step.py [--model FOLDER] [--prompts 8] [--group 8] [--repeats 5] [--out step.json]

The plain way is what public code does: a Python loop over `transformers`' growing cache with two rows per image (prompt
and null prompt), one prefill per row, log-probs thrown away while sampling; then separate forward passes for the
policy's old log-probs, the null log-probs and the reference, and the update. Ours: see `gcpo_t2i/models/decoding.py` and
`gcpo_t2i/update.py`. Both decode and score the same way. Runs alternate, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from gcpo_t2i.algo.credit import CreditSettings
from gcpo_t2i.algo.rows import resolve
from gcpo_t2i.config import LossConfig, RewardConfig, TrainConfig
from gcpo_t2i.data import PromptSampler, load_prompts
from gcpo_t2i.models.policy import Condition
from gcpo_t2i.rollout import Batch, Sampling, conditions, sample_batch
from gcpo_t2i.run import load_model, make_accelerator
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.update import Updater

Phases = dict[str, float]


@torch.no_grad()
def plain_rollout(policy: Any, cond: Condition, null: Condition, guidance: float) -> Tensor:
    """Codes (B, T) for B rows of cond and null: dynamic cache, every row prefilled by itself."""
    rows = Condition.cat([cond, null])
    prefix, mask = policy.adapter.caption_projector(rows.states), rows.mask
    cache = DynamicCache()
    embeds, length = prefix, policy.grid[0] * policy.grid[1]
    codes: list[Tensor] = []
    for _ in range(length):
        positions = torch.arange(cache.get_seq_length(), cache.get_seq_length() + embeds.shape[1], device=mask.device)
        output = policy.trunk(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
        )
        logits = policy.adapter.head(output.last_hidden_state[:, -1]).float()
        positive, negative = logits.chunk(2)
        drawn = torch.multinomial((negative + guidance * (positive - negative)).softmax(-1), 1)  # (B, 1)
        codes.append(drawn)
        embeds = policy.trunk.embed_tokens(torch.cat([drawn, drawn]))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.cat(codes, dim=1)


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.config = TrainConfig(
            prompts_per_step=args.prompts,
            group_size=args.group,
            loss=LossConfig(beta=0.01),
            micro_batch_size=args.micro,
            device=args.device,
        )
        self.accelerator = make_accelerator(self.config)
        device = self.accelerator.device
        self.policy = load_model(args.model, device)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.algorithm = resolve("guidance_gcpo")
        self.update = Updater(self.policy, self.reference, self.config, self.algorithm, self.accelerator)
        self.rewards = RewardSet.load([RewardConfig("geneval", kwargs={"score": "dense"})])
        self.sampler = PromptSampler(load_prompts("shapesworld:train"), 0)
        self.generator = torch.Generator(device).manual_seed(0)
        self.device = device

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def ours(self, index: int) -> Phases:
        prompts = self.sampler.batch(index * self.config.prompts_per_step, self.config.prompts_per_step)
        start = self.clock()
        with self.accelerator.autocast():
            batch = sample_batch(
                self.policy, prompts, self.rewards, Sampling.of(self.config), self.generator, {"entropy"}
            )
        sampled = self.clock()
        self._learn(batch)
        return self._phases(start, sampled, sampled, self.clock(), batch.seconds["reward"])

    def plain(self, index: int) -> Phases:
        prompts = self.sampler.batch(index * self.config.prompts_per_step, self.config.prompts_per_step)
        start = self.clock()
        with self.accelerator.autocast():
            cond, null = conditions(self.policy, prompts)
            assert null is not None
            wide, wide_null = (part.repeat_interleave(self.config.group_size) for part in (cond, null))
            codes = plain_rollout(self.policy, wide, wide_null, self.config.guidance)
            images = self.policy.decode(codes)
            scoring = self.clock()
            scores = self.rewards.score(images, [p for p in prompts for _ in range(self.config.group_size)])
            sampled = self.clock()
            cond_logp, null_logp = self._logp(wide, codes), self._logp(wide_null, codes)
        passes = self.clock()
        rollout = batch_rollout(codes, cond_logp, null_logp)
        rewards = torch.tensor(self.rewards.total(scores)).view(len(prompts), -1)
        self._learn(Batch(prompts, cond, null, rollout, images, scores, rewards, {}))
        return self._phases(start, sampled, passes, self.clock(), sampled - scoring)

    @torch.no_grad()
    def _logp(self, cond: Condition, codes: Tensor) -> Tensor:
        parts = torch.arange(len(codes), device=codes.device).split(self.config.micro_batch_size)
        return torch.cat([self.policy.logp(cond[rows], codes[rows]).logp for rows in parts])

    def _learn(self, batch: Batch) -> None:
        mask = torch.ones_like(batch.rollout.tokens, dtype=torch.bool)
        credit = self.algorithm.credit.fn(batch.tensors(), mask, CreditSettings(), [])
        advantage = self.algorithm.advantage(batch.rewards).flatten().to(self.device)
        self.update(batch, advantage, credit, lr=1e-9)  # the weights stay what they are, the work is the same

    def _phases(self, start: float, sampled: float, passes: float, end: float, reward: float) -> Phases:
        return {
            "rollout": sampled - start - reward,
            "reward": reward,
            "extra log-prob passes": passes - sampled,
            "update": end - passes,
            "step": end - start,
        }


def batch_rollout(codes: Tensor, cond_logp: Tensor, null_logp: Tensor) -> Any:
    from gcpo_t2i.models.policy import Rollout

    return Rollout(codes, cond_logp, null_logp, cond_logp, {})


def median_phases(run: Callable[[int], Phases], other: Callable[[int], Phases], repeats: int) -> tuple[Phases, Phases]:
    run(0), other(0)  # warm up
    pairs = [(run(i + 1), other(i + 1)) for i in range(repeats)]
    return tuple({key: statistics.median(pair[side][key] for pair in pairs) for key in pairs[0][0]} for side in (0, 1))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapesworld")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device")
    parser.add_argument("--out")
    args = parser.parse_args()
    bench = Bench(args)
    ours, plain = median_phases(bench.ours, bench.plain, args.repeats)
    images = args.prompts * args.group
    print(f"torch {torch.__version__}, {bench.device}, {torch.get_num_threads()} threads, {images} images per step")
    print(f"{'':24}{'ours':>10}{'plain':>10}{'plain/ours':>12}")
    for key in ours:
        ratio = f"{plain[key] / ours[key]:.2f}×" if ours[key] else "–"
        print(f"{key + ' (s)':24}{ours[key]:10.3f}{plain[key]:10.3f}{ratio:>12}")
    for key in ("rollout", "step"):
        print(f"{key + ' (images/s)':24}{images / ours[key]:10.1f}{images / plain[key]:10.1f}")
    if args.out:
        result = {
            "ours": ours,
            "plain": plain,
            "images": images,
            "torch": torch.__version__,
            "device": str(bench.device),
        }
        Path(args.out).write_text(json.dumps({**result, "machine": platform.machine(), **vars(args)}, indent=2))


if __name__ == "__main__":
    main()
