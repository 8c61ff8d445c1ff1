"""Phrase maps: the negative prompt is the prompt without a phrase, so the contrast shows where that phrase acts.

On prompts of two objects ("a photo of a red circle and a blue square") a right map of "a red circle", or of "red", lies on the
red circle and not on the blue square. Measured: mean credit on the cells of the named object ÷ mean credit on those of the
other. Mean per cell, because objects differ in size. Relations are left out: without one of its objects, "left of a square"
is no prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from gcpo_t2i.credit_eval.intervals import Interval, median
from gcpo_t2i.credit_eval.metrics import density_ratio
from gcpo_t2i.credit_eval.objects import Objects
from gcpo_t2i.credit_eval.rules import contrasts, credit, fits
from gcpo_t2i.data import Prompt
from gcpo_t2i.maps.scored import without

TAGS = ("two_object", "color_attr")
SCALES = ("power_rank", "mean")  # of the credit: as in training, and in proportion to the evidence


@dataclass(frozen=True)
class Case:
    """One phrase of the prompt of one image."""

    image: int
    kind: str  # "two_object: object", "color_attr: object" or "color_attr: colour"
    prompt: Prompt  # with the negative prompt
    named: np.ndarray  # (T,) bool
    other: np.ndarray  # (T,) bool


def phrases_of(include: Sequence[Mapping[str, Any]], which: int) -> dict[str, str]:
    """Kind → what a prompt of two objects says of its clause `which` alone: {"object": "red circle", "colour": "red"}."""
    clause, other = include[which], include[1 - which]
    if "color" not in clause:
        return {"object": clause["class"]}
    named = {"object": f"{clause['color']} {clause['class']}"}
    return named if clause["color"] == other.get("color") else {**named, "colour": clause["color"]}


def cases(prompts: Sequence[Prompt], objects: Sequence[Objects]) -> list[Case]:
    """Every phrase of every image of two objects that shows each of them exactly once."""
    found = []
    for image, (prompt, own) in enumerate(zip(prompts, objects, strict=True)):
        include = prompt.columns.get("include") or ()
        if prompt.columns.get("tag") not in TAGS:
            continue
        masks = [_the_one(clause, own) for clause in include]
        if any(mask is None for mask in masks):
            continue
        for which in (0, 1):
            named, other = masks[which] & ~masks[1 - which], masks[1 - which] & ~masks[which]
            if named.any() and other.any():
                for kind, phrase in phrases_of(include, which).items():
                    contrasted = replace(prompt, negative=without(prompt.text, phrase))
                    found.append(Case(image, f"{prompt.columns['tag']}: {kind}", contrasted, named, other))
    return found


def _the_one(clause: Mapping[str, Any], objects: Objects) -> Any:
    """The cells of the only object that the clause describes; None if there is none, or more."""
    fitting = [mask for name, color, mask in objects if name == clause["class"] and clause.get("color", color) == color]
    return fitting[0] if len(fitting) == 1 else None


def find_phrases(every: Sequence[Case], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, Interval]]]:
    """Scale of the credit → contrast → kind of phrase → median ratio of credit on the named object to that on the other, over
    the cases, whose codes have these tensors (N, T)."""
    found: dict[str, dict[str, dict[str, Interval]]] = {}
    for scale in SCALES:
        for name, evidence in contrasts(tensors).items():
            if fits(name, scale):
                found.setdefault(scale, {})[name] = _medians(every, credit(evidence, scale))
    return found


def images_of(every: Sequence[Case]) -> dict[str, int]:
    """Kind of phrase → number of images with such phrases."""
    return {kind: len({case.image for case in every if case.kind == kind}) for kind in _kinds(every)}


def _kinds(every: Sequence[Case]) -> list[str]:
    return sorted({case.kind for case in every}, reverse=True)  # two_object first


def _medians(every: Sequence[Case], weights: np.ndarray) -> dict[str, Interval]:
    ratios: dict[str, dict[int, list[float]]] = {kind: {} for kind in _kinds(every)}
    for case, own in zip(every, weights, strict=True):
        ratios[case.kind].setdefault(case.image, []).append(density_ratio(own, case.named, case.other))
    return {kind: median(list(per_image.values())) for kind, per_image in ratios.items()}
