"""The `shapes` detector: exact vision for ShapesWorld, by rules, so that the reward measures nothing but the generator.

Background grey → each pixel as paint of one palette colour over that grey → connected components of one colour →
the silhouette that each component overlaps best. It reads rendered scenes, and images that come out of a VQ decoder a
little blurred and noisy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from gcpo_t2i.shapes import IMAGE_SIZE, PALETTE, SHAPES, SIZES, Object, Scene, render, shape_mask
from rewards.boxes import Detection
from rewards.errors import RewardError
from rewards.self_test import Known

_GREY = 40  # px whose channels differ by less are grey; the palest palette colour differs by 80
_MIN_AREA = 16  # px; the smallest silhouette has 50
_CANVAS = 24  # px; silhouettes are compared on a canvas of this side
_SHIFTS = (-1, 0, 1)  # px, around the alignment of the two bounding boxes
_SUPERSAMPLE = 4
_SOFTNESS = 22.0  # RGB units; the two nearest palette colours are 81 apart
_NEIGHBOURS = np.ones((3, 3), bool)
_COLORS = np.asarray(list(PALETTE.values()), np.float32)

# Overlap with the best silhouette → confidence. Blurred (sigma 0.8 px) and noisy (sigma 10) shapes overlap with their
# own silhouette by 0.89 and more in 99 of 100 cases; blobs and shapes cut by a third by 0.83 and less in 95 of 100.
_OVERLAP = (0.50, 0.80, 0.87, 0.94)
_CONFIDENCE = (0.0, 0.29, 0.91, 1.0)
_CLEAR = 0.25  # how much smaller the best silhouette's misfit must be than the runner-up's, to be believed in full


@dataclass(frozen=True)
class _Component:
    """Connected pixels of one colour. mask: (48, 48) bool; paint: (48, 48) coverage of them and of their pale rim."""

    mask: np.ndarray
    paint: np.ndarray

    def box(self) -> tuple[int, int, int, int]:
        rows, columns = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    def on_canvas(self, dx: int = 0, dy: int = 0) -> np.ndarray:
        """The paint with the middle of its box in the middle of the canvas, moved by (dx, dy), (canvas²,) float32."""
        x0, y0, x1, y1 = self.box()
        left, top = x0 - (_CANVAS - (x1 - x0)) // 2 - dx, y0 - (_CANVAS - (y1 - y0)) // 2 - dy
        padded = np.pad(self.paint, _CANVAS)  # the canvas may hang over the image's edge
        return padded[top + _CANVAS : top + 2 * _CANVAS, left + _CANVAS : left + 2 * _CANVAS].ravel()


@cache
def _bank() -> tuple[np.ndarray, np.ndarray]:
    """Anti-aliased silhouettes, shape by shape, in sizes around the two that scenes have and at all shifts:
    (R, canvas²) float32, and their squared norms (R,)."""
    rows = []
    for name in SHAPES:
        for size in range(min(SIZES) - 1, max(SIZES) + 2):
            fine = shape_mask(name, size * _SUPERSAMPLE)
            alpha = fine.reshape(size, _SUPERSAMPLE, size, _SUPERSAMPLE).mean(axis=(1, 3), dtype=np.float32)
            silhouette = _Component(alpha >= 0.5, alpha)
            rows += [silhouette.on_canvas(dx, dy) for dy in _SHIFTS for dx in _SHIFTS]
    bank = np.asarray(rows)
    return bank, (bank**2).sum(axis=1)


def _background(pixels: np.ndarray) -> np.ndarray:
    """The grey of the background, (3,): the median of all pixels without colour, or of all if there are hardly any."""
    flat = pixels.reshape(-1, 3)
    red, green, blue = flat.T  # pairwise maxima: three times faster here than one over an axis of length 3
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    grey = flat[chroma < _GREY]
    return np.median(grey if len(grey) > len(flat) // 10 else flat, axis=0)


def _paint(difference: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels less background as coverage · (colour - background): coverage (48, 48), colour index (48, 48).

    The colour is the one that leaves the smallest rest, so the pale rim of a red object is red and not pink.
    """
    directions = _COLORS - background  # (C, 3)
    norms = np.maximum((directions**2).sum(axis=1), 1.0)  # a background may have a palette colour itself
    dots = difference @ directions.T  # (48, 48, C)
    coverage = np.clip(dots / norms, 0.0, 1.0)
    rest = coverage * (coverage * norms - 2 * dots)  # |difference - coverage · direction|², less what colours share
    color = rest.argmin(axis=-1)
    return np.take_along_axis(coverage, color[..., None], axis=-1)[..., 0], color


