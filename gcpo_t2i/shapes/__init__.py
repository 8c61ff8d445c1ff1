"""ShapesWorld: the embedded, exact world of prompts, scenes and masks, and the checkpoints trained on it."""

from __future__ import annotations

from pathlib import Path

from gcpo_t2i.shapes.prompts import TAGS, heldout_specs, sample_scene, train_specs
from gcpo_t2i.shapes.scenes import (
    BACKGROUNDS,
    CELL,
    GRID,
    IMAGE_SIZE,
    PALETTE,
    SHAPES,
    SIZES,
    Object,
    Scene,
    cell_masks,
    object_masks,
    render,
    shape_mask,
    to_cells,
)

CHECKPOINTS = ("generator", "clip", "aesthetic")


def checkpoint_path(name: str) -> Path:
    """Folder of a shipped checkpoint: `generator`, `clip` or `aesthetic`."""
    if name not in CHECKPOINTS:
        raise ValueError(f"checkpoint {name!r} is unknown; known: {', '.join(CHECKPOINTS)}")
    return Path(__file__).parent / "checkpoints" / name


__all__ = [
    "BACKGROUNDS",
    "CELL",
    "CHECKPOINTS",
    "GRID",
    "IMAGE_SIZE",
    "PALETTE",
    "SHAPES",
    "SIZES",
    "TAGS",
    "Object",
    "Scene",
    "cell_masks",
    "checkpoint_path",
    "heldout_specs",
    "object_masks",
    "render",
    "sample_scene",
    "shape_mask",
    "to_cells",
    "train_specs",
]
