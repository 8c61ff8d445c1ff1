"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): are the objects, numbers, colours and places right?

Three layers that know nothing of each other: *rules*, pure functions on boxes that give the verdict of the official
evaluator (github.com/djghosh13/geneval, `evaluation/evaluate_images.py`) on any input; *scores* made of them; and the
reward `GenEval`, which runs a detector and applies both.

What the official rules do, and one might not expect:

- Only the `count` most confident objects of a class are looked at: their colours and places decide, and further objects
  of the class never hurt, unless an `exclude` clause counts them.
- A clause is judged in order: number, colour, place. The first miss ends it, and its objects are then no target for
  the `position` of a later clause, which fails in turn.
- A position holds only if it holds for every pair of object and target. It is the direction between the box centres,
  shortened per axis by 0.1 of the summed box sizes, and an axis counts from half the distance on (60° to each side).
- Confidence must exceed 0.3, or 0.9 when counting; at most 16 boxes per class; overlaps are not suppressed by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rewards.boxes import (
    RELATIONS,
    Box,
    Detection,
    box_iou,
    closeness,
    filter_detections,
    keep_boxes,
    ranked_by_class,
    relative_position,
)
from rewards.errors import RewardError, did_you_mean
from rewards.loading import load_object

Metadata = Mapping[str, Any]
Colors = Callable[[str, Sequence[Box]], list[str]]
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

# Rules ---------------------------------------------------------------------------------------------------------------


def _position_miss(name: str, relation: str, found: Sequence[Box], targets: Sequence[Box] | None) -> str:
    if targets is None:
        return f"{name} should be {relation} an object that does not meet its own clause"
    for box in found:
        for target in targets:
            actual = relative_position(box, target)
            if relation not in actual:
                return f"{name} should be {relation} its target, is {' and '.join(sorted(actual)) or 'too close'}"
    return ""


def _include_miss(
    clause: Metadata,
    found: Sequence[Box],
    groups: Sequence[Sequence[Box] | None],
    colors: Colors,
) -> str:
    """Why the clause is not met, "" if it is. `found`: at most `count` boxes; `groups`: those of earlier clauses."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected at least {count} {name}, found {len(found)}"
    if "color" in clause:
        seen = list(colors(name, found))
        if seen.count(clause["color"]) < count:
            return f"expected at least {count} {clause['color']} {name}, found {', '.join(seen) or 'none'}"
    if "position" in clause:
        relation, target = clause["position"]
        if not -len(groups) <= target < len(groups):
            raise RewardError(f"position of {name!r} refers to clause {target}, which does not come before it")
        return _position_miss(name, relation, found, groups[target])
    return ""


def misses(objects: Mapping[str, Sequence[Box]], metadata: Metadata, colors: Colors) -> list[str]:
    """One entry per clause, `include` before `exclude`: why it is not met, "" if it is. Arguments as for `evaluate`."""
    reasons: list[str] = []
    groups: list[Sequence[Box] | None] = []
    for clause in metadata.get("include") or ():
        found = objects.get(clause["class"], ())[: clause["count"]]
        reasons.append(_include_miss(clause, found, groups, colors))
        groups.append(None if reasons[-1] else found)
    for clause in metadata.get("exclude") or ():
        number = len(objects.get(clause["class"], ()))
        reasons.append(
            f"expected fewer than {clause['count']} {clause['class']}, found {number}"
            if number >= clause["count"]
            else ""
        )
    return reasons


def evaluate(objects: Mapping[str, Sequence[Box]], metadata: Metadata, colors: Colors) -> tuple[bool, str]:
    """The official verdict, and what is wrong, one line per clause that is not met.

    objects: class name → boxes (x0, y0, x1, y1, confidence), sorted by falling confidence, already thresholded.
    metadata: `include` clauses {class, count, color?, position? = [relation, index of an earlier clause]}, all of which
        must hold, and `exclude` clauses {class, count}, none of which may be reached.
    colors: names the colours of these boxes of that class; asked only where the number is right and a colour is named.

    Raises RewardError if a position refers to a clause that does not come before it (the official code has no verdict
    there either).
    """
    reasons = [reason for reason in misses(objects, metadata, colors) if reason]
    return not reasons, "\n".join(reasons)


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


def judge(detections: Sequence[Detection], metadata: Metadata) -> Verdict:
    """Rules and scores on the raw detections of one image. `partial`: share of clauses met, 1 exactly if correct."""
    objects = filter_detections(detections, metadata.get("tag"))
    boxes = {name: [(*d.box, d.confidence) for d in found] for name, found in objects.items()}
    # The rules ask for the colours of the first boxes of a class: the order is the key, equal boxes are no problem.
    reasons = misses(boxes, metadata, lambda name, asked: [d.color for d in objects[name][: len(asked)]])
    missed = [reason for reason in reasons if reason]
    partial = 1 - len(missed) / len(reasons) if reasons else 1.0
    dense = dense_score(detections, metadata, not missed)
    return Verdict(not missed, "\n".join(missed), float(not missed), partial, dense, objects)


# Reward --------------------------------------------------------------------------------------------------------------

SCORES = ("dense", "partial", "strict")
DETECTORS = {"shapes": "rewards.detectors:ShapesDetector"}


def _metadata(tag: str | None, include: Any, exclude: Any) -> Metadata | None:
    """One sample's specification from its columns, None if it has none. Tables fill absent keys with None: dropped."""
    if include is None and exclude is None:
        return None
    clauses = {"include": include or (), "exclude": exclude or ()}
    cleaned = {key: [{k: v for k, v in c.items() if v is not None} for c in value] for key, value in clauses.items()}
    return {"tag": tag, **cleaned}


