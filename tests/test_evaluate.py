"""Evaluation metrics by hand."""

from __future__ import annotations

import math

import pytest

from gcpo_t2i.config import EvalConfig
from gcpo_t2i.data import Prompt, load_prompts
from gcpo_t2i.evaluate import Evaluation, eval_prompts


def prompts(*tags: str | None) -> list[Prompt]:
    return [Prompt("x", columns={} if tag is None else {"tag": tag}) for tag in tags]


def test_the_overall_score_is_the_mean_over_tags_not_over_images() -> None:
    own = prompts("colors", "colors", "colors", "colors", "position", "position")
    metrics = Evaluation(own, {"geneval/strict": [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]}, []).metrics()
    assert metrics["eval/geneval/strict/colors"] == 0.75
    assert metrics["eval/geneval/strict/position"] == 0.5
    assert metrics["eval/geneval/strict"] == (0.75 + 0.5) / 2
    # colors: squares (3 · 0.25² + 0.75²) / 3 = 0.25, of the mean 0.25 / 4; position: 0.5 / 1, of the mean 0.5 / 2
    assert metrics["eval/geneval/strict/colors_ci95"] == pytest.approx(1.959964 * 0.25, rel=1e-6)
    assert metrics["eval/geneval/strict_ci95"] == pytest.approx(1.959964 * math.sqrt(0.0625 + 0.25) / 2, rel=1e-6)


def test_without_tags_there_is_one_mean() -> None:
    metrics = Evaluation(prompts(None, None), {"bright": [0.2, 0.4]}, []).metrics()
    assert metrics.keys() == {"eval/bright", "eval/bright_ci95"}
    assert metrics["eval/bright"] == pytest.approx(0.3)


def test_scores_that_do_not_apply_are_left_out() -> None:
    metrics = Evaluation(prompts(None, None, None), {"a": [None, 0.5, 0.7], "b": [None] * 3}, []).metrics()
    assert metrics["eval/a"] == pytest.approx(0.6)
    assert "eval/b" not in metrics


def test_eval_prompts_are_balanced_fixed_and_held_out() -> None:
    config = EvalConfig(num_prompts=12, samples_per_prompt=2)
    chosen = eval_prompts(load_prompts("shapesworld:heldout"), config)
    assert len(chosen) == 24 and chosen[0] == chosen[1]
    tags = [prompt.columns["tag"] for prompt in chosen]
    assert {tags.count(tag) for tag in set(tags)} == {4} and len(set(tags)) == 6
    assert chosen == eval_prompts(load_prompts("shapesworld:heldout"), config)
    trained = {prompt.text for prompt in load_prompts("shapesworld:train")}
    assert not trained & {prompt.text for prompt in chosen}
