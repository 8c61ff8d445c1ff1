"""GenEval's specification of a prompt, from the columns of a data set, and what is wrong with it."""

from __future__ import annotations

from typing import Any

from rewards.boxes import RELATIONS
from rewards.errors import RewardError, did_you_mean
from rewards.rules import Metadata


def metadata_of(tag: str | None, include: Any, exclude: Any) -> Metadata | None:
    """One sample's specification from its columns, None if it has none. Tables fill absent keys with None: dropped.

    RewardError for what is no list of clauses, and for a clause that could only score zero or cannot be judged.
    """
    if include is None and exclude is None:
        return None
    return {"tag": tag, "include": _clauses("include", include), "exclude": _clauses("exclude", exclude)}


def _clauses(column: str, value: Any) -> list[Metadata]:
    given = [] if value is None else value
    if not isinstance(given, (list, tuple)) or not all(isinstance(clause, dict) for clause in given):
        raise RewardError(f'{column} must be a list such as [{{"class": "dog", "count": 1}}], not {value!r}')
    clauses: list[Metadata] = [{key: entry for key, entry in clause.items() if entry is not None} for clause in given]
    for index, clause in enumerate(clauses):
        _check(clause, before=index if column == "include" else 0)
    return clauses


def _check(clause: Metadata, before: int) -> None:
    """`before`: clauses that a position may refer to."""
    for key, kind, wanted in (("class", str, "a text"), ("count", int, "a whole number")):
        if key not in clause:
            raise RewardError(f"GenEval clause {dict(clause)} has no {key!r}")
        if not isinstance(clause[key], kind) or isinstance(clause[key], bool):
            raise RewardError(f"GenEval clause {dict(clause)}: {key!r} must be {wanted}, not {clause[key]!r}")
    if clause["count"] < 0:
        raise RewardError(f"GenEval clause {dict(clause)}: 'count' must be >= 0, not {clause['count']}")
    if "position" not in clause:
        return
    position = clause["position"]
    if not isinstance(position, (list, tuple)) or [type(part) for part in position] != [str, int]:
        raise RewardError(
            f"GenEval clause {dict(clause)}: 'position' must be a relation and the number of an earlier clause, such as "
            f'["left of", 0], not {position!r}'
        )
    relation, target = position
    if relation not in RELATIONS:
        raise RewardError(f"relation {relation!r} is unknown{did_you_mean(relation, RELATIONS)}")
    if not -before <= target < before:
        raise RewardError(f"position of {clause['class']!r} refers to clause {target}, which does not come before it")
