"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): are the objects, numbers, colours and places right?

Three layers that know nothing of each other: the official *rules* (`rewards.rules`), pure functions on boxes; *scores*
made of them; and the reward `GenEval`, which runs a detector and applies both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rewards.boxes import (
    OFFICIAL,
    Detection,
    Limits,
    box_iou,
    closeness,
    filter_detections,
    keep_boxes,
    ranked_by_class,
    relative_position,
    without_mask,
)
from rewards.clauses import metadata_of
from rewards.errors import RewardError, did_you_mean
from rewards.loading import load_object, make
from rewards.rules import Metadata, evaluate, misses

Detector = Callable[[list[Any]], list[list[Detection]]]

__all__ = [
    "Detection",
    "GenEval",
    "Verdict",
    "box_iou",
    "dense_score",
    "evaluate",
    "filter_detections",
    "judge",
    "keep_boxes",
    "misses",
    "relative_position",
]

# Scores --------------------------------------------------------------------------------------------------------------

_SATURATION = 0.9
_CLUTTER = 0.5


def _trust(probability: float) -> float:
    """A probability as it counts in `dense`: beyond 0.9 it is as good as certain. Else a group in which every image is
    right would be ranked by the detector's rounding, and the group-normalised advantage would blow that up."""
    return min(probability / _SATURATION, 1.0)


def _terms(metadata: Metadata, found: Mapping[str, list[Detection]]) -> Iterator[float]:
    """What each `include` clause asks for, one number in [0, 1] each: presence, colour, place. An object that is not
    there contributes 0 to all of its clause's terms."""
    clauses: Sequence[Metadata] = metadata.get("include") or []
    slots = [found.get(clause["class"], [])[: clause["count"]] for clause in clauses]
    for i, (clause, mine) in enumerate(zip(clauses, slots, strict=True)):
        count = max(clause["count"], 1)
        yield sum(_trust(d.confidence) for d in mine) / count
        if "color" in clause:
            yield sum(_trust(d.confidence) * _trust(d.colors.get(clause["color"], 0.0)) for d in mine) / count
        if "position" in clause:
            relation, target = clause["position"]
            pairs = [(d, t) for d in mine for t in slots[:i][target]]
            near = (_trust(d.confidence) * _trust(t.confidence) * closeness(relation, d.box, t.box) for d, t in pairs)
            yield sum(near) / (count * max(clauses[:i][target]["count"], 1))


def dense_score(detections: Sequence[Detection], metadata: Metadata, correct: bool) -> float:
    """A graded score in [0, 1] that never contradicts `strict`: (1 + q)/2 if correct, q/2 if not, with

        q = mean(terms) · Π over exclude clauses m/(m + surplus) · N/(N + clutter/2)

    terms     presence (detector confidence), colour probability and closeness to the right place, per include clause
    surplus   confidence-weighted number of objects beyond the m - 1 that an exclude clause allows
    clutter   the same for all objects beyond the N asked for: the rules forgive bystanders, so painting everything
              would otherwise be the easiest way to show two given things

    `detections` are the detector's raw ones: below the threshold they still show which image is nearer. An incorrect
    image stays at or under 0.5 and a correct one above it; 1 is reached by a correct one without clutter in which
    everything exceeds 0.9 (see `_trust`).
    """
    found = ranked_by_class(detections)
    terms = list(_terms(metadata, found))
    quality = sum(terms) / len(terms) if terms else 1.0
    for clause in metadata.get("exclude") or ():
        limit = max(clause["count"], 1)
        surplus = sum(_trust(d.confidence) for d in found.get(clause["class"], [])[limit - 1 :])
        quality *= limit / (limit + surplus)
    if wanted := sum(clause["count"] for clause in metadata.get("include") or ()):
        clutter = max(sum(_trust(d.confidence) for d in detections) - wanted, 0.0)
        quality *= wanted / (wanted + _CLUTTER * clutter)
    return (quality + correct) / 2


@dataclass(frozen=True)
class Verdict:
    """All that one detection pass says about one image. `objects`: the detections that counted."""

    correct: bool
    reason: str
    strict: float
    partial: float
    dense: float
    objects: Mapping[str, list[Detection]]


def judge(detections: Sequence[Detection], metadata: Metadata, limits: Limits = OFFICIAL) -> Verdict:
    """Rules and scores on the raw detections of one image. `partial`: share of clauses met, 1 exactly if correct."""
    objects = filter_detections(detections, metadata.get("tag"), limits)
    boxes = {name: [(*d.box, d.confidence) for d in found] for name, found in objects.items()}
    # The rules ask for the colours of the first boxes of a class: the order is the key, equal boxes are no problem.
    reasons = misses(boxes, metadata, lambda name, asked: [d.color for d in objects[name][: len(asked)]])
    missed = [reason for reason in reasons if reason]
    partial = 1 - len(missed) / len(reasons) if reasons else 1.0
    dense = dense_score(detections, metadata, not missed)
    return Verdict(not missed, "\n".join(missed), float(not missed), partial, dense, objects)


# Reward --------------------------------------------------------------------------------------------------------------

SCORES = ("dense", "partial", "strict")
SUCCESS = {"dense": math.nextafter(0.5, 1), "partial": 1.0, "strict": 1.0}  # what exactly the correct images reach
DETECTORS = {
    "grounding_dino": "rewards.open_vocabulary:GroundingDino",
    "mask2former": "rewards.mask2former:Mask2Former",
    "owlv2": "rewards.open_vocabulary:Owlv2",
    "shapes": "rewards.detectors:ShapesDetector",
}
_CHUNK = 32  # images between detection and verdict at a time: their masks are in memory


