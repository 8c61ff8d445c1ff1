"""How many answers to held-out questions are right."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gcpo_t2i.config import CotEvalConfig
from gcpo_t2i.cot.models import answer
from gcpo_t2i.cot.questions import Question
from gcpo_t2i.errors import UserError

RewardFn = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Evaluation:
    """Scores of every answer, question after question; NaN where the reward does not apply."""

    questions: list[Question]
    answers: list[str]  # all of a question beside each other
    scores: list[float]

    @property
    def mean(self) -> float:
        known = [score for score in self.scores if not math.isnan(score)]
        return sum(known) / len(known) if known else float("nan")

    @property
    def ci95(self) -> float:
        """Half of a normal interval over questions, whose own answers are averaged first."""
        each = len(self.scores) // len(self.questions)
        means = [sum(self.scores[start : start + each]) / each for start in range(0, len(self.scores), each)]
        means = [mean for mean in means if not math.isnan(mean)]
        if len(means) < 2:
            return float("nan")
        middle = sum(means) / len(means)
        return 1.96 * math.sqrt(sum((mean - middle) ** 2 for mean in means) / (len(means) - 1) / len(means))


def user_message(template: str, question: Question) -> str:
    return template.replace("{question}", question["question"])


def evaluate(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    reward: RewardFn,
    config: CotEvalConfig,
    template: str,
    tokens: int,
) -> Evaluation:
    """Asks each question `answers_per_question` times and scores the answers with a reward function of TRL."""
    asked = [question for question in questions for _ in range(config.answers_per_question)]
    ids = answer(
        model,
        tokenizer,
        [user_message(template, question) for question in asked],
        tokens=tokens,
        temperature=config.temperature,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Evaluation(list(questions), answers, _score(reward, asked, template, answers, ids))


def _score(
    reward: RewardFn, asked: Sequence[Question], template: str, answers: Sequence[str], ids: Sequence[list[int]]
) -> list[float]:
    if inspect.iscoroutinefunction(reward):
        raise UserError("an evaluation cannot await a reward; make it a plain function, or set --eval.num_questions 0")
    columns = {name: [question[name] for question in asked] for name in asked[0]}
    scores = reward(
        prompts=[[{"role": "user", "content": user_message(template, question)}] for question in asked],
        completions=[[{"role": "assistant", "content": text}] for text in answers],
        completion_ids=list(ids),
        **columns,
    )
    if len(scores) != len(answers):
        raise UserError(
            f"the reward returned {len(scores)} scores for {len(answers)} answers; it must return one for each"
        )
    return [float("nan") if score is None else float(score) for score in scores]
