"""Detections, and the geometry of the GenEval rules: which boxes count, and where one lies relative to another."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

Box = Sequence[float]  # x0, y0, x1, y1, confidence

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
MAX_OVERLAP = 1.0
POSITION_THRESHOLD = 0.1
# axis (0 = x, 1 = y, growing downwards) and sign of each relation
RELATIONS: dict[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


@dataclass(frozen=True)
class Limits:
    """Which detections count; the defaults are the official evaluator's.

    threshold, counting_threshold: what the confidence must exceed, in general and under the tag `counting`. max_objects: of
    a class. max_overlap: IoU from which the less confident of two boxes of a class is dropped, 1 = never.
    """

    threshold: float = THRESHOLD
    counting_threshold: float = COUNTING_THRESHOLD
    max_objects: int = MAX_OBJECTS
    max_overlap: float = MAX_OVERLAP


OFFICIAL = Limits()


@dataclass(frozen=True)
class Detection:
    """What a detector says of one object. `colors`: probability per colour name; may be empty if nobody asks for it.
    `mask`: its pixels, (H, W) bool, from detectors that know them."""

    name: str
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in px
    confidence: float
    colors: Mapping[str, float] = field(default_factory=dict)
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def color(self) -> str:
        return max(self.colors, key=lambda color: self.colors[color], default="")


def without_mask(detection: Detection) -> Detection:
    return detection if detection.mask is None else replace(detection, mask=None)


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union. Edges are inclusive pixel indices, so a box is one wider than x1 - x0."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - common
    return common / union if union else 0.0


def keep_boxes(
    boxes: Sequence[Box], threshold: float, max_objects: int = MAX_OBJECTS, max_overlap: float = MAX_OVERLAP
) -> list[int]:
    """Indices of the boxes of one class that count, by falling confidence: above the threshold, the first
    `max_objects` of them, and of those whose IoU reaches `max_overlap` (1 = off) the more confident one."""
    confidence = np.asarray([box[4] for box in boxes])
    order = [int(i) for i in np.argsort(confidence)[::-1] if confidence[i] > threshold]
    kept: list[int] = []
    for i in order[:max_objects]:
        if max_overlap == 1 or all(box_iou(boxes[j], boxes[i]) < max_overlap for j in kept):
            kept.append(i)
    return kept


def ranked_by_class(
    detections: Sequence[Detection],
    threshold: float = -math.inf,
    max_objects: int | None = None,
    max_overlap: float = MAX_OVERLAP,
) -> dict[str, list[Detection]]:
    """Detections by class, by falling confidence; of each class those that `keep_boxes` keeps, by default all."""
    found: defaultdict[str, list[Detection]] = defaultdict(list)
    for detection in detections:
        found[detection.name].append(detection)
    kept = {}
    for name, group in found.items():
        boxes = [(*d.box, d.confidence) for d in group]
        if indices := keep_boxes(boxes, threshold, max_objects or len(boxes), max_overlap):
            kept[name] = [group[i] for i in indices]
    return kept


def filter_detections(
    detections: Sequence[Detection], tag: str | None = None, limits: Limits = OFFICIAL
) -> dict[str, list[Detection]]:
    """Detections that count, by class, by falling confidence."""
    threshold = limits.counting_threshold if tag == "counting" else limits.threshold
    return ranked_by_class(detections, threshold, limits.max_objects, limits.max_overlap)


def relative_position(a: Box, b: Box) -> set[str]:
    """Where box `a` lies relative to box `b`: up to two of the four relations, none if they are too close."""
    corners = np.array([a, b])[:, :4].reshape(2, 2, 2)  # box, corner, axis
    offset = corners[0].mean(axis=0) - corners[1].mean(axis=0)
    slack = POSITION_THRESHOLD * np.abs(corners[:, 1] - corners[:, 0]).sum(axis=0)
    clear = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    if np.all(np.abs(clear) < 1e-3):
        return set()
    direction = clear / np.linalg.norm(offset)
    return {relation for relation, (axis, sign) in RELATIONS.items() if sign * direction[axis] > 0.5}


def closeness(relation: str, a: Box, b: Box) -> float:
    """How far `a` is on the way to its place relative to `b`: 1 where the rule holds, 0 on the opposite side."""
    axis, sign = RELATIONS.get(relation, (0, 0))
    corners = np.array([a[:4], b[:4]]).reshape(2, 2, 2)
    offset = corners[0].mean(axis=0) - corners[1].mean(axis=0)
    slack = POSITION_THRESHOLD * np.abs(corners[:, 1, axis] - corners[:, 0, axis]).sum()
    distance = max(float(np.linalg.norm(offset)), 1e-6)
    return float(np.clip((sign * offset[axis] - slack + distance) / (1.5 * distance), 0.0, 1.0))
