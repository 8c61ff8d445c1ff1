"""Negative prompts: what the policy's predictions are compared with to find the tokens that the question decided.

Three kinds, one of which a run has:

- a template around the question, by default one that asks for a wrong answer (arXiv 2605.29198 does so for reasoning);
- the empty prompt, as the template that is empty;
- a column of the data, with a text or a whole conversation for each question.

A template is text in the place of the question, before the chat template is applied; so it is rendered once, and the
negative prompt is a conversation like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gcpo_t2i.errors import UserError

QUESTION = "{question}"
WRONG_ON_PURPOSE = f"{QUESTION}\n\nGive a wrong answer on purpose."

Prompt = str | Sequence[Mapping[str, Any]]  # a text, or the messages of a conversation


def check_template(template: str) -> None:
    """UserError for a template that has other words than the question and not the question itself."""
    if template.strip() and QUESTION not in template:
        raise UserError(
            f"negative_template '{template}' has no {QUESTION}, so the tokens would be compared with an answer to something "
            f"else; put {QUESTION} where the question belongs, or leave it empty to compare with the empty prompt"
        )


def check_cell(given: Any, where: str, column: str) -> None:
    """UserError, which begins with `where`, for what is no negative prompt: nothing, or neither a text nor messages."""
    if given in (None, []) or (isinstance(given, str) and not given.strip()):
        raise UserError(
            f"{where}: negative_column '{column}' is empty; give every row a negative prompt, or drop the setting, and the "
            "negative_template is used"
        )
    if not isinstance(given, str) and not (isinstance(given, list) and all(map(_is_message, given))):
        raise UserError(
            f"{where}: negative_column '{column}' must be a text, or messages with role and content, got {given!r:.60}"
        )


def _is_message(given: Any) -> bool:
    return isinstance(given, Mapping) and {"role", "content"} <= given.keys()


def with_question(prompt: Prompt, change: str) -> Prompt:
    """The prompt with `change` in the place of its question, where {question} stands for the question itself.

    The question of a conversation is the last message of the user; the others stay.
    """
    if isinstance(prompt, str):
        return change.replace(QUESTION, prompt)
    messages = [dict(message) for message in prompt]
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise UserError(
            "a negative prompt takes the place of the user's message, and a prompt has none, only messages of "
            f"{', '.join(message['role'] for message in messages)}; give a negative_column of whole conversations"
        )
    last = messages[asked[-1]]
    if not isinstance(last["content"], str):
        raise UserError("a negative template is for questions that are texts, not pictures; give a negative_column")
    last["content"] = change.replace(QUESTION, last["content"])
    return messages


def negative_prompt(prompt: Prompt, row: Mapping[str, Any], template: str, column: str | None) -> Prompt:
    """The negative prompt of one row of the data, of the same kind as its prompt, text or conversation.

    UserError for a row whose column has none.
    """
    if column is None:
        return with_question(prompt, template)
    given: Any = row.get(column)
    asked = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    check_cell(given, f"the row of the prompt '{asked:.60}'", column)
    # As it stands: a text with {question} in it means these very letters.
    return given if not isinstance(given, str) or isinstance(prompt, str) else _said(prompt, given)


def _said(prompt: Prompt, text: str) -> Prompt:
    marked = with_question(prompt, "")
    assert not isinstance(marked, str)
    last = max(place for place, message in enumerate(marked) if message["role"] == "user")
    return [{**message, "content": text} if place == last else message for place, message in enumerate(marked)]
