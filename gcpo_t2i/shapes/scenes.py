"""ShapesWorld scenes: flat shapes on a plain grey background, with exact object masks.

Every object sits on the lattice of the image code map (4 px cells) and comes in two sizes. The lattice is deliberate: it
leaves no sub-cell phase for the tokenizer to spend codes on, and no entropy for the generator but that of *what* is where.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

IMAGE_SIZE = 48  # px
CELL = 4  # px per image code
GRID = IMAGE_SIZE // CELL
SIZES = (12, 16)  # px

# The colour names are eight of GenEval's ten; black and white are left out because the backgrounds are grey.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (250, 145, 20),
    "yellow": (245, 220, 50),
    "green": (40, 160, 65),
    "blue": (40, 80, 210),
    "purple": (130, 45, 165),
    "pink": (250, 130, 185),
    "brown": (115, 70, 35),
}
BACKGROUNDS: tuple[tuple[int, int, int], ...] = ((240, 240, 240), (212, 212, 212), (184, 184, 184))
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "heart", "ring")

_SUPERSAMPLE = 8


@dataclass(frozen=True)
class Object:
    """One shape. `x`, `y`: top-left corner in px, `size`: side of its square box in px."""

    shape: str
    color: str
    size: int
    x: int
    y: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) in px, the right and lower edges exclusive."""
        return self.x, self.y, self.x + self.size, self.y + self.size


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: tuple[int, int, int] = BACKGROUNDS[0]


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five-pointed star: inside the polygon whose radius alternates between 1 and 0.42."""
    u, v = u, v - 0.05
    angle = np.mod(np.arctan2(u, -v), 2 * np.pi / 5)
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)  # fold onto one half-spike: tip at 0, notch at pi/5
    radius = np.hypot(u, v)
    tip, notch = np.array([1.06, 0.0]), 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    edge = notch - tip
    return edge[0] * (y - tip[1]) - edge[1] * (x - tip[0]) >= 0


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two discs on top of a wedge."""
    a = np.abs(u)
    disc = np.hypot(a - 0.48, v + 0.42) <= 0.52
    wedge = (v >= -0.42) & (a <= 1.0 - (v + 0.2) * 0.86) & (v <= 1.0)
    return disc | (wedge & (v >= -0.25)) | ((a <= 0.5) & (v >= -0.42) & (v < 0))


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points (u, v) of the square [-1, 1]² (v grows downwards) lie in the silhouette."""
    a, b = np.abs(u), np.abs(v)
    match shape:
        case "circle":
            return np.hypot(u, v) <= 1.0
        case "square":
            return np.maximum(a, b) <= 1.0
        case "triangle":
            return (a <= (v + 1.0) / 2.0) & (v <= 0.95)
        case "diamond":
            return a / 0.72 + b <= 1.0
        case "cross":
            return ((a <= 0.34) | (b <= 0.34)) & (np.maximum(a, b) <= 1.0)
        case "star":
            return _star(u, v)
        case "heart":
            return _heart(u, v)
        case "ring":
            return (np.hypot(u, v) <= 1.0) & (np.hypot(u, v) >= 0.52)
    raise ValueError(f"shape {shape!r} is unknown; known: {', '.join(SHAPES)}")


@cache
def shape_alpha(shape: str, size: int) -> np.ndarray:
    """Coverage of each pixel by the silhouette, (size, size) float32 in [0, 1]. Do not write to it: it is shared."""
    steps = size * _SUPERSAMPLE
    axis = (np.arange(steps) + 0.5) / steps * 2 - 1
    inside = _inside(shape, axis[None, :], axis[:, None])
    alpha = inside.reshape(size, _SUPERSAMPLE, size, _SUPERSAMPLE).mean(axis=(1, 3)).astype(np.float32)
    alpha.setflags(write=False)
    return alpha


@cache
def shape_mask(shape: str, size: int) -> np.ndarray:
    """Pixels that are at least half covered, (size, size) bool. Do not write to it: it is shared."""
    mask = shape_alpha(shape, size) >= 0.5
    mask.setflags(write=False)
    return mask


def render(scene: Scene) -> np.ndarray:
    """The picture, (48, 48, 3) uint8, with anti-aliased edges. Later objects cover earlier ones."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    image[:] = scene.background
    for obj in scene.objects:
        alpha = shape_alpha(obj.shape, obj.size)[..., None]
        patch = image[obj.y : obj.y + obj.size, obj.x : obj.x + obj.size]
        patch += alpha * (np.asarray(PALETTE[obj.color], np.float32) - patch)
    return np.rint(image).astype(np.uint8)


def object_masks(scene: Scene) -> list[np.ndarray]:
    """The pixels of each object, [(48, 48) bool], in the order of `scene.objects`."""
    masks = []
    for obj in scene.objects:
        mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
        mask[obj.y : obj.y + obj.size, obj.x : obj.x + obj.size] = shape_mask(obj.shape, obj.size)
        masks.append(mask)
    return masks


def to_cells(mask: np.ndarray) -> np.ndarray:
    """The code cells (12, 12) bool that hold any pixel of a mask (48, 48) bool."""
    return np.any(mask.reshape(GRID, CELL, GRID, CELL), axis=(1, 3))


def cell_masks(scene: Scene) -> list[np.ndarray]:
    """The code cells of each object: [(12, 12) bool], a cell belongs to an object that covers any of its pixels."""
    return [to_cells(mask) for mask in object_masks(scene)]
