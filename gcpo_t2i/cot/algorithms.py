"""A row of `algo.rows` in TRL's words, so that text and images go by the same names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gcpo_t2i.algo.edits import all_failed
from gcpo_t2i.algo.rows import ROWS, Algorithm, resolve
from gcpo_t2i.errors import UserError

LOSSES = {"sequence": "grpo", "token": "dapo"}  # averaging → TRL's loss_type


@dataclass(frozen=True)
class TextAlgorithm:
    """A row for texts: its credit rule, whether groups that failed get a reference, and TRL's settings of its loss."""

    name: str
    credit: str
    gold: bool
    trl: dict[str, Any]


def _is_for_texts(row: Algorithm) -> bool:
    return row.select is None and row.reweight is None and row.credit.name != "stage"


TEXT_ROWS = tuple(name for name, row in ROWS.items() if _is_for_texts(row))


def text_algorithm(name: str) -> TextAlgorithm:
    """The row called `name`. UserError for unknown names, and for rows that read the codes of images.

    A row that leaves out groups of equal rewards (dapo) samples no others in their place here: they have no advantage
    and so no gradient, and TRL has no second round.
    """
    try:
        row = resolve(name)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not _is_for_texts(row):
        raise UserError(f"algorithm '{name}' reads the codes of images; for texts there are {', '.join(TEXT_ROWS)}")
    return TextAlgorithm(
        row.name,
        row.credit.name,
        row.rescue is all_failed,
        {
            "loss_type": LOSSES[row.averaging],
            "importance_sampling_level": row.surrogate.name,
            "epsilon": row.clip_low,
            "epsilon_high": row.clip_high,
        },
    )
