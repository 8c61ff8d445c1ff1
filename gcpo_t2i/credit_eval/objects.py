"""Where the objects are: the cells of each, of drawn scenes (known) and of the model's own images (from the detector)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from gcpo_t2i.credit_eval.metrics import auroc, average_precision, inside
from gcpo_t2i.credit_eval.rules import all_scores, credit, fits
from gcpo_t2i.data import Prompt
from gcpo_t2i.errors import UserError
from gcpo_t2i.evals.statistics import Estimates, estimate
from gcpo_t2i.scoring import segment
from gcpo_t2i.shapes import GRID, PALETTE, SHAPES, Scene, cell_masks, sample_scene, to_cells

INSIDE = (
    "power_rank",
    "mean",
    "softmax",
)  # normalizers that credit is counted by; the share of `none` is that of `mean`
CONFIDENT = 0.3  # GenEval's own threshold

Objects = list[tuple[str, str, np.ndarray]]  # class, colour, and cells (T,) bool of each object of an image


def check_world(grid: tuple[int, int], prompts: Sequence[Prompt]) -> None:
    """UserError for a model or prompts whose objects nobody knows."""
    cure = "--truths advantage needs no objects"
    if tuple(grid) != (GRID, GRID):
        raise UserError(f"the model makes {grid[0]}x{grid[1]} codes, ShapesWorld's images have {GRID}x{GRID}; {cure}")
    for prompt in prompts:
        clauses = prompt.columns.get("include") or ()
        known = all(c["class"] in SHAPES and c.get("color", "red") in PALETTE for c in clauses)
        if not clauses or not known:
            raise UserError(f"prompt '{prompt.text}' describes no ShapesWorld scene by its column 'include'; {cure}")


def scenes(prompts: Sequence[Prompt], seed: int) -> list[Scene]:
    """A scene for each prompt, which fulfils it."""
    return [sample_scene(dict(prompt.columns), np.random.default_rng((seed, i))) for i, prompt in enumerate(prompts)]


def of_scene(scene: Scene) -> Objects:
    return [(obj.shape, obj.color, mask.ravel()) for obj, mask in zip(scene.objects, cell_masks(scene), strict=True)]


def of_images(images: Sequence[Image.Image]) -> list[Objects]:
    """The objects that the detector is sure enough of."""
    return [
        [(found.name, found.color, to_cells(mask).ravel()) for found, mask in own if found.confidence > CONFIDENT]
        for own in segment(images)
    ]


def union(objects: Objects, cells: int) -> np.ndarray:
    """The cells (T,) bool of any object."""
    return np.any([mask for *_, mask in objects], axis=0) if objects else np.zeros(cells, bool)


def find_objects(
    tensors: Mapping[str, Tensor], masks: np.ndarray, tags: Sequence[str], seed: int
) -> dict[str, dict[str, Estimates]]:
    """Rule → `auroc` and `average_precision` of its scores, and `inside/NORMALIZER`, the share of credit inside, over images
    with masks (N, T) bool, overall (the mean over tags) and per tag. Images without objects, or full of them, are left out."""
    which = np.flatnonzero(masks.any(1) & ~masks.all(1)).tolist()
    kept = [tags[i] for i in which]
    found: dict[str, dict[str, Estimates]] = {}
    for rule, scores in all_scores(tensors, masks.astype(float), seed).items():
        per_image = {
            "auroc": [auroc(scores[i], masks[i]) for i in which],
            "average_precision": [average_precision(scores[i], masks[i]) for i in which],
        }
        for normalizer in INSIDE:
            if fits(rule, normalizer):
                weights = credit(scores, normalizer)
                per_image[f"inside/{normalizer}"] = [inside(weights[i], masks[i]) for i in which]
        found[rule] = {name: estimate(_by_tag(values, kept)) for name, values in per_image.items()}
    return found


def _by_tag(values: Sequence[float], tags: Sequence[str]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for tag, value in zip(tags, values, strict=True):
        groups.setdefault(tag, []).append(value)
    return groups
