"""The rules of GenEval, branch by branch, and against a slow reference written from their description."""

from __future__ import annotations

import math
import random

import pytest

from rewards.boxes import Detection, Limits, box_iou, filter_detections, keep_boxes, relative_position
from rewards.errors import RewardError
from rewards.geneval import evaluate, misses


def box(x: float, y: float, size: float = 10, confidence: float = 0.95) -> tuple[float, float, float, float, float]:
    return (x, y, x + size, y + size, confidence)


def no_colors(name: str, boxes: object) -> list[str]:
    raise AssertionError("no colour was asked for")


LEFT, RIGHT = box(0, 0), box(30, 0)


# Include: number ------------------------------------------------------------------------------------------------------


def test_empty_metadata_holds_for_any_image() -> None:
    assert evaluate({"cat": [LEFT]}, {}, no_colors) == (True, "")
    assert evaluate({}, {"include": [], "exclude": []}, no_colors) == (True, "")


@pytest.mark.parametrize(("found", "correct"), [(0, False), (1, False), (2, True), (3, True)])
def test_include_needs_at_least_count_objects(found: int, correct: bool) -> None:
    objects = {"cat": [LEFT] * found} if found else {}
    verdict, reason = evaluate(objects, {"include": [{"class": "cat", "count": 2}]}, no_colors)
    assert verdict is correct
    assert reason == ("" if correct else f"expected at least 2 cat, found {found}")


def test_all_clauses_must_hold_and_each_miss_is_one_line() -> None:
    metadata = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}, {"class": "owl", "count": 1}]}
    verdict, reason = evaluate({"cat": [LEFT]}, metadata, no_colors)
    assert not verdict
    assert reason.splitlines() == ["expected at least 1 dog, found 0", "expected at least 1 owl, found 0"]
    assert misses({"cat": [LEFT]}, metadata, no_colors)[0] == ""


# Include: colour ------------------------------------------------------------------------------------------------------

RED_CATS = {"include": [{"class": "cat", "count": 2, "color": "red"}]}


def test_color_is_asked_of_the_count_most_confident_objects_only() -> None:
    asked = []

    def colors(name: str, boxes: list) -> list[str]:
        asked.append((name, list(boxes)))
        return ["red"] * len(boxes)

    boxes = [box(0, 0, confidence=0.9), box(1, 0, confidence=0.8), box(2, 0, confidence=0.7)]
    assert evaluate({"cat": boxes}, RED_CATS, colors)[0]
    assert asked == [("cat", boxes[:2])]


def test_every_one_of_them_must_have_the_color() -> None:
    verdict, reason = evaluate({"cat": [LEFT, RIGHT]}, RED_CATS, lambda name, boxes: ["red", "blue"])
    assert not verdict
    assert reason == "expected at least 2 red cat, found red, blue"


def test_color_is_not_asked_when_objects_are_missing() -> None:
    assert not evaluate({"cat": [LEFT]}, RED_CATS, no_colors)[0]


def test_a_third_object_of_the_color_does_not_help() -> None:
    by_x = {0: "blue", 30: "red", 60: "red"}
    objects = {"cat": [box(x, 0) for x in by_x]}
    assert not evaluate(objects, RED_CATS, lambda name, boxes: [by_x[b[0]] for b in boxes])[0]


# Include: position ----------------------------------------------------------------------------------------------------


def position(relation: str, target: int = 0) -> dict:
    return {
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": [relation, target]}],
    }


def test_position_of_the_object_relative_to_its_target() -> None:
    objects = {"cat": [LEFT], "dog": [RIGHT]}
    assert evaluate(objects, position("left of"), no_colors) == (True, "")
    assert evaluate(objects, position("right of"), no_colors) == (
        False,
        "cat should be right of its target, is left of",
    )
    assert not evaluate(objects, position("inside"), no_colors)[0]  # no relation of that name is ever found


def test_too_close_is_no_relation() -> None:
    verdict, reason = evaluate({"cat": [box(1, 1)], "dog": [box(0, 0)]}, position("right of"), no_colors)
    assert (verdict, reason) == (False, "cat should be right of its target, is too close")


