"""The figure of a comparison: training reward, held-out score, effects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gcpo_t2i.compare.bootstrap import Estimate
from gcpo_t2i.compare.results import Outcome, Row

BANDS = 5  # of more rows they would hide the curves


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over the last axis, centred; at the ends over what there is of the window."""
    ones = np.ones(window)
    count = np.convolve(np.ones(values.shape[-1]), ones, "same")
    return np.apply_along_axis(lambda row: np.convolve(row, ones, "same"), -1, values) / count


def band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of curves (S, N) over the seeds and half-width of its 95 % interval (Student's t; 0 with one seed)."""
    from scipy.stats import t

    seeds = len(curves)
    if seeds == 1:
        return curves[0], np.zeros(curves.shape[1])
    return curves.mean(0), t.ppf(0.975, seeds - 1) * curves.std(0, ddof=1) / np.sqrt(seeds)


def draw(path: Path, label: str, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> None:
    """Writes a PNG: rewards over steps, `label` at the end, and its difference to the baselines."""
    from matplotlib.figure import Figure  # here, because it takes a moment to import

    baselines = list(rows[0].against)
    figure = Figure(figsize=(5.4 + 3.6 * (1 + bool(baselines)), 2.4 + 0.34 * len(rows)), layout="constrained")
    panels: Any = figure.subplots(1, 2 + bool(baselines), width_ratios=[1.4, 1, 1][: 2 + bool(baselines)])
    colors = {row.algorithm: f"C{i}" for i, row in enumerate(rows)}
    _curves(panels[0], rows, outcomes, colors)
    _scores(panels[1], label, rows, colors)
    if baselines:
        _effects(panels[2], baselines, rows, colors)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=150)
    partial.replace(path)


def _curves(axes: Any, rows: Sequence[Row], outcomes: Sequence[Outcome], colors: dict[str, str]) -> None:
    window = 1
    for row in rows:
        curves = np.array([one.rewards for one in outcomes if one.algorithm == row.algorithm])
        window = max(1, curves.shape[1] // 10)
        mean, half = band(smooth(curves, window))
        steps = np.arange(1, len(mean) + 1)
        axes.plot(steps, mean, color=colors[row.algorithm], label=row.algorithm)
        if len(rows) <= BANDS:
            axes.fill_between(steps, mean - half, mean + half, color=colors[row.algorithm], alpha=0.15, linewidth=0)
    axes.set_title("training reward", loc="left")
    axes.set_xlabel(f"step (running mean over {window}{'; band: 95 % over seeds' if len(rows) <= BANDS else ''})")
    axes.legend(frameon=False, fontsize="small")


def _scores(axes: Any, label: str, rows: Sequence[Row], colors: dict[str, str]) -> None:
    for i, row in enumerate(rows):
        axes.plot(row.each, [i] * len(row.each), "|", color=colors[row.algorithm], alpha=0.6, markersize=9)
        _bar(axes, row.after, i, "o", colors[row.algorithm])
    axes.axvline(rows[0].before.mean, color="0.5", linestyle="--", linewidth=1, label="before training")
    axes.set_title(f"held-out {label}", loc="left")
    axes.set_xlabel("95 % over seeds and prompts; | one seed")
    _names(axes, rows)


def _effects(axes: Any, baselines: Sequence[str], rows: Sequence[Row], colors: dict[str, str]) -> None:
    for j, (name, marker) in enumerate(zip(baselines, "sD", strict=False)):
        offset = (j - (len(baselines) - 1) / 2) * 0.28
        axes.plot([], [], marker, color="0.3", label=f"against {name}")
        for i, row in enumerate(rows):
            if (effect := row.against[name]) is not None:
                _bar(axes, effect, i + offset, marker, colors[row.algorithm])
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_title("difference, paired", loc="left")
    axes.set_xlabel("95 % over seeds and prompts")
    _names(axes, rows)


def _bar(axes: Any, estimate: Estimate, height: float, marker: str, color: str) -> None:
    axes.hlines(height, estimate.low, estimate.high, color=color)
    axes.plot([estimate.mean], [height], marker, color=color, markersize=5)


def _names(axes: Any, rows: Sequence[Row]) -> None:
    """An algorithm per line, and the legend."""
    axes.set_yticks(range(len(rows)), [row.algorithm for row in rows])
    axes.set_ylim(len(rows) - 0.4, -1.2)  # the first one on top, and over it the legend
    axes.locator_params(axis="x", nbins=5)
    axes.legend(frameon=False, fontsize="small", loc="upper right")
