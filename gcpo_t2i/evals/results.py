"""`results.jsonl`: one line per image, with the keys of GenEval's evaluator and the scores of all rewards; and back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcpo_t2i.errors import UserError
from gcpo_t2i.evals.layout import Sample, canonical
from gcpo_t2i.evals.recipe import Recipe, prompts_hash, read_recipe
from gcpo_t2i.evals.statistics import UNTAGGED, Estimates, estimate
from gcpo_t2i.files import whole_file
from gcpo_t2i.scoring import Scores
from gcpo_t2i.seeds import image_seed

RESULTS, SCORES = "results.jsonl", "scores.json"
GENEVAL_KEYS = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")
KEYS = (*GENEVAL_KEYS, "prompt_index", "sample", "seed")

Row = dict[str, Any]
Means = dict[tuple[int, str], tuple[str, float]]  # number and text of a prompt → its tag and mean


@dataclass(frozen=True)
class Results:
    """A finished evaluation: its recipe, and a row for each image."""

    folder: Path
    recipe: Recipe
    rows: list[Row]

    def labels(self) -> list[str]:
        """The scores that apply to at least one image."""
        return [
            label for label in self.recipe["evaluator"]["rewards"] if any(row[label] is not None for row in self.rows)
        ]

    def estimates(self) -> dict[str, Estimates]:
        """Label → mean over tags and of each tag, with intervals."""
        return {label: estimate(by_tag(prompt_means(self.rows, label))) for label in self.labels()}


def make_rows(
    root: Path, samples: Sequence[Sample], scores: Scores, verdicts: Sequence[Any], recipe: Recipe
) -> list[Row]:
    """One row per image. `verdicts` are GenEval's, None where it does not apply: then `correct` is null, too."""
    if taken := sorted(set(scores) & set(KEYS)):
        raise UserError(f"reward '{taken[0]}': its scores would have the name of another key of {RESULTS}; rename it")
    rows = []
    for i, (sample, verdict) in enumerate(zip(samples, verdicts, strict=True)):
        rows.append(
            {
                "filename": sample.path.relative_to(root).as_posix(),
                "tag": sample.prompt.columns.get("tag"),
                "prompt": sample.prompt.text,
                "correct": None if verdict is None else verdict.correct,
                "reason": None if verdict is None else verdict.reason,
                "metadata": canonical(sample.prompt),
                "details": None if verdict is None else json.dumps(_boxes(verdict)),
                "prompt_index": sample.prompt_index,
                "sample": sample.sample,
                "seed": seed_of(recipe, sample.prompt_index, sample.sample),
                **{label: values[i] for label, values in scores.items()},
            }
        )
    return rows


def _boxes(verdict: Any) -> dict[str, list[list[float]]]:
    """Class → boxes that counted, [x0, y0, x1, y1, confidence], as GenEval writes them."""
    return {name: [[*found.box, found.confidence] for found in own] for name, own in verdict.objects.items()}


def seed_of(recipe: Recipe, prompt_index: int, sample: int) -> int | None:
    """Of the image at this place; None if others made the images."""
    sampling = recipe["sampling"]
    return None if sampling is None else image_seed(sampling["seed"], prompt_index, sample)


def prompt_means(rows: Iterable[Row], label: str) -> Means:
    """The mean of each prompt over its images to which the score applies; prompts without such an image are left out.

    The number tells prompts with the same text apart: each line of a prompt file counts.
    """
    values: dict[tuple[int, str], tuple[str, list[float]]] = {}
    for row in rows:
        if row[label] is not None:
            values.setdefault((row["prompt_index"], row["prompt"]), (row["tag"] or UNTAGGED, []))[1].append(row[label])
    return {prompt: (tag, sum(own) / len(own)) for prompt, (tag, own) in values.items()}


def by_tag(means: Means) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for tag, mean in means.values():
        groups.setdefault(tag, []).append(mean)
    return groups


def write_results(results: Results) -> None:
    """`results.jsonl` and `scores.json` into its folder, each whole or not at all."""
    with whole_file(results.folder / RESULTS) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in results.rows), encoding="utf-8")
    with whole_file(results.folder / SCORES) as partial:
        scores = {label: own.as_json() for label, own in results.estimates().items()}
        partial.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def read_results(folder: str | Path) -> Results:
    """A finished evaluation. UserError names what is missing, the number of a damaged line, or what does not fit the recipe
    beside it."""
    folder = Path(folder)
    recipe, path = read_recipe(folder), folder / RESULTS
    if not path.is_file():
        raise UserError(
            f"{folder}: this evaluation was interrupted, it has no {RESULTS}; add --resume to the command for it"
        )
    labels = list(recipe["evaluator"]["rewards"])
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    rows = [_row(line, f"{path}, line {number}", labels) for number, line in enumerate(lines, start=1)]
    _check_belongs(rows, recipe, path)
    return Results(folder, recipe, rows)


def _row(line: str, where: str, labels: Sequence[str]) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: damaged, not JSON ({error}); score the images again with --resume") from error
    for key in (*KEYS, *labels):
        if not isinstance(row, dict) or key not in row:
            raise UserError(f"{where}: no '{key}'; this line was not written with the recipe beside it")
    for key in ("prompt", "metadata"):
        if not isinstance(row[key], str):
            raise UserError(f"{where}: '{key}' must be a text, not {row[key]!r}")
    for key in ("prompt_index", "sample"):
        if not isinstance(row[key], int) or row[key] < 0:
            raise UserError(f"{where}: '{key}' must be a whole number from 0 on, not {row[key]!r}")
    for label in labels:
        if row[label] is not None and not (isinstance(row[label], (int, float)) and math.isfinite(row[label])):
            raise UserError(f"{where}: '{label}' must be a number or null, not {row[label]!r}")
    return row


def _check_belongs(rows: Sequence[Row], recipe: Recipe, path: Path) -> None:
    """UserError unless the rows are of the recipe's prompts, number of samples and seeds."""
    expected = recipe["prompts"]["number"] * recipe["samples_per_prompt"]
    problem = f"{len(rows)} lines, expected {expected}" if len(rows) != expected else ""
    specs = {row["prompt_index"]: row["metadata"] for row in rows}
    if not problem and prompts_hash([specs[index] for index in sorted(specs)]) != recipe["prompts"]["sha256"]:
        problem = "other prompts"
    for number, row in enumerate(rows, start=1):
        if not problem and row["seed"] != seed_of(recipe, row["prompt_index"], row["sample"]):
            problem = f"line {number} has another seed"
    if problem:
        raise UserError(f"{path} and the recipe.json beside it are of two evaluations ({problem}); evaluate again")