def _components(pixels: np.ndarray) -> list[_Component]:
    background = _background(pixels)
    coverage, color = _paint(pixels - background, background)
    painted = coverage >= 0.5
    colors = np.flatnonzero(np.bincount(color[painted], minlength=len(PALETTE)) >= _MIN_AREA)
    if not len(colors):
        return []
    # A pixel takes the colour of most of its painted neighbours: single noisy pixels do not tear holes.
    layers = [(painted & (color == index)).astype(np.float32) for index in colors]
    votes = np.argmax([ndimage.uniform_filter(layer, 3, mode="constant") for layer in layers], axis=0)
    found = []
    for index in range(len(colors)):
        labels = np.zeros(votes.shape, np.int32)
        ndimage.label(painted & (votes == index), structure=_NEIGHBOURS, output=labels)
        for label in np.flatnonzero(np.bincount(labels.ravel())[1:] >= _MIN_AREA) + 1:
            mask = labels == label
            rim = np.asarray(ndimage.binary_dilation(mask, _NEIGHBOURS), bool) & ~painted
            found.append(_Component(mask, np.where(mask | rim, coverage, 0.0).astype(np.float32)))
    return found


def _classify(components: Sequence[_Component]) -> list[tuple[str, float]]:
    """The nearest shape of each component, and how sure that is: its overlap with the best silhouette, less if another
    shape fits nearly as well. Overlap: a·b / (|a|² + |b|² - a·b), which is intersection over union if all is 0 or 1."""
    bank, norms = _bank()
    rows = np.asarray([component.on_canvas() for component in components])
    common = rows @ bank.T
    whole = np.asarray([(component.paint**2).sum() for component in components])  # also what the canvas cuts off
    overlap = common / (whole[:, None] + norms - common)
    best = overlap.reshape(len(components), len(SHAPES), -1).max(axis=2)
    second, first = np.sort(best, axis=1)[:, -2:].T
    clear = np.clip((first - second) / np.maximum(1 - second, 1e-6) / _CLEAR, 0.0, 1.0)
    confidence = np.interp(first, _OVERLAP, _CONFIDENCE) * clear
    return [(SHAPES[i], float(c)) for i, c in zip(best.argmax(axis=1), confidence, strict=True)]


def _colors(pixels: np.ndarray, component: _Component) -> dict[str, float]:
    """Probability of each palette colour: Gaussian in the distance to the median of the fully painted pixels."""
    inner = component.mask & (component.paint >= np.median(component.paint[component.mask]))
    distance = ((_COLORS - np.median(pixels[inner], axis=0)) ** 2).sum(axis=1)
    weight = np.exp((distance.min() - distance) / (2 * _SOFTNESS**2))
    return dict(zip(PALETTE, (weight / weight.sum()).tolist(), strict=True))


def detect(image: Image.Image) -> list[Detection]:
    """The objects of one ShapesWorld image, unsure ones with their low confidence. A box ends behind its last pixel.

    Raises RewardError if the image is not 48 x 48 px.
    """
    return [found for found, _ in segment(image)]


def segment(image: Image.Image) -> list[tuple[Detection, np.ndarray]]:
    """As `detect`, each object with its pixels, (48, 48) bool."""
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        size = f"{image.width}x{image.height}"
        raise RewardError(f"the shapes detector reads {IMAGE_SIZE}x{IMAGE_SIZE} px ShapesWorld images, got {size}")
    pixels = np.asarray(image.convert("RGB"), np.float32)
    components = _components(pixels)
    return [
        (Detection(name, component.box(), confidence, _colors(pixels, component)), component.mask)
        for component, (name, confidence) in zip(components, _classify(components) if components else (), strict=True)
    ]


class ShapesDetector:
    """Detector for `GenEval`. `classes` and `colors` say which words it knows."""

    classes = SHAPES
    colors = tuple(PALETTE)

    def known(self) -> list[Known]:
        """One object of each shape."""
        scenes = [Scene((Object(shape, "blue", max(SIZES), 16, 16),)) for shape in SHAPES]
        names = [[scene.objects[0].shape] for scene in scenes]
        return [(Image.fromarray(render(scene)), own) for scene, own in zip(scenes, names, strict=True)]

    def __call__(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        return [detect(image) for image in images]
