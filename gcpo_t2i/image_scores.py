"""The scores of every image of an evaluation, one JSON object per line: what means and intervals are made of.

    {"prompt": "a photo of a red circle", "tag": "colors", "sample": 0, "scores": {"geneval/strict": 1.0, "clip": 0.7}}

`tag` is null where prompts carry none, and a score where a reward does not apply. Same settings: same lines in same order,
so that two runs can be compared image by image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gcpo_t2i.errors import UserError
from gcpo_t2i.evaluate import Evaluation
from gcpo_t2i.files import write_text


def scores_path(run: Path, step: int) -> Path:
    return run / "eval" / f"step-{step:06d}.jsonl"


def write_scores(path: Path, evaluation: Evaluation) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines, seen = [], dict.fromkeys((prompt.text for prompt in evaluation.prompts), 0)
    for i, prompt in enumerate(evaluation.prompts):
        scores = {label: values[i] for label, values in evaluation.scores.items()}
        tag, sample = prompt.columns.get("tag"), seen[prompt.text]
        lines.append(json.dumps({"prompt": prompt.text, "tag": tag, "sample": sample, "scores": scores}) + "\n")
        seen[prompt.text] += 1
    write_text(path, "".join(lines))


def read_scores(path: Path) -> list[dict[str, Any]]:
    """One row per image. UserError if the file is not there or damaged."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the scores of an evaluation cannot be read ({error}); run it again") from error
