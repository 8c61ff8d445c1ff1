"""Questions with answers that can be checked: built in, from a .jsonl file, or a data set of the Hugging Face hub.

    {"question": "Ann has two pens. She buys three more. How many pens does Ann have?", "answer": "5",
     "gold": "two plus three is five. answer: 5"}

`gold`, a whole right answer, is optional; all other keys are columns, which reward functions get by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from gcpo_t2i.cot.answers import right_number
from gcpo_t2i.cot.columns import check_column
from gcpo_t2i.cot.negatives import check_cell
from gcpo_t2i.data import read_text
from gcpo_t2i.datasets_prompts import DATASET, read_rows
from gcpo_t2i.errors import UserError, did_you_mean

Question = dict[str, Any]  # question, answer, optionally gold, and other columns

BUILT_IN = {"arithmetic:train": False, "arithmetic:heldout": True}  # whether held out
BUILT_IN_SIZE = 4000  # of very many
BUILT_IN_SEED = 0


def load_questions(
    source: str, most: int | None = None, numbers: bool = True, negatives: str | None = None
) -> list[Question]:
    """At most `most` questions from the first; never empty. `numbers`: every answer must be a number; `negatives`: a column in
    which every question must have a negative prompt.

    UserError, which names the file and the line: unknown set, missing or empty file, a line that is no object, without a
    question or a negative prompt, or with an answer that cannot be read.
    """
    found = [(_checked(row, where, numbers), where) for row, where in islice(_rows(source), most)]
    if not found:
        raise UserError(f"question file '{source}' is empty; write one JSON object per line")
    names = dict.fromkeys(name for question, _ in found for name in question)
    if negatives is not None:
        check_column("negative_column", negatives, names, f"'{source}'")
        for question, where in found:
            check_cell(question.get(negatives), where, negatives)
    return [{name: question.get(name) for name in names} for question, _ in found]


def _rows(source: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    if source in BUILT_IN:
        from gcpo_t2i.cot.arithmetic.problems import questions

        rows = islice(questions(BUILT_IN[source], BUILT_IN_SEED), BUILT_IN_SIZE)
        return ((row, source) for row in rows)
    if source.startswith(DATASET):
        name, _, split = source.removeprefix(DATASET).partition(":")
        rows = read_rows(f"{DATASET}{name}:{split}:question")
        renamed = ({"question": row.pop("prompt"), **row} for row in rows)
        return ((row, f"{source}, row {number}") for number, row in enumerate(renamed, start=1))
    if source.startswith("arithmetic") and not Path(source).exists():
        raise UserError(f"questions '{source}' are unknown{did_you_mean(source, BUILT_IN)}")
    if Path(source).suffix.lower() != ".jsonl":
        raise UserError(f"questions '{source}': expected a .jsonl file, hf:DATASET, or one of {', '.join(BUILT_IN)}")
    return _lines(Path(source))


def _lines(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    for number, line in enumerate(read_text(path, "question file").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise UserError(f'{where}: expected an object with "question" and "answer", got {line[:40]}')
        yield row, where


def _checked(row: Mapping[str, Any], where: str, numbers: bool) -> Question:
    for name in ("question", "answer"):
        if name not in row:
            raise UserError(f'{where}: no "{name}" among its keys ({", ".join(row) or "none"})')
    question, answer, gold = row["question"], row["answer"], row.get("gold")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f'{where}: "question" must be a text that is not empty, got {question!r}')
    if numbers and right_number(answer) is None:
        raise UserError(
            f"{where}: the answer {answer!r} cannot be read as a number; write it as 18, -3.5 or 3/4, or mark it in a "
            "solution with 'answer:', \\boxed{} or ####, or score with a --reward of your own"
        )
    if gold is not None and not isinstance(gold, str):
        raise UserError(f'{where}: "gold" must be a text or null, got {gold!r}')
    for name in ("prompt", "completions", "completion_ids"):
        if name in row:
            raise UserError(f'{where}: rename the column "{name}", TRL uses that name')
    return {**row, "answer": str(answer)}
