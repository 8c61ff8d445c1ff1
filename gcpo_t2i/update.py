"""One gradient step on a rollout's batch. Every quantity is on the scale of the whole optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gcpo_t2i import sharding
from gcpo_t2i.algo.loss import kl_k3, policy_loss, token_weights
from gcpo_t2i.algo.rows import Algorithm
from gcpo_t2i.config import OptimConfig, TrainConfig
from gcpo_t2i.errors import UserError
from gcpo_t2i.models.drawing import NULL_HIDDEN
from gcpo_t2i.models.policy import Policy
from gcpo_t2i.models.trained import flat, optimizer_groups, set_rate, trained
from gcpo_t2i.models.trunk import recomputed
from gcpo_t2i.monitor import spread
from gcpo_t2i.processes import Processes
from gcpo_t2i.rollout import Batch

Metrics = dict[str, Any]  # floats; None for what was not measured


class Updater:
    """Gradient steps, each in micro-batches whose losses add up to the loss of the whole step."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        config: TrainConfig,
        algorithm: Algorithm,
        accelerator: Accelerator,
        sharded: bool = False,
    ):
        self.learner, self.reference, self.config, self.sharded = policy, reference, config, sharded
        self.algorithm, self.accelerator, self.processes = algorithm, accelerator, Processes.of(accelerator)
        if sharded:
            self.learner = sharding.sharded_copy(policy)  # first, because it asks the policy what it could train
        groups = trained(policy, config.optim.modules)
        self.weights = flat(groups)
        if not any(parameter.requires_grad for parameter in self.weights):
            raise UserError(
                "the model has nothing to train: set_trainable() returned no parameter that takes a gradient"
            )
        if sharded:
            groups = trained(self.learner, config.optim.modules)
        self.parameters = flat(groups)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            optimizer_groups(groups),
            lr=optim.learning_rate,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            foreach=False if sharded else None,  # which would mix sharded and other tensors
        )

    def __call__(
        self,
        batch: Batch,
        advantage: Tensor,
        credit: Tensor,
        lr: float,
        old_logp: Tensor | None = None,
        kl_factor: Tensor | None = None,
    ) -> tuple[Metrics, Tensor]:
        """One optimizer step: advantage (B,), credit (B, T), kl_factor (B, T) or None for 1 → metrics and old_logp (B, T).

        `old_logp` are the log-probs under the policy that sampled; None on the first update of a batch, when the policy
        is still that one: they are then scored by the same code as the new ones, or 0 for images that the update leaves out
        because they have no part in the loss. In the metrics, `skipped` is 1 if the loss was not finite, and `kl` None
        without a reference.
        """
        set_rate(self.optimizer, lr)
        mask, used = batch.mask, self._used(advantage)
        counted_codes = mask & used[:, None]
        weight, base_weight = self._weights(credit, mask), self._weights(torch.ones_like(credit), counted_codes)
        first, old_logp = old_logp is None, torch.zeros_like(credit) if old_logp is None else old_logp
        metrics: Metrics = {}
        for rows, counted in self._micro_batches(used.nonzero().flatten()):
            logp, entropy = self._score(self.learner, batch, rows, sampled=first)
            if not logp.requires_grad:
                raise UserError(
                    "the log-probs of the model have no gradient: what set_trainable() returned has no part in them"
                )
            if first:
                old_logp[rows] = logp.detach()
            ref_logp = self._reference_logp(batch, rows)
            factor = 1.0
            if self.algorithm.reweight is not None and ref_logp is not None:
                factor = self.algorithm.reweight(logp, ref_logp)
            loss, parts = policy_loss(
                logp,
                old_logp[rows],
                advantage[rows],
                mask[rows],
                weight[rows] * factor * counted,
                base_weight[rows] * counted,
                surrogate=self.algorithm.surrogate.fn,
                clip_low=self.algorithm.clip_low,
                clip_high=self.algorithm.clip_high,
                ref_logp=ref_logp,
                beta=self.config.loss.beta,
                kl_factor=None if kl_factor is None else kl_factor[rows],
                entropy=entropy,
                entropy_coef=self.config.loss.entropy_coef,
            )
            self.accelerator.backward(loss)
            for name, value in parts.items():
                metrics[name] = metrics.get(name, 0.0) + value.item()
        gaps = (old_logp - self._sampled_logp(batch))[counted_codes].abs()
        if self.reference is not None and "kl" not in metrics:
            metrics["kl"] = self._watched_kl(batch)
        metrics = {"kl": None, **self._sum_over_processes({**metrics, "gap": gaps.sum().item(), "codes": gaps.numel()})}
        metrics["logp_gap/replay"] = metrics.pop("gap") / max(metrics.pop("codes"), 1)
        metrics["grad_norm"] = self._step(math.isfinite(metrics["loss"]))
        metrics["skipped"] = float(not math.isfinite(metrics["grad_norm"]))
        return metrics, old_logp

    def _used(self, advantage: Tensor) -> Tensor:
        """(B,) bool: which images have a part in the loss. Without an advantage they have none, but in KL and entropy."""
        loss = self.config.loss
        return (
            torch.ones_like(advantage, dtype=torch.bool) if loss.beta > 0 or loss.entropy_coef > 0 else advantage != 0
        )

    def _micro_batches(self, rows: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Of the rows (n,), and whether they count: there is one pass at least, so that there are gradients to sum up, and
        where layers are sharded all processes must make the same number."""
        parts = rows.split(self.config.micro_batch) if len(rows) else ()
        passes = max(self.processes.gather(len(parts))) if self.sharded else len(parts)
        for number in range(max(passes, 1)):
            yield (parts[number], True) if number < len(parts) else (rows.new_zeros(1), False)

    def _weights(self, credit: Tensor, mask: Tensor) -> Tensor:
        """The weight of every token in the loss; counts are of all processes."""
        counts = self.processes.sum(torch.stack([mask.any(dim=1).sum(), mask.sum()]))
        sequences, tokens = counts.tolist()
        return token_weights(credit, mask, self.algorithm.averaging, max(sequences, 1), max(tokens, 1))

    @torch.no_grad()
    def entropies(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(P, G) each: mean entropy per code of the distribution that is scored, of the policy and of the reference."""
        found = []
        every = torch.arange(len(batch.mask), device=batch.mask.device)
        for rows, counted in self._micro_batches(every):
            both = [self._score(policy, batch, rows, entropy=True)[1] for policy in (self.learner, self.reference)]
            if counted:
                found.append(torch.stack([entropy.mean(dim=1) for entropy in both if entropy is not None]))  # (2, b)
        own, reference = torch.cat(found, dim=1).cpu().unflatten(1, (-1, batch.group))
        return own, reference

    def _score(
        self, policy: Any, batch: Batch, rows: Tensor, entropy: bool = False, sampled: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(b, T) log-probs of the sampled codes of some rows under the scoring distribution, and entropy if it is used.

        Where the policy is still the one that `sampled` the batch, the rollout has what the null branch would give again.
        """
        prompts, null = rows // batch.group, None
        if self.config.scoring == "guided" and batch.null is not None:
            kept = batch.rollout.stats.get(NULL_HIDDEN) if sampled else None
            null = batch.null[prompts] if kept is None else kept[rows]
        recompute = self.config.gradient_checkpointing and torch.is_grad_enabled()
        with self.accelerator.autocast(), recomputed(policy, recompute):
            scores = policy.logp(
                batch.cond[prompts],
                batch.rollout.tokens[rows],
                temperature=self.config.temperature,
                null=null,
                guidance=1.0 if null is None else self.config.guidance,
                entropy=entropy or self.config.loss.entropy_coef > 0,
            )
        return scores.logp, scores.entropy

    def _sampled_logp(self, batch: Batch) -> Tensor:
        """(B, T), what the rollout says of its codes under the scoring distribution."""
        return batch.rollout.sample_logp if self.config.scoring == "guided" else batch.rollout.cond_logp

    @torch.no_grad()
    def _reference_logp(self, batch: Batch, rows: Tensor) -> Tensor | None:
        """Where the loss asks for it."""
        if self.reference is None or not (self.config.loss.beta > 0 or self.algorithm.reweight):
            return None
        return self._score(self.reference, batch, rows)[0]

    @torch.no_grad()
    def _watched_kl(self, batch: Batch) -> float:
        """This process's part of the mean KL per code from the starting model, on the images of all that the monitor looks at,
        where the loss has no such term. Of the policy that sampled, whose log-probs are there."""
        counts = self.processes.gather(0 if batch.idle else len(batch.images))
        first, own = sum(counts[: self.processes.index]), counts[self.processes.index]
        chosen = spread(sum(counts), self.config.monitor.images)
        here = [place - first for place in chosen if 0 <= place - first < own]
        sampled, total = self._sampled_logp(batch), 0.0
        for rows, counted in self._micro_batches(torch.tensor(here, dtype=torch.int64, device=sampled.device)):
            divergence = kl_k3(sampled[rows], self._score(self.reference, batch, rows)[0])
            total += counted * divergence.mean(dim=1).sum().item()
        return total / max(len(chosen), 1)

    def _sum_over_processes(self, metrics: Metrics) -> Metrics:
        values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(metrics, self.processes.sum(values).tolist(), strict=True))

    def _step(self, finite: bool) -> float:
        """Sums gradients over processes (the weights carry the global counts), clips, steps. Returns the norm, or NaN."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.processes.sum_each([gradient for gradient in gradients if not sharding.is_sharded(gradient)])
        norm = sharding.clip_gradients(self.parameters, self.config.optim.max_grad_norm)
        if finite and math.isfinite(norm):
            self.optimizer.step()
            if self.sharded:
                sharding.copy_to(self.weights, self.parameters)
        else:
            norm = math.nan
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def take_over(self) -> None:
        """To be called when the policy's weights were set from outside."""
        if self.sharded:
            sharding.copy_to(self.parameters, self.weights)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then constant, or a cosine that ends at 0 after the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
