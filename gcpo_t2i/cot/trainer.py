"""`GuidanceGRPOTrainer`: TRL's GRPOTrainer with an advantage for each token instead of one for each answer.

    A_t = A · w_t        w = credit of log π(y_t | x, y_<t) and log π(y_t | x⁻, y_<t), `gcpo_t2i.algo.credit`

Both are teacher-forced without gradient by the policy that is about to be updated, x⁻ being the negative prompt. Everything
else is TRL's: generation, vLLM, PEFT, sharding, rewards, losses, logging. With uniform credit w is 1 and the run is
TRL's own, bit for bit.

Deviation from the code published with arXiv 2605.29198: there the credit is computed again in every update, from the
log-probs of that update; here once for each rollout, so that several updates of it push into the same direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOTrainer

from gcpo_t2i.algo.credit import top_mass
from gcpo_t2i.cot.columns import cells
from gcpo_t2i.cot.gold import GoldAnswers
from gcpo_t2i.cot.negatives import check_cell, negative_prompt
from gcpo_t2i.cot.trl_config import GuidanceGRPOConfig
from gcpo_t2i.errors import UserError

Rows = list[dict[str, Any]]


class GuidanceGRPOTrainer(GRPOTrainer):
    """Takes the arguments of `trl.GRPOTrainer`, with a GuidanceGRPOConfig as `args`.

    UserError for other args, for columns that the data do not have, for rows without a negative prompt in theirs, and for what
    gold answers do not go with.
    """

    args: GuidanceGRPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: Any
    accelerator: Any
    _tokenizer: Any

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **others: Any) -> None:
        args = GuidanceGRPOConfig() if args is None else args
        if not isinstance(args, GuidanceGRPOConfig):
            raise UserError(
                f"args is a {type(args).__name__}; make it a GuidanceGRPOConfig, which takes the same settings"
            )
        super().__init__(model, reward_funcs, args, *rest, **others)
        self.credit = args.text_credit()
        self.gold = GoldAnswers(self) if args.gold_column is not None else None
        if args.negative_column is not None:
            for name, data in self._data().items():
                for where, given in cells("negative_column", args.negative_column, data, name):
                    check_cell(given, where, args.negative_column)
        self._rows: Rows = []  # of the batch that is being generated
        self._scored: Tensor | None = None  # its rewards, if they are known before TRL asks
        self._open: dict[str, Any] | None = None  # inputs of the loss that is being computed at sequence level

    def _data(self) -> dict[str, Any]:
        """The data sets, by what they are in Python."""
        held_out: Any = self.eval_dataset
        several = held_out if isinstance(held_out, dict) else {}
        named = {f"eval_dataset['{name}']": data for name, data in several.items()} or {"eval_dataset": held_out}
        return {"train_dataset": self.train_dataset, **named}

    # --- credit ---------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: Rows) -> dict[str, Any]:
        self._rows = inputs
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"].bool()
        if "tool_mask" in output:
            mask = mask & output["tool_mask"].bool()
        first = self.accelerator.process_index * len(inputs)
        places = ((self.state.global_step, first + row) for row in range(len(inputs)))
        credit = self.credit(partial(self._score, inputs, output), mask, self.args.seed, places)  # (B,T)
        output["advantages"] = output["advantages"][:, None] * credit
        self._note("credit/top_mass", top_mass(credit, mask).mean())
        return output

    def _note(self, name: str, value: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather(value.float()).mean().item())

    @torch.no_grad()
    def _score(self, rows: Rows, output: Mapping[str, Any], name: str) -> Tensor:
        """(B,T) of the sampled answers: `cond_logp` under their prompts, `null_logp` under negative ones, or `entropy`."""
        if "pixel_values" in output:
            raise UserError("guidance credit is for prompts that are texts; with pictures use credit 'uniform'")
        if name == "null_logp":
            null_ids, null_mask = self._negative_ids(rows, output["prompt_ids"].device)
            return self._teacher_force(output, null_ids, null_mask)[0]
        if name == "cond_logp" and "old_per_token_logps" in output:
            return output["old_per_token_logps"]  # TRL has them where it samples with vLLM or updates more than once
        logp, entropy = self._teacher_force(output, output["prompt_ids"], output["prompt_mask"], name == "entropy")
        return logp if entropy is None else entropy

    def _negative_ids(self, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and attention mask (B,L) of the negative prompts, through TRL's chat template, padded on the left."""
        settings = self.args.negative_template, self.args.negative_column
        prompts = [negative_prompt(row["prompt"], row, *settings) for row in rows]
        # A model needs a token to predict the next one from, also where the prompt has none.
        tokenizer = self._tokenizer
        alone = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = [torch.tensor(list(own) or [alone]) for own in self._tokenize_prompts(prompts)[0]]
        mask = pad_sequence([torch.ones_like(own) for own in ids], batch_first=True, padding_side="left")
        padded = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left")
        return padded.to(device), mask.to(device)

    def _teacher_force(
        self, output: Mapping[str, Any], prompt_ids: Tensor, prompt_mask: Tensor, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs, and entropies if asked for, of the sampled answers after these prompts, both (B,T)."""
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        logp, entropies, *_ = super()._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([prompt_ids, output["completion_ids"]], dim=1),
            torch.cat([prompt_mask, output["completion_mask"]], dim=1),
            output["completion_ids"].shape[1],
            batch_size=size,
            compute_entropy=entropy,
        )
        return logp, entropies

    # --- gold answers ---------------------------------------------------------------------------------------------

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        if self.gold is None or not self.model.training:
            return generated
        rewards = partial(super()._calculate_rewards, self._rows, prompts)
        generated, self._scored, counts = self.gold.inject(self._rows, generated, rewards)
        for name, count in counts.items():
            self._note(f"gold/{name}", count)
        return generated

    def _calculate_rewards(self, inputs: Rows, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        if self._scored is not None:  # to score twice would log twice, and a reward may cost money
            scored, self._scored = self._scored, None
            return scored
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    # --- one ratio for each answer --------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss; at sequence level in GSPO's token form (arXiv 2507.18071), unless credit is uniform.

        A ratio of the whole answer has the same gradient for each of its tokens, whatever their weights, as these have the
        mean 1. In the token form every token has the value of that ratio and a gradient of its own, so credit counts; under
        uniform credit both are the same.
        """
        if self.importance_sampling_level != "sequence" or self.credit.rule_name == "uniform":
            return super()._compute_loss(model, inputs)
        self._open, self.importance_sampling_level = dict(inputs), "token"
        try:
            return super()._compute_loss(model, self._open)
        finally:
            self._open, self.importance_sampling_level = None, "sequence"

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._open is not None:
            # TRL will take exp(logp − old): with this old it is the ratio of the answer, and keeps the gradient of logp.
            logp = result[0].detach()
            old = self._open.get("old_per_token_logps", logp)
            mask = self._open["completion_mask"] * self._open.get("tool_mask", 1)
            log_ratio = ((logp - old) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
            self._open["old_per_token_logps"] = logp - log_ratio
        return result
