"""Columns of the data that a setting names: whether they are there, and what is in their rows."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from gcpo_t2i.errors import UserError


def check_column(setting: str, column: str, known: Collection[str], data: str) -> None:
    """UserError for a column that is not one of the `known`, those of `data`."""
    if column not in known:
        raise UserError(
            f"{setting} '{column}' is no column of {data}, which has {', '.join(known)}; name one of these, or add it"
        )


def cells(setting: str, column: str, data: Any, name: str) -> list[tuple[str, Any]]:
    """Place and content of each row of a column of the data set called `name`; none of a stream, whose rows come only once.

    UserError if it is known which columns there are, and this is none of them.
    """
    known = getattr(data, "column_names", None)
    if not known:
        return []
    check_column(setting, column, known, name)
    if not hasattr(data, "__len__"):
        return []
    return [(f"{name}[{row}]", cell) for row, cell in enumerate(data[column])]
