"""Batch arithmetic: what one step, one evaluation and the whole run consist of. Whole numbers, no measurement."""

from __future__ import annotations

from dataclasses import dataclass

from gcpo_t2i.algo.rows import needs
from gcpo_t2i.config import PlanConfig, resolve_algorithm, share_of_prompts
from gcpo_t2i.models.sizes import Sizes
from gcpo_t2i.rollout import MAX_ROUNDS, NULL_BRANCH, REPLAYED, scores_mixture


@dataclass(frozen=True)
class Counts:
    """Of one process, unless it says run or step. A *row* is one branch (with or without the prompt) of one image."""

    prompts: int  # per step
    images: int  # per step, B of this process
    positions: int  # T
    at_once: int  # images that are sampled at once
    parts: int  # in which a step's images are sampled, one after another
    last_part: int  # images in the last one, which may be smaller
    branches: int  # 2 where the null prompt runs along while sampling
    eval_branches: int
    rounds: int  # of sampling per step at most: more than 1 where groups without signal are replaced
    micro_batch: int  # images per forward and backward pass
    micro_batches: int  # per update
    last_micro_batch: int  # images in the last one, which may be smaller
    updates: int  # per step
    gradient_passes: int  # per step, each forward and backward over a micro-batch, if every image has an advantage
    reference_passes: int  # per step, forward only
    null_passes: int  # per step, forward only: the other half of the guided mixture, where that is scored
    replay_passes: int  # per step, forward only: both branches scored again for the credit
    eval_images: int  # per evaluation, of all processes
    eval_batches: int  # which the processes take in turn
    eval_share: int  # images of the process that takes most of them
    evaluations: int  # per run
    checkpoints: int  # per run
    steps: int

    @property
    def rows(self) -> int:
        """Rows that decode at once in a rollout."""
        return self.at_once * self.branches

    @property
    def tokens(self) -> int:
        """Codes per step."""
        return self.images * self.positions

    @property
    def forward_passes(self) -> int:
        """Per step and round: one per position of a part (the first is that of the prompts), then over micro-batches."""
        scored = self.gradient_passes + self.reference_passes + self.null_passes + self.replay_passes
        return self.parts * self.positions + scored

    @classmethod
    def of(cls, config: PlanConfig, sizes: Sizes) -> Counts:
        """ConfigError where prompts cannot be split over the processes."""
        algorithm, settings = resolve_algorithm(config)
        required = needs(algorithm, settings, config.loss.beta, config.loss.entropy_reward)
        guided, has_null = config.guidance != 1.0, bool(required & NULL_BRANCH)
        prompts = share_of_prompts(config.prompts_per_step, config.processes)
        images, updates = prompts * config.group_size, config.updates_per_rollout
        micro = min(config.micro_batch, images)
        micro_batches = -(-images // micro)
        at_once = min(config.rollout_batch_size or images, images)
        parts = -(-images // at_once)
        scored = micro_batches * updates
        compared = config.loss.beta > 0 or algorithm.reweight is not None
        watched = min(max(1, config.monitor.images // config.processes), images)  # images of each update
        reference = scored if compared else updates * -(-watched // config.micro_batch) if config.monitor.kl else 0
        replays = config.credit.source == "replay" and bool(algorithm.credit.needs(settings) & REPLAYED)
        eval_images = config.eval.num_prompts * config.eval.samples_per_prompt
        eval_batches = -(-eval_images // config.eval.batch_size)
        turns = -(-eval_batches // config.processes)
        again = scored - micro_batches + reference  # of the null branch: the first update has the rollout's
        return cls(
            prompts=prompts,
            images=images,
            positions=sizes.positions,
            at_once=at_once,
            parts=parts,
            last_part=images - (parts - 1) * at_once,
            branches=2 if guided or has_null else 1,
            eval_branches=2 if guided else 1,
            rounds=MAX_ROUNDS if algorithm.keep else 1,
            micro_batch=micro,
            micro_batches=micro_batches,
            last_micro_batch=images - (micro_batches - 1) * micro,
            updates=updates,
            gradient_passes=scored,
            reference_passes=reference,
            null_passes=again if scores_mixture(config) else 0,
            replay_passes=scored * 2 if replays else 0,
            eval_images=eval_images,
            eval_batches=eval_batches,
            eval_share=min(eval_images, turns * config.eval.batch_size),
            evaluations=2 + _every(config.eval_every, config.steps),
            checkpoints=1 + _every(config.save_every, config.steps),
            steps=config.steps,
        )


def _every(every: int, steps: int) -> int:
    """How often `step % every == 0` before the last step."""
    return (steps - 1) // every if every else 0
