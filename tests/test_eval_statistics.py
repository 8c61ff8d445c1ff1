"""Means over tags and the bootstrap over prompts, by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from gcpo_t2i.evals import statistics
from gcpo_t2i.evals.compare import compare
from gcpo_t2i.evals.results import Results, by_tag, prompt_means
from gcpo_t2i.evals.statistics import Estimate, estimate, resampled_means
from gcpo_t2i.evals.tables import change_table


def row(index: int, tag: str | None, sample: int, value: float | None, text: str = "x") -> dict:
    return {"prompt_index": index, "prompt": text, "tag": tag, "sample": sample, "s": value}


def test_the_overall_score_is_the_mean_over_tags() -> None:
    found = estimate({"colors": [1.0, 0.5, 0.0, 0.5], "position": [1.0, 0.5]})
    assert (found.tags["colors"].mean, found.tags["position"].mean) == (0.5, 0.75)
    assert found.overall.mean == 0.625  # the mean over the six prompts would be 0.583
    assert (found.overall.prompts, found.tags["colors"].prompts) == (6, 4)


def test_images_make_the_mean_of_their_prompt_and_equal_prompts_count_each() -> None:
    rows = [row(0, "a", 0, 1.0), row(0, "a", 1, 0.0), row(1, "a", 0, 1.0), row(1, "a", 1, None), row(2, "b", 0, None)]
    assert by_tag(prompt_means(rows, "s")) == {"a": [0.5, 1.0]}


def test_scores_that_are_all_alike_have_an_interval_without_width() -> None:
    assert estimate({"a": [0.25] * 3, "b": [0.75] * 2}).overall == Estimate(0.5, 0.5, 0.5, 5)


def test_one_prompt_says_nothing_about_others() -> None:
    found = estimate({"a": [1.0], "b": [0.0, 1.0]})
    assert found.tags["a"] == Estimate(1.0, None, None, 1)
    assert (found.overall.low, found.overall.high) == (None, None)
    assert (found.tags["b"].low, found.tags["b"].high) == (0.0, 1.0)  # one of two is drawn


def test_prompts_without_tags_are_one_group() -> None:
    found = estimate(by_tag(prompt_means([row(0, None, 0, 0.0), row(1, None, 0, 1.0)], "s")))
    assert found.tags == {} and found.overall == Estimate(0.5, 0.0, 1.0, 2)
    assert by_tag(prompt_means([row(0, None, 0, 0.0), row(1, "a", 0, 1.0)], "s")) == {"(none)": [0.0], "a": [1.0]}


def test_quantiles_of_a_distribution_that_is_known() -> None:
    # Two of (0, 0, 1): mean 0 with 4/9, 1/2 with 4/9, 1 with 1/9, so both quantiles are at the ends.
    draws = resampled_means(np.array([0.0, 0.0, 1.0]), np.random.default_rng(0))
    shares = [float((draws == value).mean()) for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([4 / 9, 4 / 9, 1 / 9], abs=4 * 0.005)  # 4 standard errors of 10,000 draws
    assert (estimate({"a": [0.0, 0.0, 1.0]}).overall.low, estimate({"a": [0.0, 0.0, 1.0]}).overall.high) == (0.0, 1.0)


@pytest.mark.parametrize("n", [2, 3, 40])
def test_the_spread_of_the_draws_is_the_standard_error_of_the_mean(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    draws = resampled_means(values, np.random.default_rng(0))
    assert draws.std() == pytest.approx(values.std(ddof=1) / np.sqrt(n), rel=0.03)
    assert draws.mean() == pytest.approx(values.mean(), abs=4 * draws.std() / 100)


def test_strata_are_drawn_apart() -> None:
    # If prompts moved between tags, the overall mean of these two would vary.
    found = estimate({"a": [0.0] * 5, "b": [1.0] * 5})
    assert found.overall == Estimate(0.5, 0.5, 0.5, 10)


def test_intervals_are_reproducible_and_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": list(np.random.default_rng(1).random(20))}
    first = estimate(values)
    assert estimate(values) == first
    monkeypatch.setattr(statistics, "CHUNK", 700)
    assert estimate(values) == first


# --- pairs --------------------------------------------------------------------


def results(*values: tuple[float | None, ...], tags: Sequence[str | None] = "aab") -> Results:
    """A prompt for each tuple, an image for each value."""
    rows = [row(i, tags[i], j, value) for i, own in enumerate(values) for j, value in enumerate(own)]
    return Results(None, {"evaluator": {"rewards": {"s": {}}}}, rows)  # type: ignore[arg-type]


def test_a_comparison_by_hand() -> None:
    ours, theirs = results((1, 1), (0, 1), (0, 0)), results((0, 1), (1, 0), (1, 0))
    change = compare(ours, theirs)["s"]
    # Prompt by prompt: +1/2, 0, −1/2. Tag a: 1/4, tag b: −1/2, overall their mean.
    assert (change.difference.tags["a"].mean, change.difference.tags["b"].mean) == (0.25, -0.5)
    assert change.difference.overall.mean == -0.125
    assert (change.ours.overall.mean, change.theirs.overall.mean) == (0.75 / 2 + 0, 0.5 / 2 + 0.5 / 2)
    assert (change.difference.tags["a"].low, change.difference.tags["a"].high) == (0.0, 0.5)
    assert change.better == {"a": 0.5, "b": 0.0, None: pytest.approx(1 / 3)}
    assert change.worse == {"a": 0.0, "b": 1.0, None: pytest.approx(1 / 3)}


def test_pairing_makes_a_steady_gain_certain() -> None:
    base = np.random.default_rng(0).random(30)
    ours, theirs = (results(*((value,) for value in base + gain), tags="a" * 30) for gain in (0.0625, 0.0))
    change = compare(ours, theirs)["s"]
    low, high = change.difference.overall.low, change.difference.overall.high
    assert (low, high) == (pytest.approx(0.0625), pytest.approx(0.0625))
    assert (
        change.ours.overall.low is not None and change.ours.overall.low < change.theirs.overall.mean
    )  # unpaired: open


def test_the_order_of_rows_does_not_matter() -> None:
    ours, theirs = results((1, 0), (0, 1), (1, 1)), results((0, 0), (0, 1), (1, 0))
    shuffled = Results(theirs.folder, theirs.recipe, theirs.rows[::-1])
    assert compare(ours, shuffled) == compare(ours, theirs)


def test_a_score_that_is_missing_on_one_side_counts_on_neither() -> None:
    change = compare(results((1, None), (0,)), results((0, 1), (0,)))["s"]
    assert (change.ours.overall.mean, change.theirs.overall.mean) == (0.5, 0.0)


def test_prompts_with_and_without_tags_can_be_compared() -> None:
    ours, theirs = (results((value,), (1,), tags=(None, "a")) for value in (1, 0))
    change = compare(ours, theirs)["s"]
    assert change.difference.overall.mean == 0.5
    assert change.better == {"(none)": 1.0, "a": 0.0, None: 0.5}
    assert len(change_table({"s": change}).rows) == 3