class GenEval:
    """GenEval as a reward. Needs the prompts' columns `tag`, `include` and `exclude`; None for samples without them.

    detector: a built-in name (`DETECTORS`), `pkg.module:name`, `path/file.py:name`, or a callable
        list of images → list of lists of `Detection`. If it declares `classes` or `colors`, a prompt that asks for
        others is an error and not a silent zero; if it declares `colors_by_clip`, colours are read off its objects by
        CLIP (`rewards.colors`). detector_kwargs, color_kwargs: settings of the two.
    score: `dense` for training, `partial`, or `strict`, which is what is reported.
    threshold, counting_threshold, max_overlap: as the official evaluator's options of these names.
    self_test: whether the detector must first find something on pictures with known content (`rewards.self_test`); or a
        .jsonl file with pictures of your own.
    """

    range: ClassVar = (0.0, 1.0)
    spec_columns: ClassVar = ("include", "exclude")  # a prompt with neither is not judged

    def __init__(
        self,
        detector: str | Detector = "shapes",
        score: Literal["dense", "partial", "strict"] = "dense",
        detector_kwargs: Mapping[str, Any] | None = None,
        color_kwargs: Mapping[str, Any] | None = None,
        threshold: float = OFFICIAL.threshold,
        counting_threshold: float = OFFICIAL.counting_threshold,
        max_overlap: float = OFFICIAL.max_overlap,
        self_test: bool | str = True,
        device: str | None = None,
    ) -> None:
        if score not in SCORES:
            raise RewardError(f"score {score!r} is unknown{did_you_mean(score, SCORES)}")
        self.score = score
        self.success = SUCCESS[score]
        self.limits = Limits(threshold, counting_threshold, max_overlap=max_overlap)
        self.detector = self._load(detector, detector_kwargs or {}, device) if isinstance(detector, str) else detector
        self.painter = None
        if getattr(self.detector, "colors_by_clip", False):
            from rewards.colors import ColorClassifier

            self.painter = make("color_kwargs", ColorClassifier, color_kwargs or {}, device)
        elif color_kwargs:
            raise RewardError("color_kwargs are for detectors whose colours are read by CLIP, which this one's are not")
        if self_test:
            from rewards.self_test import check_detector

            check_detector(self.detector, self_test, threshold)

    @staticmethod
    def _load(name: str, settings: Mapping[str, Any], device: str | None) -> Detector:
        if ":" not in name and name not in DETECTORS:
            raise RewardError(f"detector {name!r} is unknown{did_you_mean(name, DETECTORS)}")
        return make(f"detector {name!r}", load_object(DETECTORS.get(name, name)), settings, device)

    def _words(self, key: str) -> Sequence[str] | None:
        """The classes or colours that can be asked for, None for any."""
        if key == "color" and self.painter is not None:
            return self.painter.colors
        return getattr(self.detector, {"class": "classes", "color": "colors"}[key], None)

    def _check(self, metadata: Metadata) -> None:
        """Refuse what could only ever score zero: words that the detector has no notion of."""
        for key in ("class", "color"):
            known = self._words(key)
            asked = [c[key] for c in (*metadata["include"], *metadata["exclude"]) if key in c]
            for word in asked:
                if known is not None and word not in known:
                    raise RewardError(f"the detector knows no {key} {word!r}{did_you_mean(str(word), known)}")

    def specs(
        self,
        number: int,
        tag: Sequence[str | None] | None = None,
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] | None = None,
    ) -> list[Metadata | None]:
        """The metadata of each of `number` samples, None where there is none. RewardError, with the sample's index, for what
        could only score zero."""
        columns = [[None] * number if column is None else column for column in (tag, include, exclude)]
        specs: list[Metadata | None] = []
        for index, row in enumerate(zip(*columns, strict=True)):
            try:
                specs.append(metadata_of(*row))
                self._check(specs[-1] or {"include": [], "exclude": []})
            except RewardError as error:
                raise RewardError(str(error), sample=index) from error
        return specs

    def judge(
        self,
        images: Sequence[Any],
        tag: Sequence[str | None] | None = None,
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] | None = None,
    ) -> list[Verdict | None]:
        """All scores and the reason, per image, from one detection pass; None for a sample without metadata."""
        specs = self.specs(len(images), tag, include, exclude)
        verdicts: list[Verdict | None] = [None] * len(images)
        wanted = [i for i, spec in enumerate(specs) if spec is not None]
        for start in range(0, len(wanted), _CHUNK):
            rows = wanted[start : start + _CHUNK]
            found = self._detect([images[i] for i in rows], [specs[i] or {} for i in rows])
            for i, detections in zip(rows, found, strict=True):
                verdicts[i] = judge(detections, specs[i] or {}, self.limits)
        return verdicts

    def _detect(self, images: list[Any], specs: Sequence[Metadata]) -> list[list[Detection]]:
        """Detections with the colours that the specifications ask for; their masks are needed for no more than that."""
        found = self.detector(images)
        if self.painter is not None:
            found = self.painter.paint(images, found, specs, self.limits)
        return [[without_mask(detection) for detection in own] for own in found]

    def __call__(
        self,
        images: Sequence[Any],
        prompts: Sequence[str],
        tag: Sequence[str | None] | None = None,
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] | None = None,
    ) -> list[float | None]:
        return self.scores(self.judge(images, tag, include, exclude))

    def scores(self, verdicts: Sequence[Verdict | None]) -> list[float | None]:
        """The chosen score of each verdict."""
        return [None if verdict is None else getattr(verdict, self.score) for verdict in verdicts]
