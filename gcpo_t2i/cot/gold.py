"""Gold answers (arXiv 2510.07790): where no answer of a group is right, the reference takes the place of the worst one.

Its reward is what the reward functions say of it: a reference that fails itself is not used. The advantage is
normalised by TRL, within the group as it is then. π_old of a reference is left open by the paper; here it is the
policy before the update, teacher-forced, so that its ratio starts at 1 (as with images, `algo.edits`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gcpo_t2i.algo.edits import all_failed, worst
from gcpo_t2i.cot.columns import cells
from gcpo_t2i.errors import UserError

if TYPE_CHECKING:
    from gcpo_t2i.cot.trainer import GuidanceGRPOTrainer, Rows

logger = logging.getLogger(__name__)

Rewards = Callable[[list[Any], list[list[int]]], Tensor]  # answers and their ids → (rows of all processes, functions)


class Generated(NamedTuple):
    """What TRL's `_generate` returns."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    tool_mask: list[list[int]] | None
    completions: list[Any]  # texts, or conversations of one message
    logprobs: list[list[float]] | None  # of vLLM
    extra_fields: dict[str, Any]
    images: Any
    tool_images: Any


def gold_text(answer: Any, what: str = "a gold answer") -> str:
    """A reference, a text or messages of which the last is the assistant's, as a text; '' for none. UserError, which begins
    with `what`, for anything else."""
    last = answer[-1] if isinstance(answer, list) and answer else None
    text = last.get("content") if isinstance(last, Mapping) and last.get("role") == "assistant" else answer
    if text in (None, []):
        return ""
    if not isinstance(text, str):
        raise UserError(
            f"{what} must be the right answer as a text, or as messages of which the last is the assistant's, got "
            f"{answer!r:.80}"
        )
    return text


def missing_gold(answers: Iterable[Any]) -> int:
    """How many have nothing in them. UserError as `gold_text`."""
    return sum(not gold_text(answer).strip() for answer in answers)


def to_replace(totals: Tensor, group: int, least: float) -> tuple[Tensor, Tensor]:
    """Sums of rewards (N,) of whole groups → the groups without a success, and the row of the worst of each; both (P,)."""
    grouped = totals.view(-1, group)  # (P,G)
    failed = all_failed(grouped >= least)
    return failed, worst(grouped) + torch.arange(len(grouped), device=totals.device) * group


class GoldAnswers:
    """The references of one run. UserError if the data have none, or the run generates in several turns."""

    def __init__(self, trainer: GuidanceGRPOTrainer) -> None:
        self.trainer, self.column = trainer, str(trainer.args.gold_column)
        if trainer.tools or trainer.rollout_func is not None:
            raise UserError("gold_column: gold answers are for answers in one turn, without tools and rollout_func")
        self.group = int(trainer.num_generations or 0)
        self.longest = trainer.max_completion_length or math.inf  # tokens
        self._say_missing()

    def _say_missing(self) -> None:
        """Once, at the start, in the log of the first process."""
        found = cells("gold_column", self.column, self.trainer.train_dataset, "train_dataset")
        answers = [gold_text(cell, f"{where}: gold_column '{self.column}'") for where, cell in found]
        missing = missing_gold(answers)
        if answers and missing == len(answers):
            raise UserError(
                f"gold_column '{self.column}' is empty for all {missing} prompts; fill it, or drop the setting"
            )
        if missing and self.trainer.accelerator.is_main_process:
            logger.warning(
                f"{missing} of {len(answers)} prompts have no '{self.column}'; their groups stay as they are"
            )

    def inject(self, rows: Rows, generated: Any, rewards: Rewards) -> tuple[Generated, Tensor, dict[str, Tensor]]:
        """The batch with its references, their and all other rewards (N,F) of all processes, and counts over these."""
        own = Generated(*generated)
        scored = rewards(own.completions, own.completion_ids)
        totals = self._totals(scored)
        failed, places = to_replace(totals, self.group, self.trainer.args.success_reward)
        counts = {"all_failed": failed.sum(), "own_reward": totals.mean()}
        first = self.trainer.accelerator.process_index * len(rows)
        wanted = {place - first for place in places[failed].tolist() if 0 <= place - first < len(rows)}
        golds = {row: self._ids(rows[row]) for row in wanted if self._text(rows[row]).strip()}
        fitting = {row: ids for row, ids in golds.items() if len(ids) <= self.longest}
        offered = self._everywhere([row in golds for row in range(len(rows))])
        usable = self._everywhere([row in fitting for row in range(len(rows))])
        if usable.any():
            proposed = self._replaced(own, rows, fitting)
            self.trainer._pending_extra_logs.clear()  # what rewards logged of the answers that are scored again
            self.trainer._pending_metrics.clear()
            again = rewards(proposed.completions, proposed.completion_ids)
            accepted = usable & (self._totals(again) >= self.trainer.args.success_reward)
            scored = torch.where(accepted[:, None], again, scored)
            local = accepted[first : first + len(rows)]
            own = self._replaced(own, rows, {row: ids for row, ids in fitting.items() if local[row]})
        else:
            accepted = usable
        return own, scored, counts | {"injected": accepted.sum(), "rejected": (offered & ~accepted).sum()}

    def _totals(self, scored: Tensor) -> Tensor:
        """Rewards (N,F), NaN where one does not apply → weighted sums (N,), as TRL's."""
        return (scored * self.trainer.reward_weights.to(scored.device)).nansum(dim=1)

    def _everywhere(self, flags: list[bool]) -> Tensor:
        """The flags (B,) of this process → those of all, (N,)."""
        return self.trainer.accelerator.gather(torch.tensor(flags, device=self.trainer.accelerator.device))

    def _text(self, row: dict[str, Any]) -> str:
        return gold_text(row.get(self.column), f"gold_column '{self.column}'")

    def _ids(self, row: dict[str, Any]) -> list[int]:
        """The reference as the policy would have said it, with the end."""
        tokenizer = self.trainer._tokenizer
        return [*tokenizer(self._text(row), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def _replaced(self, own: Generated, rows: Rows, golds: dict[int, list[int]]) -> Generated:
        """A copy with these rows' answers replaced; lists of other processes' rows are not here."""
        ids, completions = list(own.completion_ids), list(own.completions)
        logprobs = None if own.logprobs is None else list(own.logprobs)
        for row, gold in golds.items():
            text = self._text(rows[row])
            ids[row] = gold
            completions[row] = (
                text if isinstance(own.completions[row], str) else [{"role": "assistant", "content": text}]
            )
            if logprobs is not None:  # no sampler drew it: NaN is where TRL corrects nothing
                logprobs[row] = [float("nan")] * len(gold)
        return own._replace(completion_ids=ids, completions=completions, logprobs=logprobs)
