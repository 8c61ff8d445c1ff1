"""Prompts → images, rewards and log-probs of one step: what an update learns from."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from gcpo_t2i.config import TrainConfig
from gcpo_t2i.data import Prompt
from gcpo_t2i.models.drawing import NULL_HIDDEN
from gcpo_t2i.models.pictures import join_pictures
from gcpo_t2i.models.policy import Condition, Generators, Policy, Rollout
from gcpo_t2i.overlap import overlapped
from gcpo_t2i.processes import ALONE, Processes
from gcpo_t2i.scoring import RewardSet, Scores

ROLLOUT_TENSORS = frozenset({"cond_logp", "null_logp"})
ROLLOUT_STATS = frozenset({"exact_kl", "js", "entropy"})  # computed while sampling, on request
GROUP_TENSORS = frozenset({"advantage", "code_vectors"})  # known once the samples of a group are
NULL_BRANCH = frozenset({"null_logp", "exact_kl", "js"})  # what only a rollout with both branches knows
REPLAYED = NULL_BRANCH | {"cond_logp"}  # what is another under the policy of a later update
MAX_ROUNDS = 3  # of sampling for one step, where an algorithm replaces groups without signal


@dataclass(frozen=True)
class Sampling:
    """How images are drawn: group size G, guidance scale, temperature, and truncation of the distribution."""

    group: int
    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def of(cls, config: TrainConfig) -> Sampling:
        return cls(config.group_size, config.guidance, config.temperature, config.top_k, config.top_p)


def scores_mixture(config: TrainConfig) -> bool:
    """Whether an update learns from log-probs of the guided mixture, and not of the prompt's branch alone."""
    return config.scoring == "guided" and config.guidance != 1.0


def kept_stats(config: TrainConfig, required: Collection[str]) -> frozenset[str]:
    """What the rollouts of training keep: what of them is `required`, the entropy, and the outputs of the null branch where
    an update scores the guided mixture, so that it needs no pass of that branch."""
    return (ROLLOUT_STATS & set(required)) | {"entropy"} | ({NULL_HIDDEN} if scores_mixture(config) else set())


@dataclass(frozen=True)
class Batch:
    """One step's samples, B = P·G rows with groups contiguous."""

    prompts: list[Prompt]  # P
    cond: Condition  # P rows
    null: Condition | None  # P rows
    rollout: Rollout  # B rows
    images: Sequence[Image.Image]  # B
    scores: Scores  # name → B scores
    rewards: Tensor  # (P, G) float32, the weighted sum
    seconds: dict[str, float]  # "rollout" and "reward", wall clock
    success: Tensor | None = None  # (P, G) bool, which samples are right, where the rewards say so
    idle: bool = False  # whether it only stands in for an empty batch, so that its process has something to compute
    selected: Tensor | None = None  # (B, T) bool, where an algorithm learns from some of the codes only

    @property
    def group(self) -> int:
        return self.rewards.shape[1]

    @property
    def mask(self) -> Tensor:
        """(B, T) bool: the codes that are learned from."""
        every = torch.full_like(self.rollout.tokens, not self.idle, dtype=torch.bool)
        return every if self.selected is None else every & self.selected

    def tensors(self) -> dict[str, Tensor]:
        """What credit rules may ask for, each (B, T)."""
        named = {"cond_logp": self.rollout.cond_logp, "null_logp": self.rollout.null_logp, **self.rollout.stats}
        return {name: tensor for name, tensor in named.items() if tensor is not None and name != NULL_HIDDEN}

    def groups(self, keep: Sequence[int]) -> Batch:
        """Only the prompts with these indices, and their samples."""
        rows = [p * self.group + g for p in keep for g in range(self.group)]
        return replace(
            self,
            prompts=[self.prompts[p] for p in keep],
            cond=self.cond[list(keep)],
            null=None if self.null is None else self.null[list(keep)],
            rollout=_rows(self.rollout, lambda tensor: tensor[rows]),
            images=[self.images[row] for row in rows],
            scores={name: [values[row] for row in rows] for name, values in self.scores.items()},
            rewards=self.rewards[list(keep)],
            success=None if self.success is None else self.success[list(keep)],
        )


