"""Scores and comparisons for people at a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from gcpo_t2i.evals.compare import Change
from gcpo_t2i.evals.recipe import Recipe, is_external
from gcpo_t2i.evals.statistics import Estimate, Estimates


def described(recipe: Recipe) -> str:
    """What was evaluated and how, in one line."""
    of = f"images in {recipe['policy']['images']}" if is_external(recipe) else recipe["policy"]["model"]
    how = (
        ""
        if is_external(recipe)
        else f", guidance {recipe['sampling']['guidance']:g}, seed {recipe['sampling']['seed']}"
    )
    return f"{of}: {recipe['prompts']['number']} prompts × {recipe['samples_per_prompt']} images{how}"


def score_table(scores: Mapping[str, Estimates]) -> Table:
    """A section per score: first the mean over tags, then each tag."""
    table = _table(("score", "mean", "95 % interval", "prompts"))
    for label, own in scores.items():
        for name, one in _lines(label, own):
            table.add_row(name, f"{one.mean:.3f}", _interval(one, ".3f"), str(one.prompts))
        table.add_section()
    return table


def change_table(changes: Mapping[str, Change]) -> Table:
    """As `score_table`, both evaluations side by side with the paired difference and the shares of prompts."""
    table = _table(("score", "other", "this", "change", "95 % interval", "better", "worse"))
    for label, change in changes.items():
        lines = zip(
            (None, *change.difference.tags),
            *(_lines(label, own) for own in (change.theirs, change.ours, change.difference)),
            strict=True,
        )
        for tag, (name, theirs), (_, ours), (_, difference) in lines:
            means = f"{theirs.mean:.3f}", f"{ours.mean:.3f}", f"{difference.mean:+.3f}"
            shares = f"{change.better[tag]:.0%}", f"{change.worse[tag]:.0%}"
            table.add_row(name, *means, _interval(difference, "+.3f"), *shares)
        table.add_section()
    return table


def _table(columns: tuple[str, ...]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column == "score" else "right")
    return table


def _lines(label: str, own: Estimates) -> list[tuple[str, Estimate]]:
    return [(f"[bold]{label}", own.overall), *((f"  {tag}", one) for tag, one in own.tags.items())]


def _interval(one: Estimate, style: str) -> str:
    return "–" if one.low is None or one.high is None else f"{one.low:{style}} to {one.high:{style}}"
