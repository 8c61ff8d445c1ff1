"""What a training step does to its samples between rewards and advantage, as its algorithm and settings ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gcpo_t2i.algo.edits import entropy_reward
from gcpo_t2i.algo.rows import Algorithm
from gcpo_t2i.config import TrainConfig
from gcpo_t2i.data import Prompt
from gcpo_t2i.errors import UserError
from gcpo_t2i.gold import References, inject
from gcpo_t2i.models.policy import Policy
from gcpo_t2i.processes import Processes
from gcpo_t2i.rollout import Batch, Sampling
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.update import Metrics, Updater


class Edits:
    """The edits of one run; `notes` say what the user should know of their references.

    UserError where an algorithm wants references, and prompts or rewards are not made for that.
    """

    def __init__(
        self,
        config: TrainConfig,
        algorithm: Algorithm,
        policy: Policy,
        update: Updater,
        rewards: RewardSet,
        processes: Processes,
        prompts: Sequence[Prompt],
    ) -> None:
        self.config, self.algorithm, self.update = config, algorithm, update
        self.rewards, self.processes = rewards, processes
        self.references = References.of(policy, config.train_prompts, prompts, config.seed)
        self.notes: list[str] = []
        if algorithm.rescue is not None:
            if rewards.successes({name: [] for name in rewards.weights}) is None:
                raise UserError(
                    f"algorithm '{algorithm.name}' asks which images are right, and no reward says so "
                    f"({', '.join(rewards.weights)}); give --success_reward, the least sum of rewards of a right image"
                )
            self.notes = self.references.checked(prompts)

    def __call__(self, batch: Batch) -> tuple[Batch, Metrics]:
        """The batch that advantages are computed of, and what was done to it, in all processes together."""
        metrics: Metrics = {}
        if self.algorithm.rescue is not None and batch.success is not None:
            failed = [] if batch.idle else self.algorithm.rescue(batch.success).nonzero().flatten().tolist()
            with self.update.accelerator.autocast():
                batch, injected, rejected = inject(
                    self.references, batch, failed, self.rewards, Sampling.of(self.config)
                )
            counts = self.processes.gather((len(failed), injected, rejected))
            names = ("gold/all_failed", "gold/injected", "gold/rejected")
            metrics |= dict(zip(names, map(sum, zip(*counts, strict=True)), strict=True))
        if self.config.loss.entropy_reward > 0:
            own, reference = self.update.entropies(batch)
            rewards = entropy_reward(batch.rewards, own, reference, self.config.loss.entropy_reward)
            batch = replace(batch, rewards=rewards)
        return batch, metrics