def _rows(rollout: Rollout, pick: Callable[[Tensor], Tensor]) -> Rollout:
    return Rollout(
        pick(rollout.tokens),
        pick(rollout.cond_logp),
        None if rollout.null_logp is None else pick(rollout.null_logp),
        pick(rollout.sample_logp),
        {name: pick(tensor) for name, tensor in rollout.stats.items()},
    )


def join(batches: Sequence[Batch]) -> Batch:
    """Batches one after another as one. All must have been sampled with the same settings."""
    first = batches[0]
    if len(batches) == 1:
        return first

    return Batch(
        prompts=[prompt for batch in batches for prompt in batch.prompts],
        cond=Condition.cat([batch.cond for batch in batches]),
        null=None if first.null is None else Condition.cat([batch.null for batch in batches if batch.null is not None]),
        rollout=_join_rollouts([batch.rollout for batch in batches]),
        images=join_pictures([batch.images for batch in batches]),
        scores=_join_scores([batch.scores for batch in batches]),
        rewards=torch.cat([batch.rewards for batch in batches]),
        success=None if first.success is None else torch.cat([b.success for b in batches if b.success is not None]),
        seconds={key: sum(batch.seconds[key] for batch in batches) for key in first.seconds},
    )


def _join_rollouts(rollouts: Sequence[Rollout]) -> Rollout:
    first = rollouts[0]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(rollout, name) for rollout in rollouts])

    return Rollout(
        joined("tokens"),
        joined("cond_logp"),
        None if first.null_logp is None else joined("null_logp"),
        joined("sample_logp"),
        {name: torch.cat([rollout.stats[name] for rollout in rollouts]) for name in first.stats},
    )


def _join_scores(parts: Sequence[Scores]) -> Scores:
    return {name: [score for scores in parts for score in scores[name]] for name in parts[0]}


def conditions(policy: Policy, prompts: Sequence[Prompt], with_null: bool = True) -> tuple[Condition, Condition | None]:
    """Encoded prompts and, unless told otherwise, their null or negative prompts; P rows each."""
    cond = policy.condition([prompt.text for prompt in prompts])
    null = policy.condition([prompt.negative for prompt in prompts], like=cond) if with_null else None
    return cond, null


def draw(
    policy: Policy,
    cond: Condition,
    null: Condition | None,
    sampling: Sampling,
    generator: Generators,
    stats: Collection[str] = (),
) -> Rollout:
    """G images of each of the P rows, drawn as `sampling` says. See `Policy.sample`."""
    return policy.sample(
        cond,
        null,
        group=sampling.group,
        guidance=sampling.guidance,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        generator=generator,
        stats=stats,
    )


