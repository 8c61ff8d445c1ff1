"""What the runs of a comparison say: scores with intervals, effects, and the tables that show them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gcpo_t2i.compare.bootstrap import Estimate, bootstrap
from gcpo_t2i.compare.processes import Run
from gcpo_t2i.errors import UserError
from gcpo_t2i.image_scores import read_scores, scores_path

BASELINES = ("grpo", "random_credit")  # what every algorithm is held against, if they are among those compared

Key = tuple[str, str]  # tag and text of a prompt


@dataclass(frozen=True)
class Outcome:
    """One finished run. Scores: label → prompt → mean over its images, NaN where the score does not apply."""

    algorithm: str
    seed: int
    before: dict[str, dict[Key, float]]
    after: dict[str, dict[Key, float]]
    rewards: list[float]  # of every training step
    images: int  # or answers, sampled in training, with groups that were replaced
    minutes: float  # of training steps


@dataclass(frozen=True)
class Row:
    """One algorithm and one score. `against`: baseline → difference in `after`, over the seeds that both finished."""

    algorithm: str
    seeds: list[int]
    before: Estimate
    after: Estimate
    change: Estimate
    each: list[float]  # after, seed by seed
    against: dict[str, Estimate | None]
    images: float
    minutes: float


def read_outcome(run: Run, steps: int) -> Outcome:
    """UserError if a file of the run is missing or damaged."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [line for line in lines if "reward" in line]
    return Outcome(
        run.algorithm,
        run.seed,
        before=prompt_means(scores_path(run.folder, 0)),
        after=prompt_means(scores_path(run.folder, steps)),
        rewards=[row["reward"] for row in rows],
        images=sum(round(_speed(row) * row["step_time"]) for row in rows),
        minutes=sum(row["step_time"] for row in rows) / 60,
    )


def _speed(row: Mapping[str, Any]) -> float:
    """Images or answers per second of a training step."""
    return row["images_per_second"] if "images_per_second" in row else row["answers_per_second"]


def prompt_means(path: Path) -> dict[str, dict[Key, float]]:
    """Score → prompt → mean over its images."""
    found: dict[str, dict[Key, list[float]]] = {}
    for row in read_scores(path):
        for label, value in row["scores"].items():
            values = found.setdefault(label, {}).setdefault((str(row["tag"]), row["prompt"]), [])
            values.append(float("nan") if value is None else value)
    return {
        label: {prompt: sum(values) / len(values) for prompt, values in own.items()} for label, own in found.items()
    }


def compare_outcomes(outcomes: Sequence[Outcome], algorithms: Sequence[str]) -> dict[str, list[Row]]:
    """Score → a row for each of the algorithms that have an outcome, in their order.

    Prompts to which a score does not apply in some run are left out of it. UserError if runs saw different prompts.
    """
    first = outcomes[0]
    for one in outcomes:
        for label, means in first.after.items():
            if one.before[label].keys() != means.keys() or one.after[label].keys() != means.keys():
                raise UserError(
                    f"{one.algorithm} with seed {one.seed} was evaluated on other prompts than {first.algorithm} with seed "
                    f"{first.seed}: the file of prompts has changed; start again in another --output_dir"
                )
    return {label: _rows(label, outcomes, algorithms) for label in first.after}


def _rows(label: str, outcomes: Sequence[Outcome], algorithms: Sequence[str]) -> list[Row]:
    prompts = [
        prompt
        for prompt in outcomes[0].after[label]
        if not any(np.isnan(scores[label][prompt]) for one in outcomes for scores in (one.before, one.after))
    ]
    if not prompts:
        return []
    tags = [tag for tag, _ in prompts]
    runs = {name: {one.seed: one for one in outcomes if one.algorithm == name} for name in algorithms}

    def after(one: Outcome) -> np.ndarray:
        return np.array([one.after[label][prompt] for prompt in prompts])

    def before(one: Outcome) -> np.ndarray:
        return np.array([one.before[label][prompt] for prompt in prompts])

    def estimate(values: Sequence[np.ndarray]) -> Estimate:
        return bootstrap(np.stack(values), tags)

    def effect(own: Mapping[int, Outcome], other: Mapping[int, Outcome]) -> Estimate | None:
        both = [seed for seed in own if seed in other]
        return estimate([after(own[seed]) - after(other[seed]) for seed in both]) if both else None

    return [
        Row(
            name,
            list(own),
            before=estimate([before(one) for one in own.values()]),
            after=estimate([after(one) for one in own.values()]),
            change=estimate([after(one) - before(one) for one in own.values()]),
            each=[bootstrap(after(one)[None], tags, replicates=1).mean for one in own.values()],
            against={
                other: None if other == name else effect(own, runs[other]) for other in BASELINES if other in runs
            },
            images=statistics.mean(one.images for one in own.values()),
            minutes=statistics.mean(one.minutes for one in own.values()),
        )
        for name, own in runs.items()
        if own
    ]


def cells(rows: Sequence[Row], samples: str = "images") -> list[list[str]]:
    """Header and lines of the table of one score, as texts. `samples`: what the runs are made of."""
    baselines = list(rows[0].against)
    header = ["algorithm", "seeds", "before", "after", "change", samples, "minutes"]
    lines = [
        [
            row.algorithm,
            str(len(row.seeds)),
            f"{row.before.mean:.3f}",
            f"{row.after.mean:.3f} {_interval(row.after)}",
            f"{row.change.mean:+.3f} {_interval(row.change, '+')}",
            f"{row.images:.0f}",
            f"{row.minutes:.1f}",
            *(_effect(row.against[name]) for name in baselines),
        ]
        for row in rows
    ]
    return [[*header, *(f"against {name}" for name in baselines)], *lines]


def _interval(estimate: Estimate, sign: str = "") -> str:
    return f"[{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def _effect(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.mean:+.3f} {_interval(estimate, '+')}"


def markdown(title: str, rows: Sequence[Row], samples: str = "images") -> str:
    header, *lines = cells(rows, samples)
    rule = ["---"] * len(header)
    table = [header, rule, *([f"`{line[0]}`", *line[1:]] for line in lines)]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in table)


def as_json(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Plain values for compare.json: score → algorithm → everything that its row holds."""
    return {label: {row.algorithm: asdict(row) for row in own} for label, own in rows.items()}