def _check_clause(clause: Metadata, before: int) -> None:
    for key in ("class", "count"):
        if key not in clause:
            raise RewardError(f"GenEval clause {dict(clause)} has no {key!r}")
    if "position" in clause:
        relation, target = clause["position"]
        if relation not in RELATIONS:
            raise RewardError(f"relation {relation!r} is unknown{did_you_mean(str(relation), RELATIONS)}")
        if not -before <= target < before:
            raise RewardError(
                f"position of {clause['class']!r} refers to clause {target}, which does not come before it"
            )


class GenEval:
    """GenEval as a reward. Needs the prompts' columns `tag`, `include` and `exclude`; None for samples without them.

    detector: a built-in name (`shapes`), `pkg.module:name`, `path/file.py:name`, or a callable
        list of images → list of lists of `Detection`. If it declares `classes` or `colors`, a prompt that asks for
        others is an error and not a silent zero.
    score: `dense` for training, `partial`, or `strict`, which is what is reported.
    """

    range: ClassVar = (0.0, 1.0)

    def __init__(
        self, detector: str | Detector = "shapes", score: Literal["dense", "partial", "strict"] = "dense"
    ) -> None:
        if score not in SCORES:
            raise RewardError(f"score {score!r} is unknown{did_you_mean(score, SCORES)}")
        self.score = score
        self.detector = self._load(detector) if isinstance(detector, str) else detector

    @staticmethod
    def _load(name: str) -> Detector:
        if ":" not in name and name not in DETECTORS:
            raise RewardError(f"detector {name!r} is unknown{did_you_mean(name, DETECTORS)}")
        target = load_object(DETECTORS.get(name, name))
        return target() if isinstance(target, type) else target

    def _check(self, metadata: Metadata) -> None:
        """Refuse what could only ever score zero: broken clauses, and words that the detector has no notion of."""
        for i, clause in enumerate(metadata["include"]):
            _check_clause(clause, before=i)
        for clause in metadata["exclude"]:
            _check_clause(clause, before=0)
        for key, known in (("class", "classes"), ("color", "colors")):
            names = getattr(self.detector, known, None)
            asked = [c[key] for c in (*metadata["include"], *metadata["exclude"]) if key in c]
            for word in asked:
                if names is not None and word not in names:
                    raise RewardError(f"the detector knows no {key} {word!r}{did_you_mean(str(word), names)}")

    def specs(
        self,
        number: int,
        tag: Sequence[str | None] | None = None,
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] | None = None,
    ) -> list[Metadata | None]:
        """The metadata of each of `number` samples, None where there is none. RewardError for what could only score zero."""
        columns = [[None] * number if column is None else column for column in (tag, include, exclude)]
        specs = [_metadata(*row) for row in zip(*columns, strict=True)]
        for spec in specs:
            if spec is not None:
                self._check(spec)
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
        wanted = [i for i, spec in enumerate(specs) if spec is not None]
        found = dict(zip(wanted, self.detector([images[i] for i in wanted]) if wanted else (), strict=True))
        return [None if spec is None else judge(found[i], spec) for i, spec in enumerate(specs)]

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