def test_position_must_hold_for_every_pair() -> None:
    metadata = {
        "include": [{"class": "dog", "count": 2}, {"class": "cat", "count": 2, "position": ["left of", 0]}],
    }
    dogs = [box(100, 0), box(140, 0)]
    assert evaluate({"cat": [box(0, 0), box(30, 0)], "dog": dogs}, metadata, no_colors)[0]
    verdict, reason = evaluate({"cat": [box(0, 0), box(120, 0)], "dog": dogs}, metadata, no_colors)
    assert not verdict
    assert reason.count("\n") == 0  # the first wrong pair ends the clause
    assert evaluate({"cat": [box(0, 0), box(30, 0), box(200, 0)], "dog": dogs}, metadata, no_colors)[0]


def test_a_target_that_missed_its_own_clause_is_no_target() -> None:
    metadata = {
        "include": [
            {"class": "dog", "count": 1, "color": "red"},
            {"class": "cat", "count": 1, "position": ["left of", 0]},
        ]
    }
    verdict, reason = evaluate({"cat": [LEFT], "dog": [RIGHT]}, metadata, lambda name, boxes: ["blue"])
    assert not verdict
    assert reason.splitlines()[1] == "cat should be left of an object that does not meet its own clause"


def test_an_object_in_the_wrong_place_is_no_target_either() -> None:
    metadata = position("right of")
    metadata["include"].append({"class": "owl", "count": 1, "position": ["above", 1]})
    reasons = misses({"cat": [LEFT], "dog": [RIGHT], "owl": [box(0, -50)]}, metadata, no_colors)
    assert [bool(reason) for reason in reasons] == [False, True, True]


def test_position_is_not_judged_after_a_wrong_color() -> None:
    metadata = position("left of", target=7)  # would be an error if it were looked at
    metadata["include"][1]["color"] = "red"
    objects = {"cat": [LEFT], "dog": [RIGHT]}
    assert evaluate(objects, metadata, lambda name, boxes: ["blue"])[1] == "expected at least 1 red cat, found blue"


def test_position_may_count_from_the_end_but_must_refer_to_an_earlier_clause() -> None:
    objects = {"cat": [LEFT], "dog": [RIGHT]}
    assert evaluate(objects, position("left of", target=-1), no_colors)[0]
    for target in (1, 2, -2):
        with pytest.raises(RewardError, match=f"refers to clause {target}, which does not come before it"):
            evaluate(objects, position("left of", target=target), no_colors)


# Exclude --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("found", "correct"), [(0, True), (2, True), (3, False), (4, False)])
def test_exclude_forbids_count_objects(found: int, correct: bool) -> None:
    objects = {"cat": [LEFT] * found} if found else {}
    verdict, reason = evaluate(objects, {"exclude": [{"class": "cat", "count": 3}]}, no_colors)
    assert verdict is correct
    assert reason == ("" if correct else f"expected fewer than 3 cat, found {found}")


