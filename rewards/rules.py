"""The rules of GenEval: pure functions on boxes that give the verdict of the official evaluator
(github.com/djghosh13/geneval, `evaluation/evaluate_images.py`) on any input.

What they do, and one might not expect:

- Only the `count` most confident objects of a class are looked at: their colours and places decide, and further objects
  of the class never hurt, unless an `exclude` clause counts them.
- A clause is judged in order: number, colour, place. The first miss ends it, and its objects are then no target for
  the `position` of a later clause, which fails in turn.
- A position holds only if it holds for every pair of object and target. It is the direction between the box centres,
  shortened per axis by 0.1 of the summed box sizes, and an axis counts from half the distance on (60° to each side).
- Confidence must exceed 0.3, or 0.9 when counting; at most 16 boxes per class; overlaps are not suppressed by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.boxes import Box, relative_position
from rewards.errors import RewardError

Metadata = Mapping[str, Any]
Colors = Callable[[str, Sequence[Box]], list[str]]


def _position_miss(name: str, relation: str, found: Sequence[Box], targets: Sequence[Box] | None) -> str:
    if targets is None:
        return f"{name} should be {relation} an object that does not meet its own clause"
    for box in found:
        for target in targets:
            actual = relative_position(box, target)
            if relation not in actual:
                return f"{name} should be {relation} its target, is {' and '.join(sorted(actual)) or 'too close'}"
    return ""


def _include_miss(
    clause: Metadata,
    found: Sequence[Box],
    groups: Sequence[Sequence[Box] | None],
    colors: Colors,
) -> str:
    """Why the clause is not met, "" if it is. `found`: at most `count` boxes; `groups`: those of earlier clauses."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected at least {count} {name}, found {len(found)}"
    if "color" in clause:
        seen = list(colors(name, found))
        if seen.count(clause["color"]) < count:
            return f"expected at least {count} {clause['color']} {name}, found {', '.join(seen) or 'none'}"
    if "position" in clause:
        relation, target = clause["position"]
        if not -len(groups) <= target < len(groups):
            raise RewardError(f"position of {name!r} refers to clause {target}, which does not come before it")
        return _position_miss(name, relation, found, groups[target])
    return ""


def misses(objects: Mapping[str, Sequence[Box]], metadata: Metadata, colors: Colors) -> list[str]:
    """One entry per clause, `include` before `exclude`: why it is not met, "" if it is. Arguments as for `evaluate`."""
    reasons: list[str] = []
    groups: list[Sequence[Box] | None] = []
    for clause in metadata.get("include") or ():
        found = objects.get(clause["class"], ())[: clause["count"]]
        reasons.append(_include_miss(clause, found, groups, colors))
        groups.append(None if reasons[-1] else found)
    for clause in metadata.get("exclude") or ():
        number = len(objects.get(clause["class"], ()))
        reasons.append(
            f"expected fewer than {clause['count']} {clause['class']}, found {number}"
            if number >= clause["count"]
            else ""
        )
    return reasons


def evaluate(objects: Mapping[str, Sequence[Box]], metadata: Metadata, colors: Colors) -> tuple[bool, str]:
    """The official verdict, and what is wrong, one line per clause that is not met.

    objects: class name → boxes (x0, y0, x1, y1, confidence), sorted by falling confidence, already thresholded.
    metadata: `include` clauses {class, count, color?, position? = [relation, index of an earlier clause]}, all of which
        must hold, and `exclude` clauses {class, count}, none of which may be reached.
    colors: names the colours of these boxes of that class; asked only where the number is right and a colour is named.

    Raises RewardError if a position refers to a clause that does not come before it (the official code has no verdict
    there either).
    """
    reasons = [reason for reason in misses(objects, metadata, colors) if reason]
    return not reasons, "\n".join(reasons)
