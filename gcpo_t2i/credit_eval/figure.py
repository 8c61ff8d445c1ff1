"""The figure of a credit evaluation: deciding tokens, objects, and where both sit in the image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcpo_t2i.credit_eval.decisions import BEST, COMPARED, CURVE
from gcpo_t2i.credit_eval.rules import CONTROLS, REFERENCE, RULES
from gcpo_t2i.files import whole_file

STYLES = {BEST: ("0.0", "-"), "uniform": ("0.6", "-"), "random": ("0.6", "--")}


def draw(path: Path, found: Mapping[str, Any], grid: tuple[int, int]) -> None:
    """Writes a PNG with what there is of: shares of ΣΔV² over shares of tokens, AUROC for objects, mean maps."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    panels = []
    if "advantage" in found:
        panels.append((1.5, lambda axes: _curves(axes, found["advantage"]["curves"])))
    if "objects" in found:
        panels.append((1.2, lambda axes: _objects(axes, found["objects"])))
    if "advantage" in found:
        maps = found["advantage"]["maps"]
        titles = {REFERENCE: f"mean credit ({REFERENCE})", "ΔV²": "mean squared true advantage"}
        for name, title in titles.items():
            panels.append((1.0, lambda axes, name=name, title=title: _map(axes, maps[name], grid, title)))
    if not panels:
        return
    figure = Figure(figsize=(4.0 * sum(width for width, _ in panels), 4.0), layout="constrained")
    row: Any = figure.subplots(1, len(panels), width_ratios=[width for width, _ in panels], squeeze=False)[0]
    for axes, (_, panel) in zip(row, panels, strict=True):
        panel(axes)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _color(rule: str) -> tuple[Any, str]:
    return STYLES.get(rule, (f"C{RULES.index(rule) if rule in RULES else 9}", "--" if rule in CONTROLS else "-"))


def _curves(axes: Any, curves: Mapping[str, list[float]]) -> None:
    ordered = sorted(curves, key=lambda rule: -curves[rule][CURVE.index(COMPARED)])
    for rule in ordered:
        color, line = _color(rule)
        axes.plot(CURVE, curves[rule], line, color=color, label=rule, linewidth=2 if rule in (BEST, REFERENCE) else 1.2)
    axes.set_title("which tokens decided the reward", loc="left")
    axes.set_xlabel("share of the tokens, first by each rule")
    axes.set_ylabel("share of ΣΔV² that they hold")
    axes.set_xlim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="lower right")


def _objects(axes: Any, sources: Mapping[str, Any]) -> None:
    for offset, marker, (source, rules) in zip((-0.12, 0.12), "os", sources.items(), strict=True):
        for i, rule in enumerate(RULES):
            one = rules[rule]["auroc"].overall
            if one.low is not None:
                axes.hlines(i + offset, one.low, one.high, color="C0" if marker == "o" else "C1")
            axes.plot([one.mean], [i + offset], marker, color="C0" if marker == "o" else "C1", markersize=4)
        axes.plot([], [], marker, color="C0" if marker == "o" else "C1", label=source)
    axes.axvline(0.5, color="0.6", linewidth=1)
    axes.set_yticks(range(len(RULES)), RULES)
    axes.invert_yaxis()
    axes.set_title("where the objects are", loc="left")
    axes.set_xlabel("AUROC, 95 % over images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


def _map(axes: Any, values: list[float], grid: tuple[int, int], title: str) -> None:
    image = axes.imshow(np.asarray(values).reshape(grid), cmap="viridis")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
