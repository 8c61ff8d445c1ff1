"""Two evaluations with the same recipe, paired: what changed on the same prompts with the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gcpo_t2i.errors import UserError
from gcpo_t2i.evals.results import Results, Row, by_tag, prompt_means
from gcpo_t2i.evals.statistics import Estimates, estimate


@dataclass(frozen=True)
class Change:
    """One score of two evaluations: both, the paired difference ours − theirs, and shares of prompts by tag and overall."""

    ours: Estimates
    theirs: Estimates
    difference: Estimates
    better: dict[str | None, float]  # share of prompts whose mean over their images rose; the key None is all prompts
    worse: dict[str | None, float]

    def as_json(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).as_json() for name in ("ours", "theirs", "difference")}
        shares = {
            name: {key or "overall": own for key, own in getattr(self, name).items()} for name in ("better", "worse")
        }
        return {**parts, **shares}


def compare(ours: Results, theirs: Results) -> dict[str, Change]:
    """Label → what changed. Images to which a score applies in only one of the two are left out of both.

    UserError if an image of one has no counterpart, with the same prompt and number, in the other.
    """
    pairs = _paired(ours, theirs)
    changes = {}
    for label in ours.labels():
        both = [pair for pair in pairs if None not in (pair[0][label], pair[1][label])]
        if both:
            changes[label] = _change(both, label)
    return changes


def _paired(ours: Results, theirs: Results) -> list[tuple[Row, Row]]:
    def place(row: Row) -> tuple[int, str, int]:
        return row["prompt_index"], row["prompt"], row["sample"]

    here, there = ({place(row): row for row in results.rows} for results in (ours, theirs))
    for key in here.keys() ^ there.keys():
        lacking = theirs if key in here else ours
        raise UserError(
            f"{lacking.folder} has no image {key[2]} of prompt {key[0]}, '{key[1]}'; nothing to pair it with"
        )
    return [(row, there[key]) for key, row in here.items()]


def _change(pairs: Sequence[tuple[Row, Row]], label: str) -> Change:
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    apart = [{**mine, label: mine[label] - other[label]} for mine, other in pairs]
    means = prompt_means(apart, label)
    groups: dict[str | None, list[float]] = {**by_tag(means), None: [mean for _, mean in means.values()]}
    return Change(
        *(estimate(by_tag(prompt_means(rows, label))) for rows in (ours, theirs, apart)),
        better={tag: sum(mean > 0 for mean in own) / len(own) for tag, own in groups.items()},
        worse={tag: sum(mean < 0 for mean in own) / len(own) for tag, own in groups.items()},
    )