def test_exclude_counts_all_objects_not_the_included_ones() -> None:
    metadata = {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
    assert evaluate({"cat": [LEFT, RIGHT]}, metadata, no_colors)[0]
    assert not evaluate({"cat": [LEFT, RIGHT, LEFT]}, metadata, no_colors)[0]
    assert misses({}, metadata, no_colors) == ["expected at least 2 cat, found 0", ""]


# Geometry -------------------------------------------------------------------------------------------------------------


def test_relative_position_by_hand() -> None:
    # Boxes of side 10: slack per axis 0.1 * (10 + 10) = 2.
    assert relative_position(box(-20, 0), box(0, 0)) == {"left of"}
    assert relative_position(box(20, 0), box(0, 0)) == {"right of"}
    assert relative_position(box(0, -20), box(0, 0)) == {"above"}
    assert relative_position(box(0, 20), box(0, 0)) == {"below"}
    # Offset (20, 20): (20 - 2) / sqrt(800) = 0.636 > 0.5 on both axes.
    assert relative_position(box(20, 20), box(0, 0)) == {"right of", "below"}
    # Offset (20, 10): 18 / sqrt(500) = 0.80, 8 / sqrt(500) = 0.36.
    assert relative_position(box(20, 10), box(0, 0)) == {"right of"}
    # Offset (2, 0) is all slack; (2.001, 0) leaves 0.001, which is not below 1e-3 but gives 0.0005 of the distance.
    assert relative_position(box(2, 0), box(0, 0)) == set()
    assert relative_position(box(2.01, 0), box(0, 0)) == set()
    # Offset (4, 0): (4 - 2) / 4 = 0.5 is not more than one half; (4.1, 0): 2.1 / 4.1 = 0.512 is.
    assert relative_position(box(4, 0), box(0, 0)) == set()
    assert relative_position(box(4.1, 0), box(0, 0)) == {"right of"}
    # Larger boxes need more distance: sides 10 and 50, slack 6; centres 10 apart, (10 - 6) / 10 = 0.4.
    assert relative_position(box(30, 20), box(0, 0, 50)) == set()
    assert relative_position(box(0, 0), box(0, 0)) == set()
    # What is left of the offset must also reach 1e-3, whatever its direction.
    assert relative_position(box(0.0009, 0, 0), box(0, 0, 0)) == set()
    assert relative_position(box(0.0011, 0, 0), box(0, 0, 0)) == {"right of"}


def test_box_iou_counts_pixels_inclusively() -> None:
    assert box_iou((0, 0, 9, 9, 1), (0, 0, 9, 9, 1)) == 1
    # 10 x 10 and 10 x 10 px share 5 x 10: 50 / 150.
    assert box_iou((0, 0, 9, 9, 1), (5, 0, 14, 9, 1)) == pytest.approx(1 / 3)
    # Boxes that touch at x = 9 share the column of pixels there: 10 / 190.
    assert box_iou((0, 0, 9, 9, 1), (9, 0, 18, 9, 1)) == pytest.approx(10 / 190)
    assert box_iou((0, 0, 9, 9, 1), (30, 0, 39, 9, 1)) == 0
    assert box_iou((5, 5, 0, 0, 1), (5, 5, 0, 0, 1)) == 0  # no area at all


# Which detections count -----------------------------------------------------------------------------------------------


def detection(confidence: float, name: str = "cat", x: float = 0.0) -> Detection:
    return Detection(name, (x, 0, x + 10, 10), confidence)


def test_thresholds_are_exclusive_and_stricter_for_counting() -> None:
    found = [detection(c) for c in (0.3, 0.31, 0.9, 0.91)]
    assert [d.confidence for d in filter_detections(found, "colors")["cat"]] == [0.91, 0.9, 0.31]
    assert [d.confidence for d in filter_detections(found, None)["cat"]] == [0.91, 0.9, 0.31]
    assert [d.confidence for d in filter_detections(found, "counting")["cat"]] == [0.91]
    assert filter_detections([detection(0.2)], "colors") == {}
    assert filter_detections([], "colors") == {}


def test_at_most_sixteen_per_class_the_most_confident_ones() -> None:
    found = [detection(0.5 + i / 100) for i in range(20)] + [detection(0.5, name="dog")]
    kept = filter_detections(found)
    assert [d.confidence for d in kept["cat"]] == [0.5 + i / 100 for i in range(19, 3, -1)]
    assert len(kept["dog"]) == 1
    assert len(filter_detections(found, limits=Limits(max_objects=3))["cat"]) == 3


def test_overlaps_are_suppressed_only_on_request() -> None:
    boxes = [box(0, 0, confidence=0.8), box(1, 0, confidence=0.9), box(40, 0, confidence=0.7)]
    assert keep_boxes(boxes, 0.3) == [1, 0, 2]
    # Sides of 11 px, shifted by one: 110 / 132 = 0.83.
    assert keep_boxes(boxes, 0.3, max_overlap=0.8) == [1, 2]
    assert keep_boxes(boxes, 0.3, max_overlap=0.84) == [1, 0, 2]
    # 10 x 10 and 10 x 5 px of it: exactly 0.5, which is too much already.
    assert keep_boxes([(0, 0, 9, 9, 0.9), (0, 0, 9, 4, 0.8)], 0.3, max_overlap=0.5) == [0]


def test_the_limit_comes_before_the_suppression() -> None:
    boxes = [box(0, 0, confidence=0.9), box(0, 0, confidence=0.8), box(40, 0, confidence=0.7)]
    assert keep_boxes(boxes, 0.3, max_objects=2, max_overlap=0.5) == [0]


def test_color_of_a_detection_is_its_likeliest() -> None:
    assert Detection("cat", (0, 0, 1, 1), 1.0, {"red": 0.2, "blue": 0.8}).color == "blue"
    assert Detection("cat", (0, 0, 1, 1), 1.0).color == ""


# Against a reference --------------------------------------------------------------------------------------------------


def reference_relations(a: tuple, b: tuple) -> set[str]:
    """Per axis: distance of the centres, less a tenth of both sizes; it counts if over half of the full distance."""
    ax, ay, bx, by = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2, (b[0] + b[2]) / 2, (b[1] + b[3]) / 2
    dx, dy = ax - bx, ay - by
    rest_x = abs(dx) - 0.1 * (abs(a[2] - a[0]) + abs(b[2] - b[0]))
    rest_y = abs(dy) - 0.1 * (abs(a[3] - a[1]) + abs(b[3] - b[1]))
    distance = math.sqrt(dx * dx + dy * dy)
    relations = set()
    if rest_x > 0 and rest_x / distance > 0.5:
        relations.add("left of" if dx < 0 else "right of")
    if rest_y > 0 and rest_y / distance > 0.5:
        relations.add("above" if dy < 0 else "below")
    return relations


def reference_verdict(objects: dict, metadata: dict, color_of: dict) -> bool:
    usable: list[list | None] = []
    for clause in metadata["include"]:
        candidates = objects.get(clause["class"], [])
        chosen = [candidates[i] for i in range(min(clause["count"], len(candidates)))]
        good = len(chosen) == clause["count"]
        if good and "color" in clause:
            good = all(color_of[b] == clause["color"] for b in chosen)
        if good and "position" in clause:
            relation, index = clause["position"]
            targets = usable[index]
            good = targets is not None and all(relation in reference_relations(b, t) for b in chosen for t in targets)
        usable.append(chosen if good else None)
    limits = all(len(objects.get(clause["class"], [])) < clause["count"] for clause in metadata["exclude"])
    return limits and None not in usable


def random_case(rng: random.Random) -> tuple[dict, dict, dict]:
    colors = ("red", "blue")
    objects: dict[str, list] = {}
    for name in rng.sample(["cat", "dog", "owl"], rng.randint(1, 3)):
        corners = [(rng.uniform(0, 100), rng.uniform(0, 100)) for _ in range(rng.randint(1, 4))]
        boxes = [(x, y, x + rng.uniform(1, 40), y + rng.uniform(1, 40), rng.random()) for x, y in corners]
        objects[name] = sorted(boxes, key=lambda b: -b[4])
    include: list[dict] = []
    for i in range(rng.randint(0, 3)):
        clause: dict = {"class": rng.choice(["cat", "dog", "owl"]), "count": rng.choice([1, 1, 1, 2, 3])}
        if rng.random() < 0.4:
            clause["color"] = rng.choice(colors)
        if i and rng.random() < 0.7:
            clause["position"] = (rng.choice(["left of", "right of", "above", "below"]), rng.randrange(i))
        include.append(clause)
    exclude = [{"class": rng.choice(["cat", "dog"]), "count": rng.randint(1, 4)} for _ in range(rng.randint(0, 1))]
    color_of = {b: rng.choice(colors) for boxes in objects.values() for b in boxes}
    return objects, {"include": include, "exclude": exclude}, color_of


def test_verdict_equals_the_reference_on_random_cases() -> None:
    rng = random.Random(0)
    verdicts = []
    for _ in range(4000):
        objects, metadata, color_of = random_case(rng)
        verdict, reason = evaluate(objects, metadata, lambda name, boxes, known=color_of: [known[b] for b in boxes])
        assert verdict is reference_verdict(objects, metadata, color_of), (objects, metadata)
        assert verdict is (reason == "")
        verdicts.append(verdict)
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.8  # the cases exercise both answers