@torch.no_grad()
def sample_batch(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: RewardSet,
    sampling: Sampling,
    generator: Generators,
    stats: Collection[str] = (),
    need_null: bool = True,
    batch_size: int | None = None,
) -> Batch:
    """Samples G images of each of P prompts, decodes and scores them.

    At once, or as many whole groups at a time as make `batch_size` images: the rewards then score one part while the next is
    sampled, and of their time "reward" is only what was waited for. The null branch runs where guidance or the credit
    (`need_null`) asks for it. UserError from the rewards.
    """
    start, group = time.perf_counter(), sampling.group
    cond, null = conditions(policy, prompts, with_null=need_null or sampling.guidance != 1.0)
    share = len(prompts) if batch_size is None else max(1, batch_size // group)

    def sampled(part: slice) -> tuple[Rollout, Sequence[Image.Image], list[Prompt]]:
        draws = (
            generator if isinstance(generator, torch.Generator) else generator[part.start * group : part.stop * group]
        )
        rollout = draw(policy, cond[part], None if null is None else null[part], sampling, draws, stats)
        return rollout, policy.decode(rollout.tokens), [prompt for prompt in prompts[part] for _ in range(group)]

    parts = [slice(first, first + share) for first in range(0, len(prompts), share)]
    made, scored, waited = overlapped(parts, sampled, lambda part: rewards.score(*part[1:]), cond.mask.device)
    scores = _join_scores(scored)
    totals = torch.tensor(rewards.total(scores), dtype=torch.float32).view(len(prompts), group)
    right = rewards.successes(scores)
    success = None if right is None else torch.tensor(right).view_as(totals)
    seconds = {"rollout": time.perf_counter() - start - waited, "reward": waited}
    rollout, images = _join_rollouts([own for own, *_ in made]), join_pictures([own for _, own, _ in made])
    return Batch(list(prompts), cond, null, rollout, images, scores, totals, seconds, success)


def credit_tensors(policy: Policy, batch: Batch, advantage: Tensor, required: Collection[str]) -> dict[str, Tensor]:
    """What credit rules and selections may ask for: `batch.tensors()`, and of the groups their `advantage` (P, G) and, if
    it is required, `code_vectors` (P, G, H, W, D), the image tokenizer's vectors of the codes."""
    tokens = batch.rollout.tokens
    tensors = {**batch.tensors(), "advantage": advantage.to(tokens.device)}
    if "code_vectors" in required:
        tensors["code_vectors"] = policy.codebook[tokens].unflatten(1, policy.grid).unflatten(0, (-1, batch.group))
    return tensors


@torch.no_grad()
def replay(policy: Policy, batch: Batch, micro_batch_size: int, temperature: float = 1.0) -> Batch:
    """The batch with what the credit reads scored again (teacher-forced) by the policy as it is now."""
    tokens = batch.rollout.tokens
    kept = {"entropy", NULL_HIDDEN}  # of the policy that sampled
    stats = [name for name in batch.rollout.stats if name not in kept]
    parts = []
    for rows in torch.arange(len(tokens), device=tokens.device).split(micro_batch_size):
        prompts = rows // batch.group
        null = None if batch.null is None else batch.null[prompts]
        parts.append(policy.rescore(batch.cond[prompts], null, tokens[rows], temperature=temperature, stats=stats))
    again = {name: torch.cat([part.stats[name] for part in parts]) for name in stats}
    rollout = replace(
        batch.rollout,
        cond_logp=torch.cat([part.cond_logp for part in parts]),
        null_logp=None if batch.null is None else torch.cat([part.null_logp for part in parts]),  # type: ignore[misc]
        stats=batch.rollout.stats | again,
    )
    return replace(batch, rollout=rollout)


def collect(
    sample: Callable[[], Batch],
    keep: Callable[[Tensor], Tensor] | None,
    max_rounds: int,
    processes: Processes = ALONE,
) -> tuple[Batch, list[Batch]]:
    """The batch to learn from, and all that were sampled for it.

    Every call of `sample` gives P fresh groups. Where the algorithm names a `keep` rule (DAPO's dynamic sampling, arXiv
    2503.14476), groups without signal are replaced by those of fresh prompts, for at most `max_rounds` rounds in all. If
    fewer groups than wanted are left then, the batch is smaller. The processes sample equally often, and together keep
    the groups that one process would keep. One that is left with none has an idle batch.
    """
    batch = sample()
    if keep is None:
        return batch, [batch]
    drawn, kept = [batch], [_with_signal(batch, keep)]
    wanted = sum(processes.gather(len(batch.prompts)))
    counts = [processes.gather(len(kept[0].prompts))]  # rounds × processes
    while sum(map(sum, counts)) < wanted and len(drawn) < max_rounds:
        drawn.append(sample())
        kept.append(_with_signal(drawn[-1], keep))
        counts.append(processes.gather(len(kept[-1].prompts)))
    shares = [own[processes.index] for own in first_in_turn(counts, wanted)]
    chosen = join([part.groups(range(share)) for part, share in zip(kept, shares, strict=True)])
    if not any(map(any, counts)):  # no signal anywhere: the others' last batches and this one say so
        chosen = drawn[-1]
    elif not chosen.prompts:
        chosen = replace(drawn[-1].groups([0]), idle=True)
    seconds = {key: sum(part.seconds[key] for part in drawn) for key in batch.seconds}
    return replace(chosen, seconds=seconds), drawn


def first_in_turn(counts: Sequence[Sequence[int]], wanted: int) -> list[list[int]]:
    """How many of each count belong to the first `wanted` of all, counted row by row."""
    left, shares = wanted, []
    for row in counts:
        shares.append([])
        for count in row:
            shares[-1].append(min(count, left))
            left -= shares[-1][-1]
    return shares


def _with_signal(batch: Batch, keep: Callable[[Tensor], Tensor]) -> Batch:
    return batch.groups(keep(batch.rewards).nonzero().flatten().tolist())
