"""Token credit of answers to one question: sampled, or given; scored, if the right answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcpo_t2i.algo.advantage import group_advantage
from gcpo_t2i.cot.answers import is_right, right_number
from gcpo_t2i.cot.models import answer, score_answers
from gcpo_t2i.cot.negatives import with_question
from gcpo_t2i.cot.text_credit import TextCredit
from gcpo_t2i.errors import UserError


@dataclass(frozen=True)
class Token:
    """`credit` has the mean 1 over the answer. `gap`: log π(y|x) − log π(y|x⁻), in nats. `signed`: credit × advantage,
    None without a right answer."""

    text: str
    credit: float
    gap: float
    signed: float | None


@dataclass(frozen=True)
class Explained:
    """One answer. `reward` and `advantage` are None where no right answer was given, or the group has one answer."""

    tokens: list[Token]
    reward: float | None
    advantage: float | None

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


def explain(
    model: Any,
    tokenizer: Any,
    user: str,
    answers: Sequence[Sequence[int]],
    negative_template: str,
    credit: TextCredit,
    temperature: float,
    right: str | None,
    seed: int = 0,
) -> list[Explained]:
    """What the credit rule gives each token of the answers (ids, none empty) to one message of the user.

    UserError for a right answer that is no number.
    """
    negative = str(with_question(user, negative_template))
    logp, entropy = score_answers(model, tokenizer, user, answers, temperature)
    null_logp, _ = score_answers(model, tokenizer, negative, answers, temperature)
    tensors = {"cond_logp": logp, "null_logp": null_logp, "entropy": entropy}
    lengths = torch.tensor([len(ids) for ids in answers])
    mask = torch.arange(logp.shape[1]) < lengths[:, None]
    weights = credit(tensors.__getitem__, mask, seed, ((0, row) for row in range(len(answers))))
    pieces = [token_texts(tokenizer, ids) for ids in answers]
    rewards = _rewards(["".join(texts) for texts in pieces], right)
    advantages = group_advantage(torch.tensor([rewards]))[0] if rewards and len(rewards) > 1 else None
    return [
        _explained(
            pieces[row],
            weights[row],
            (logp - null_logp)[row],
            rewards[row] if rewards else None,
            None if advantages is None else advantages[row].item(),
        )
        for row in range(len(answers))
    ]


def _explained(
    texts: list[str], weight: Tensor, gap: Tensor, reward: float | None, advantage: float | None
) -> Explained:
    tokens = [
        Token(text, own, difference, None if advantage is None else own * advantage)
        for text, own, difference in zip(texts, weight.tolist(), gap.tolist(), strict=False)
    ]
    return Explained(tokens, reward, advantage)


def _rewards(texts: list[str], right: str | None) -> list[float] | None:
    if right is None:
        return None
    number = right_number(right)
    if number is None:
        raise UserError(f"--answer {right!r} cannot be read as a number; write it as 18, -3.5 or 3/4")
    return [float(is_right(text, number)) for text in texts]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The piece of the decoded text that each token adds, so that the pieces make the whole; '' for the end."""
    texts = [tokenizer.decode(ids[:end], skip_special_tokens=True) for end in range(len(ids) + 1)]
    # A character of several tokens appears with the last of them: until then decoding ends in U+FFFD.
    shown = [text.rstrip("�") for text in texts]
    return [shown[end][len(shown[end - 1]) :] for end in range(1, len(ids) + 1)]


def sample_answers(
    model: Any, tokenizer: Any, user: str, n: int, tokens: int, temperature: float, seed: int
) -> list[list[int]]:
    return answer(model, tokenizer, [user] * n, tokens=tokens, temperature=temperature, seed=seed, batch_size=n)
