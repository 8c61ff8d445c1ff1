"""What is measured: a policy, prompts, and one step of training by several ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gcpo_t2i.algo.credit import CreditSettings
from gcpo_t2i.algo.rows import resolve
from gcpo_t2i.bench.contest import Phases
from gcpo_t2i.bench.rivals import PlainScores, library_defaults, library_model, library_rollout, plain_rollout
from gcpo_t2i.bench.shapes import SHAPES, Shape, random_policy
from gcpo_t2i.config import BenchConfig, LoraConfig, LossConfig, RewardConfig, TrainConfig
from gcpo_t2i.data import Prompt, PromptSampler, load_prompts
from gcpo_t2i.models.cache import working_dtype
from gcpo_t2i.models.janus import JanusPolicy
from gcpo_t2i.models.lora import Adapters, WithoutAdapters
from gcpo_t2i.models.policy import Condition, Rollout
from gcpo_t2i.plan.timing import Stopwatch
from gcpo_t2i.rollout import Batch, Sampling, conditions, draw, kept_stats
from gcpo_t2i.run import EMBEDDED_MODEL, load_model, make_accelerator, starting_model, tuned, use_bfloat16
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.seeds import generators
from gcpo_t2i.update import Updater

Ways = dict[str, Callable[[], Phases]]
REWARD = "gcpo_t2i.probe:redness"  # costs next to nothing
RATE = 1e-9  # the weights stay what they are, the work is the same


class Workload:
    """The policy of a bench, and ways to sample from it and to train it. Each way returns its seconds by phase."""

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        self.settings = TrainConfig(
            prompts_per_step=config.prompts,
            group_size=config.group_size,
            guidance=config.guidance,
            micro_batch_size=config.micro_batch_size,
            gradient_checkpointing=config.gradient_checkpointing,
            scoring="conditional",  # as the plain loop's update does: the same work in all ways
            loss=LossConfig(beta=0.01),
            lora=LoraConfig(rank=config.lora_rank),
            device=config.device,
            dtype=config.dtype,
        )
        self.accelerator = make_accelerator(self.settings)
        self.device = self.accelerator.device
        self.watch = Stopwatch(self.accelerator, time.process_time if config.busy else None)
        self.policy = self.make(None if config.shape == EMBEDDED_MODEL else SHAPES[config.shape])
        self.prompts = PromptSampler(load_prompts("shapesworld:train"), 0).batch(0, config.prompts)
        self.generators = generators(0, [(image,) for image in range(config.prompts * config.group_size)])

    def make(self, shape: Shape | None) -> Any:
        """The policy of that shape; None is the embedded one. Weights that are trained are float32."""
        lower = use_bfloat16(self.config.dtype, self.device)
        trained = "step" in self.config.what and self.config.lora_rank is None
        dtype = torch.bfloat16 if lower and not trained else torch.float32
        if shape is None:
            return load_model(EMBEDDED_MODEL, self.device, dtype)
        return tuned(random_policy(shape, self.device, dtype), self.device)

    def conditions(self) -> tuple[Condition, Condition]:
        """Prompts and null prompts, P rows each."""
        cond, null = conditions(self.policy, self.prompts)
        assert null is not None
        return cond, null

    @property
    def rows(self) -> int:
        """That decode at once: both branches of every image."""
        return 2 * self.config.prompts * self.config.group_size

    @property
    def element_bytes(self) -> int:
        """Of what layers read."""
        with self.watch.lower():
            return working_dtype(self.policy.trunk.embed_tokens.weight).itemsize

    # ---- rollouts

    def rollouts(self) -> Ways:
        """Codes of B images, by the engine with log-probs and entropy, and by rivals without."""
        cond, null = self.conditions()
        wide, wide_null = (part.repeat_interleave(self.config.group_size) for part in (cond, null))
        ways: dict[str, Callable[[], Any]] = {"ours": lambda: self._sample(cond, null)}
        if "library" in self.config.rivals and isinstance(self.policy, JanusPolicy) and self.config.guidance > 1:
            model = library_model(self.policy, use_bfloat16(self.config.dtype, self.device))
            ways["library"] = self._by_defaults(lambda: library_rollout(model, wide, self.config.guidance))
        if "plain" in self.config.rivals:
            plain = lambda: plain_rollout(self.policy, wide, wide_null, self.config.guidance)  # noqa: E731
            ways["plain"] = self._by_defaults(plain)
        return {name: self._timed(way) for name, way in ways.items()}

    def _sample(self, cond: Condition, null: Condition) -> Rollout:
        config = self.config
        stats = kept_stats(self.settings, ())
        return draw(self.policy, cond, null, Sampling(config.group_size, config.guidance), self.generators, stats)

    def _by_defaults(self, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with library_defaults(self.policy):
                return call()

        return run

    def _timed(self, call: Callable[[], Any]) -> Callable[[], Phases]:
        def run() -> Phases:
            with self.watch.lower():
                return {"rollout": self.watch.once(call)}

        return run

    # ---- steps

    def steps(self) -> Ways:
        """A whole step: rollout, images and rewards, log-probs where the rollout has none, credit and update."""
        adapters = None
        if self.config.lora_rank is not None:
            adapters = Adapters.add(self.policy, self.settings.lora, self.config.shape, seed=0)
        reference = starting_model(self.policy, adapters)
        self.rewards = RewardSet.load([RewardConfig(REWARD)])
        rows = {name: resolve(name) for name in ("guidance_gcpo", "grpo")}
        settings, accelerator = self.settings, self.accelerator
        updates = {name: Updater(self.policy, reference, settings, row, accelerator) for name, row in rows.items()}
        ways: Ways = {
            "ours": lambda: self._our_step(updates["guidance_gcpo"]),
            "ours (grpo)": lambda: self._our_step(updates["grpo"]),
        }
        if "plain" in self.config.rivals:
            plain: Any = PlainScores(self.policy)
            plain_reference: Any = WithoutAdapters(plain, adapters) if adapters else PlainScores(reference)
            updates["plain"] = Updater(plain, plain_reference, settings, rows["guidance_gcpo"], accelerator)
            ways["plain"] = self._by_defaults(lambda: self._plain_step(updates["plain"]))
        for update in updates.values():
            update.optimizer = updates["grpo"].optimizer  # they train the same weights: one pair of moments will do
        return ways

    def _our_step(self, update: Updater) -> Phases:
        start = self.watch.now()
        with self.watch.lower():
            cond, null = self.conditions()
            rollout = self._sample(cond, null)
            sampled = self.watch.now()
            batch = self._scored(cond, null, rollout)
        scored = self.watch.now()
        self._learn(update, batch)
        return phases(rollout=sampled - start, decode=scored - sampled, update=self.watch.now() - scored)

    def _plain_step(self, update: Updater) -> Phases:
        start = self.watch.now()
        with self.watch.lower():
            cond, null = self.conditions()
            wide, wide_null = (part.repeat_interleave(self.config.group_size) for part in (cond, null))
            codes = plain_rollout(self.policy, wide, wide_null, self.config.guidance)
            sampled = self.watch.now()
            logp, null_logp = self._plain_logp(wide, codes), self._plain_logp(wide_null, codes)
            passed = self.watch.now()
            batch = self._scored(cond, null, Rollout(codes, logp, null_logp, logp))
        scored = self.watch.now()
        self._learn(update, batch)
        seconds = {"rollout": sampled - start, "passes": passed - sampled, "decode": scored - passed}
        return phases(**seconds, update=self.watch.now() - scored)

    @torch.no_grad()
    def _plain_logp(self, cond: Condition, codes: Tensor) -> Tensor:
        parts = torch.arange(len(codes), device=codes.device).split(self.config.micro_batch_size)
        return torch.cat([PlainScores(self.policy).logp(cond[rows], codes[rows]).logp for rows in parts])

    def _scored(self, cond: Condition, null: Condition, rollout: Rollout) -> Batch:
        images = self.policy.decode(rollout.tokens)
        prompts: Sequence[Prompt] = [prompt for prompt in self.prompts for _ in range(self.config.group_size)]
        scores = self.rewards.score(images, prompts)
        totals = torch.tensor(self.rewards.total(scores), dtype=torch.float32).view(len(self.prompts), -1)
        return Batch(self.prompts, cond, null, rollout, images, scores, totals, {})

    def _learn(self, update: Updater, batch: Batch) -> None:
        credit = update.algorithm.credit.fn(batch.tensors(), batch.mask, CreditSettings(), self.generators)
        advantage = update.algorithm.advantage(batch.rewards).flatten().to(self.device)
        update(batch, advantage, credit, RATE)


def phases(rollout: float, decode: float, update: float, passes: float = 0.0) -> Phases:
    """In the order in which a table shows them."""
    return {"rollout": rollout, "decode and reward": decode, "log-prob passes": passes, "update": update}
