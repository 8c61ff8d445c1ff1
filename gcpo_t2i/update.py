"""Gradient steps on one rollout's batch. Every quantity is on the scale of the whole optimizer step."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gcpo_t2i.algo.loss import kl_reweight, policy_loss, token_weights
from gcpo_t2i.algo.rows import Algorithm
from gcpo_t2i.config import TrainConfig
from gcpo_t2i.models.policy import Policy
from gcpo_t2i.rollout import Batch

Metrics = dict[str, Any]  # floats; None for what was not measured


class Updater:
    """Gradient steps on one rollout's batch, in micro-batches whose losses add up to the loss of the whole step."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        config: TrainConfig,
        algorithm: Algorithm,
        accelerator: Accelerator,
    ):
        self.policy, self.reference, self.config = policy, reference, config
        self.algorithm, self.accelerator = algorithm, accelerator
        self.parameters = policy.set_trainable()
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optim.learning_rate, betas=optim.betas, weight_decay=optim.weight_decay
        )

    def __call__(self, batch: Batch, advantage: Tensor, credit: Tensor, lr: float) -> Metrics:
        """advantage (B,), credit (B, T). Metrics of the last update; `skipped` counts those with a loss that is not finite.

        `kl` is None without a reference."""
        for settings in self.optimizer.param_groups:
            settings["lr"] = lr
        tokens, mask = batch.rollout.tokens, torch.ones_like(batch.rollout.tokens, dtype=torch.bool)
        totals = self.accelerator.reduce(torch.tensor([len(tokens), mask.sum()], device=tokens.device), "sum")
        sequences, count = (float(total) for total in totals)
        averaging = self.algorithm.averaging
        weight = token_weights(credit, mask, averaging, sequences, count)
        base_weight = token_weights(torch.ones_like(credit), mask, averaging, sequences, count)
        kl_factor = kl_reweight(credit) if self.config.loss.kl_reweight else None
        old_logp = torch.zeros_like(credit)
        metrics: Metrics = {}
        skipped = 0
        for epoch in range(self.config.updates_per_rollout):
            metrics = {}
            for rows in torch.arange(len(tokens), device=tokens.device).split(self.config.micro_batch_size):
                logp, entropy = self._score(self.policy, batch, rows)
                if epoch == 0:
                    old_logp[rows] = logp.detach()  # the policy that sampled, scored by the same code as the new one
                loss, parts = policy_loss(
                    logp,
                    old_logp[rows],
                    advantage[rows],
                    mask[rows],
                    weight[rows],
                    base_weight[rows],
                    surrogate=self.algorithm.surrogate.fn,
                    clip_low=self.algorithm.clip_low,
                    clip_high=self.algorithm.clip_high,
                    ref_logp=self._reference_logp(batch, rows),
                    beta=self.config.loss.beta,
                    kl_factor=None if kl_factor is None else kl_factor[rows],
                    entropy=entropy,
                    entropy_coef=self.config.loss.entropy_coef,
                )
                self.accelerator.backward(loss)
                for name, value in parts.items():
                    metrics[name] = metrics.get(name, 0.0) + value.item()
            metrics["grad_norm"] = self._step(math.isfinite(metrics["loss"]))
            skipped += not math.isfinite(metrics["grad_norm"])
        sampled = batch.rollout.sample_logp if self.config.scoring == "guided" else batch.rollout.cond_logp
        metrics["logp_gap/replay"] = (old_logp - sampled).abs().mean().item()
        return {"kl": None, **metrics, "skipped": float(skipped)}

    def _score(self, policy: Policy, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """(b, T) log-probs of the sampled codes of some rows under the scoring distribution, and entropy if it is used."""
        prompts = rows // batch.group
        guided = self.config.scoring == "guided" and batch.null is not None
        with self.accelerator.autocast():
            scores = policy.logp(
                batch.cond[prompts],
                batch.rollout.tokens[rows],
                temperature=self.config.temperature,
                null=batch.null[prompts] if guided and batch.null is not None else None,
                guidance=self.config.guidance if guided else 1.0,
                entropy=self.config.loss.entropy_coef > 0,
            )
        return scores.logp, scores.entropy

    @torch.no_grad()
    def _reference_logp(self, batch: Batch, rows: Tensor) -> Tensor | None:
        return None if self.reference is None else self._score(self.reference, batch, rows)[0]

    def _step(self, finite: bool) -> float:
        """Sums gradients over processes (the weights carry the global counts), clips, steps. Returns the norm, or NaN."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.accelerator.num_processes > 1:
            for gradient in gradients:
                gradient.copy_(self.accelerator.reduce(gradient, "sum"))  # type: ignore[arg-type]
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optim.max_grad_norm).item()
        if finite and math.isfinite(norm):
            self.optimizer.step()
        else:
            norm = math.nan
        self.optimizer.zero_grad(set_to_none=True)
        return norm
